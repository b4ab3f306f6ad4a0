// W in the precision of increments, for one instruction set: out of the float32 panels, or as the caller has it.
#pragma once
#include <stdint.h>
#include <string.h>

#include "pack_impl.h"
#include "sweep.h"
#include "vec.h"

namespace {

using M = VecMath<float>;
using V = M::V;
constexpr int kL = kLanes<float>;

DEQ_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// A packed plane: for every panel of two vectors of outputs the words [k / kTerms][output], then of every output a scale, and for
// every stage of a sweep the offset of the columns from there on. A matrix is two planes, the second what rounding left out of
// the first.
struct Layout {
  int64_t columns, words;
  explicit Layout(int64_t m) : columns(padded<float>(m)), words((m + Increment::kTerms - 1) / Increment::kTerms) {}
  int64_t bytes() const { return (columns * (words + 1 + deq::Sweep::kStages) * 4 + 63) / 64 * 64; }
  const float* scales(const void* packed) const {
    return reinterpret_cast<const float*>(static_cast<const uint32_t*>(packed) + columns * words);
  }
  const int32_t* offsets(const void* packed, int stage) const {
    return reinterpret_cast<const int32_t*>(scales(packed) + (1 + stage) * columns);
  }
};

int64_t plane_bytes(int64_t m) { return Layout(m).bytes(); }

// The norm of the scales of a plane.
double norm_of_scales(const float* scales, int64_t columns) {
  V largest{}, sum{};
  for (int64_t j = 0; j < columns; j += kL) largest = Increment::maximum(largest, M::load(scales + j));
  const float unit = Increment::lane_max(largest);
  if (!(unit > 0)) return 0;
  const V inverse = M::set(1 / unit);
  for (int64_t j = 0; j < columns; j += kL) {
    const V part = M::load(scales + j) * inverse;
    sum += part * part;
  }
  return unit * sqrt(lane_sum<float>(sum));
}

// An element of W d is wrong by at most the largest error of its row times |d|_1.
deq::LeftOut left_out(const void* packed, int64_t m) {
  using Weights = Increment::Weights;
  const Layout layout(m);
  auto of = [&](int plane) {
    const float* scales = layout.scales(static_cast<const char*>(packed) + plane * layout.bytes());
    return Weights::kMostUnits * norm_of_scales(scales, layout.columns) + Weights::kLeast * sqrt(static_cast<double>(m));
  };
  return {of(0), of(1)};
}

// Lines of the planes are asked for before they are written: 2048 x 2048 from rows takes 0.85 ms against 1.1, from columns 1.5
// against 1.7 (Zen 5).
constexpr int64_t kWordsAhead = 32;

// From this size on a second plane is written past the caches: corrections read it, as a rule one a solve, and a store there
// reads the line first. Zen 4, training with 8 or 16 samples, one thread: 0.99 to 1.01 x as fast at m = 2048, 1.05 at 3000, 1.01
// at 4096; where others use the memory as well 1.04 to 1.09, 1.04 to 1.15, 1.13, but 0.99 at 1536 and 0.91 at 1024. The first
// plane the same way gains nothing.
constexpr int64_t kStreamedPlane = 4 << 20;

DEQ_INLINE bool streams(const Layout& layout) { return DEQ_VECTOR_BYTES == 64 && layout.bytes() >= kStreamedPlane; }

// Where a vector of outputs, from j on, goes in the planes of a matrix.
class Outputs {
 public:
  Outputs(const Layout& layout, void* packed, int64_t j) : layout_(layout), j_(j), streams_(streams(layout)) {
    const int64_t panel = j / (2 * kL) * (2 * kL);
    width_ = lesser(layout.columns - panel, 2 * kL);
    for (int i = 0; i < 2; ++i) {
      plane_[i] = static_cast<char*>(packed) + i * layout.bytes();
      words_[i] = reinterpret_cast<float*>(plane_[i]) + panel * layout.words + (j - panel);
    }
  }
  int64_t width() const { return width_; }  // of the panel
  inline __attribute__((always_inline)) void put(const Increment::Weights& weights, int64_t word,
                                                 const V (&terms)[Increment::kTerms], Increment::Sum (&sums)[2]) const {
    V planes[2];
    weights.split(terms, planes, sums);
    float *first = at(0, word), *second = at(1, word);
    __builtin_prefetch(at(0, word + kWordsAhead), 1, 2);
    M::store(first, planes[0]);
    if (streams_) {
      M::stream(second, planes[1]);
    } else {
      __builtin_prefetch(at(1, word + kWordsAhead), 1, 2);
      M::store(second, planes[1]);
    }
  }
  void put_offsets(int stage, const Increment::Sum (&sums)[2]) const {
    for (int i = 0; i < 2; ++i) {
      const Increment::Sum offset = Increment::offset_of(sums[i]);
      memcpy(const_cast<int32_t*>(layout_.offsets(plane_[i], stage)) + j_, &offset, sizeof offset);
    }
  }
  void put_scales(const Increment::Weights& weights) const {
    for (int i = 0; i < 2; ++i) M::store(const_cast<float*>(layout_.scales(plane_[i])) + j_, weights.scale[i]);
  }

 private:
  float* at(int plane, int64_t word) const { return words_[plane] + word * width_; }

  const Layout& layout_;
  int64_t j_, width_;
  bool streams_;
  char* plane_[2];
  float* words_[2];  // of 32 bits
};

// Calls words(from, to) for the words of every stage, from the last to the first, and offsets(stage) after each: the sums at its
// start are those of the columns from there on.
template <class Words, class Offsets>
DEQ_INLINE void for_stages(int64_t m, const Layout& layout, const Words& words, const Offsets& offsets) {
  const deq::Sweep sweep(m, layout.columns);
  for (int stage = sweep.stages - 1; stage >= 0; --stage) {
    const bool last = stage + 1 == sweep.stages;
    words(sweep.start[stage] / Increment::kTerms, last ? layout.words : sweep.start[stage + 1] / Increment::kTerms);
    offsets(stage);
  }
}

// The largest magnitude of every output over k, `stride` elements apart.
V largest_of(const float* src, int64_t stride, int64_t m) {
  constexpr int kChains = 4;
  V largest[kChains]{};
  int64_t k = 0;
  for (; k + kChains <= m; k += kChains)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) largest[i] = Increment::larger(largest[i], M::load(src + (k + i) * stride));
  for (; k < m; ++k) largest[0] = Increment::larger(largest[0], M::load(src + k * stride));
  for (int i = 1; i < kChains; ++i) largest[0] = Increment::maximum(largest[0], largest[i]);
  return largest[0];
}

// The float32 panels [k][output] become words [k / kTerms][output].
void pack(const float* w, int64_t m, void* packed, int64_t first, int64_t last) {
  constexpr int kTerms = Increment::kTerms;
  const Layout layout(m);
  const int64_t end = lesser(last * 2 * kL, layout.columns), whole = m / kTerms;
  for (int64_t j = first * 2 * kL; j < end; j += kL) {
    const Outputs outputs(layout, packed, j);
    const int64_t width = outputs.width(), panel = j / (2 * kL) * (2 * kL);
    const float* src = w + panel * m + (j - panel);
    const auto weights = Increment::Weights::of(largest_of(src, width, m));
    V terms[kTerms];
    Increment::Sum sums[2] = {};
    auto words = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      for (int64_t word = from; word < lesser(to, whole); ++word) {
#pragma GCC unroll 4
        for (int t = 0; t < kTerms; ++t) terms[t] = M::load(src + (word * kTerms + t) * width);
        outputs.put(weights, word, terms, sums);
      }
      if (to <= whole) return;
      for (int t = 0; t < kTerms; ++t) terms[t] = whole * kTerms + t < m ? M::load(src + (whole * kTerms + t) * width) : V{};
      outputs.put(weights, whole, terms, sums);
    };
    for_stages(m, layout, words, [&](int stage) { outputs.put_offsets(stage, sums); });
    outputs.put_scales(weights);
  }
  if (streams(layout)) M::fence();
}

// Vector v of columns of a row; lanes from `valid` on are zero.
DEQ_INLINE V load_columns(const float* row, int v, int64_t valid) {
  const int64_t left = valid - v * kL;
  return left >= kL ? M::load(row + v * kL) : load_first<float>(row + v * kL, left);
}

// The largest magnitudes of `vectors` vectors of columns; returns zero times every element. Rows are asked for ahead: a piece of
// a row is too short for the hardware's prefetcher (2048 x 2048 into planes, out of memory: 1.9 ms against 2.5; 1024 x 1024 out
// of the L3 cache 0.33 against 0.5).
V largest_of_columns(const float* w, int64_t stride, int64_t m, int vectors, int64_t valid, V* largest) {
  constexpr int64_t kRowsAhead = 16;
  constexpr int kRows = 4;  // together: a maximum is loaded and stored once for them
  V zeros[kRows]{};
  for (int v = 0; v < vectors; ++v) largest[v] = V{};
  auto see = [&](const float* at, int v, int rows) __attribute__((always_inline)) {
    V most = largest[v];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(at + (kRowsAhead + r) * stride + v * kL, 0, 2);
      const V x = load_columns(at + r * stride, v, valid);
      zeros[r] += x * M::set(0.0);
      most = Increment::larger(most, x);
    }
    largest[v] = most;
  };
  int64_t k = 0;
  for (; k + kRows <= m; k += kRows, w += kRows * stride)
    for (int v = 0; v < vectors; ++v) see(w, v, kRows);
  for (; k < m; ++k, w += stride)
    for (int v = 0; v < vectors; ++v) see(w, v, 1);
  return zeros[0] + zeros[1] + (zeros[2] + zeros[3]);
}

constexpr int kGroup = 32;  // vectors of columns whose sums and scales stay in the L1 cache

// Packs some vectors of columns from j0 on whose largest magnitudes are given.
void pack_group(const float* w, int64_t stride, int64_t m, void* packed, int64_t j0, int vectors, const V* largest) {
  // Of eight rows of W at a time: the lines of more may not fit one set of the L1 cache.
  constexpr int kTerms = Increment::kTerms, kWords = 8 / kTerms;
  const Layout layout(m);
  Increment::Weights weights[kGroup];
  Increment::Sum sums[kGroup][2] = {};
  for (int v = 0; v < vectors; ++v) weights[v] = Increment::Weights::of(largest[v]);
  auto words = [&](int64_t from, int64_t to) {
    for (int64_t start = from; start < to; start += kWords)
      for (int v = 0; v < vectors; ++v) {
        const Outputs outputs(layout, packed, j0 + v * kL);
        const int64_t valid = m - j0 - v * kL;
        const Increment::Weights scaled = weights[v];
        Increment::Sum sum[2] = {sums[v][0], sums[v][1]};  // in registers: stores of words might be to `sums`
        const float* at = w + start * kTerms * stride + j0 + v * kL;
        for (int64_t word = start; word < lesser(to, start + kWords); ++word, at += kTerms * stride) {
          V terms[kTerms];
#pragma GCC unroll 4
          for (int t = 0; t < kTerms; ++t) terms[t] = word * kTerms + t < m ? load_columns(at + t * stride, 0, valid) : V{};
          outputs.put(scaled, word, terms, sum);
        }
        sums[v][0] = sum[0], sums[v][1] = sum[1];
      }
  };
  for_stages(m, layout, words, [&](int stage) {
    for (int v = 0; v < vectors; ++v) Outputs(layout, packed, j0 + v * kL).put_offsets(stage, sums[v]);
  });
  for (int v = 0; v < vectors; ++v) Outputs(layout, packed, j0 + v * kL).put_scales(weights[v]);
}

// pack() of a matrix whose columns are contiguous, `stride` apart; false if an element is not finite. W is read twice: the caller
// asks for so few panels that it comes out of the L2 cache then (half of it; a quarter or all make training at 2048 x 16 6 %
// slower).
bool pack_columns(const float* w, int64_t stride, int64_t m, void* packed, int64_t first, int64_t last) {
  V largest[kGroup], zeros{};
  const int64_t end = lesser(last * 2 * kL, padded<float>(m));
  for (int64_t j = first * 2 * kL; j < end; j += kGroup * kL) {
    const int vectors = static_cast<int>(lesser((end - j) / kL, kGroup));
    zeros += largest_of_columns(w + j, stride, m, vectors, m - j, largest);
    pack_group(w, stride, m, packed, j, vectors, largest);
  }
  if (streams(Layout(m))) M::fence();
  return lane_sum<float>(zeros) == 0;
}

// The largest magnitudes of up to kL rows of contiguous elements; adds zero times every element to `zeros`.
V largest_of_rows(const float* w, int64_t stride, int64_t m, int64_t rows, V& zeros) {
  alignas(DEQ_VECTOR_BYTES) float result[kL] = {};
  for (int64_t r = 0; r < rows; ++r, w += stride) {
    V largest[2]{}, zero[2]{};
    auto see = [&](V x, int i) __attribute__((always_inline)) {
      zero[i] += x * M::set(0.0);
      largest[i] = Increment::larger(largest[i], x);
    };
    int64_t k = 0;
    for (; k + 2 * kL <= m; k += 2 * kL) see(M::load(w + k), 0), see(M::load(w + k + kL), 1);
    for (; k < m; k += kL) see(load_columns(w + k, 0, m - k), 0);
    zeros += zero[0] + zero[1];
    result[r] = Increment::lane_max(Increment::maximum(largest[0], largest[1]));
  }
  return M::load(result);
}

// pack() of a matrix whose rows are contiguous, `stride` apart; false if an element is not finite. W is read twice, the second
// time out of the L2 cache, while the next rows are on their way (2048 x 2048: 0.85 ms against 0.95).
bool pack_rows(const float* w, int64_t stride, int64_t m, void* packed, int64_t first, int64_t last) {
  constexpr int kTerms = Increment::kTerms;
  constexpr int64_t kBlock = 64, kWords = kBlock / kTerms;  // transposed together, into the L1 cache
  const Layout layout(m);
  const int64_t end = lesser(last * 2 * kL, layout.columns);
  V zeros{};
  for (int64_t j = first * 2 * kL; j < end; j += kL) {
    const float* src = w + j * stride;
    const int64_t rows = lesser(m - j, kL);
    const Outputs outputs(layout, packed, j);
    const auto weights = Increment::Weights::of(largest_of_rows(src, stride, m, rows, zeros));
    Increment::Sum sums[2] = {};
    alignas(DEQ_VECTOR_BYTES) float block[kBlock * kL] = {};
    Transposition<float> transposition;
    Ahead<float> ahead(src + rows * stride, m, stride, lesser(m - j - rows, kL));
    auto words = [&](int64_t from, int64_t to) {
      for (int64_t start = from, stop; start < to; start = stop) {
        stop = lesser(to, start + kWords);
        for (int64_t lines = 0; lines < kBlock * kL * int64_t{sizeof(float)} / 64; lines += 4) ahead.ask<4>();
        const int64_t k = start * kTerms, count = lesser(m - k, (stop - start) * kTerms);
        transposition.run(src + k, stride, rows, count, block, kL);
        for (int64_t i = count; i < (stop - start) * kTerms; ++i) M::store(block + i * kL, V{});  // of the last word
        for (int64_t word = start; word < stop; ++word) {
          V terms[kTerms];
#pragma GCC unroll 4
          for (int t = 0; t < kTerms; ++t) terms[t] = M::load(block + ((word - start) * kTerms + t) * kL);
          outputs.put(weights, word, terms, sums);
        }
      }
    };
    for_stages(m, layout, words, [&](int stage) { outputs.put_offsets(stage, sums); });
    outputs.put_scales(weights);
  }
  if (streams(layout)) M::fence();
  return lane_sum<float>(zeros) == 0;
}

}  // namespace
