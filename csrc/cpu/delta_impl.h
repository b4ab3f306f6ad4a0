// The inner loops of the delta iteration for one instruction set. The including file defines DEQ_VECTOR_BYTES, DEQ_TILE_ROWS
// and a struct Increment: the elements of an increment, their quantisation and their dot products.
//
// Register tile: up to DEQ_TILE_ROWS samples x two vectors of outputs, like the float32 kernels; a 32-bit word of an increment
// (kTerms elements of k) is multiplied with the same word of a vector of outputs.
#pragma once
#include <type_traits>

#include "delta.h"
#include "delta_pack_impl.h"
#include "in_place_impl.h"
#include "vec.h"

namespace {

using deq::DeltaMap;
using deq::DeltaRow;
using deq::DeltaStep;
using deq::Old;
// acc += the products of the words [k0, k1) of increments and weights.
template <int MR, int NV, int NP>
DEQ_INLINE void products(Increment::Sum (&acc)[MR][NV * NP], const uint32_t* const (&increment)[MR], const uint32_t* w,
                         int64_t panel_words, int64_t k0, int64_t k1) {
  constexpr int N = NV * NP;
  w += k0 * NV * kL;
#pragma GCC unroll 2  // 5 % of a step at m = 128
  for (int64_t k = k0; k < k1; ++k, w += NV * kL) {
    Increment::Sum b[N];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) memcpy(&b[p * NV + v], w + p * panel_words + v * kL, sizeof(Increment::Sum));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) acc[r][v] = Increment::dot(acc[r][v], increment[r][k], b[v]);
  }
}

// One register tile of y += W_low increment: rows [row0, row0 + MR), NP panels of NV vectors from column j. The old increments
// come first: the loads of the new ones, just stored, need not wait. The sums go to y here: left as integers for the settling
// loop they cost a store more a vector, and a solve takes 1 to 9 % longer.
template <int MR, int NV, int NP>
__attribute__((noinline)) void tile(const DeltaStep& s, int row0, int64_t j) {
  using Sum = Increment::Sum;
  constexpr int N = NV * NP;
  const Layout layout(s.width);
  const float* scales = layout.scales(s.weights) + j;
  const int32_t *all = layout.offsets(s.weights, 0) + j, *rest = layout.offsets(s.weights, s.stage) + j;
  const uint32_t* w = static_cast<const uint32_t*>(s.weights) + j * layout.words;
  const int64_t panel_words = NV * kL * layout.words, fresh = s.fresh / Increment::kTerms;
  Sum acc[MR][N];
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    const Sum start = s.old == Old::kNothing ? Sum{} : Increment::start((s.old == Old::kAll ? all : rest) + v * kL);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = start;
  }
  const uint32_t* increment[MR];
  if (s.old != Old::kNothing) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) increment[r] = static_cast<const uint32_t*>(s.rows[row0 + r]->increment);
    products<MR, NV, NP>(acc, increment, w, panel_words, s.old == Old::kAll ? 0 : fresh, layout.words);
  }
  if (fresh > 0) {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      const Sum start = Increment::difference(all + v * kL, rest + v * kL);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][v] = Increment::carried(acc[r][v], s.rows[row0 + r]->shift, start);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) increment[r] = static_cast<const uint32_t*>(s.rows[row0 + r]->next);
    products<MR, NV, NP>(acc, increment, w, panel_words, 0, fresh);
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const DeltaRow& row = *s.rows[row0 + r];
    const V scale = M::set(0.0) + (fresh > 0 ? row.next_scale : row.scale);
    float* y = row.y + j;
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) M::store(y + v * kL, Increment::added(M::load(y + v * kL), acc[r][v], scale, scales + v * kL));
  }
}

// The tile shapes of up to MR rows, tried from the largest down.
template <int NV, int MR>
DEQ_INLINE void tile_rows(int rows, const DeltaStep& s, int row0, int64_t j) {
  if constexpr (MR > 0) {
    if (rows == MR) return tile<MR, NV, 1>(s, row0, j);
    tile_rows<NV, MR - 1>(rows, s, row0, j);
  }
}

// f of the maps that the step applies itself; every one keeps the zeros of the padding.
template <DeltaMap kMap>
DEQ_INLINE V apply(V y, const float* d) {
  if constexpr (kMap == DeltaMap::kRelu) return Increment::maximum(V{}, y);  // of NaN the second
  if constexpr (kMap == DeltaMap::kReflectedRelu) return M::abs(y);
  if constexpr (kMap == DeltaMap::kMask) return M::load(d) * y;
  if constexpr (kMap == DeltaMap::kReflectedMask) {
    const V z = M::load(d) * y;
    return z + (z - y);
  }
  return y;
}

template <DeltaMap kMap>
DEQ_INLINE V state_at(const DeltaRow& row, const float* state, int64_t j) {
  if constexpr (kMap == DeltaMap::kByRow) return M::load(state + j);
  return apply<kMap>(M::load(row.y + j), row.d + j);
}

// Sums of a row, two vectors at a time: the chains of additions are half as long.
struct Sums {
  V step2[2]{}, size2[2]{}, largest[2]{};
  inline __attribute__((always_inline)) void add(int i, V state, V change) {
    step2[i] += change * change;
    size2[i] += state * state;
    largest[i] = Increment::larger(largest[i], change);
  }
  // With what an earlier stage has left there, if any has.
  void store(float* at, bool is_first) const {
    V sum[3] = {step2[0] + step2[1], size2[0] + size2[1], Increment::maximum(largest[0], largest[1])};
    if (!is_first) {
      sum[0] += M::load(at);
      sum[1] += M::load(at + kL);
      sum[2] = Increment::maximum(sum[2], M::load(at + 2 * kL));
    }
    for (int i = 0; i < 3; ++i) M::store(at + i * kL, sum[i]);
  }
};

void add_up(DeltaRow& row, int pieces) {
  V step2 = M::load(row.sums), size2 = M::load(row.sums + kL), largest = M::load(row.sums + 2 * kL);
  for (int i = 1; i < pieces; ++i) {
    const float* sums = row.sums + i * 3 * kL;
    step2 += M::load(sums);
    size2 += M::load(sums + kL);
    largest = Increment::maximum(largest, M::load(sums + 2 * kL));
  }
  row.step2 = lane_sum<float>(step2);
  row.size2 = lane_sum<float>(size2);
  row.largest = Increment::lane_max(largest);
}

// The state at the row's new y, its sums, and the increment towards it. In a loop of its own: in the epilogue of the tile the
// same work takes twice as long, because it fills the reorder buffer and the products of the next tile have to wait (28 and 15
// cycles a vector on Zen 4).
template <DeltaMap kMap>
DEQ_INLINE void settle_as(const DeltaStep& s, DeltaRow& row, const float* given) {
  const Increment::Quantiser quantiser(row);
  Sums sums;
  auto vector = [&](int64_t j, int i) __attribute__((always_inline)) {
    const V state = state_at<kMap>(row, given, j), before = M::load(row.x + j), change = state - before;
    sums.add(i, state, change);
    M::store(row.x + j, before + quantiser.store(change, static_cast<char*>(row.next) + j * Increment::kBytes));
  };
  int64_t j = s.from;
  for (; j + 2 * kL <= s.to; j += 2 * kL) {
    vector(j, 0);
    vector(j + kL, 1);
  }
  if (j < s.to) vector(j, 0);
  sums.store(row.sums + s.piece * 3 * kL, s.stage == 0);
}

// Calls f with the map as a constant.
template <class F>
DEQ_INLINE void with_map(DeltaMap map, F&& f) {
  switch (map) {
    case DeltaMap::kRelu:
      return f(std::integral_constant<DeltaMap, DeltaMap::kRelu>{});
    case DeltaMap::kReflectedRelu:
      return f(std::integral_constant<DeltaMap, DeltaMap::kReflectedRelu>{});
    case DeltaMap::kMask:
      return f(std::integral_constant<DeltaMap, DeltaMap::kMask>{});
    case DeltaMap::kReflectedMask:
      return f(std::integral_constant<DeltaMap, DeltaMap::kReflectedMask>{});
    default:
      return f(std::integral_constant<DeltaMap, DeltaMap::kByRow>{});
  }
}

void settle(const DeltaStep& s, DeltaRow& row, const float* state) { settle_as<DeltaMap::kByRow>(s, row, state); }

// Weights up to this size stream from the L2 cache once for every few rows, whose data then stay in L1; larger ones once for all.
constexpr int64_t kStreamedBytes = 512 << 10;

void step(const DeltaStep& s, int n) {
  const bool multiplies = s.old != Old::kNothing || s.fresh > 0;
  const int64_t full = s.to / (2 * kL) * (2 * kL), end = multiplies ? s.to : s.from;
  const int blocks = (n + DEQ_TILE_ROWS - 1) / DEQ_TILE_ROWS, base = n / blocks, extra = n % blocks;
  int64_t j = s.from;
  // One or two rows do not fill the pipeline with one panel: take several at once.
  for (; n == 1 && j + 8 * kL <= full && j < end; j += 8 * kL) tile<1, 2, 4>(s, 0, j);
  for (; n <= 2 && j + 4 * kL <= full && j < end; j += 4 * kL) {
    if (n == 1)
      tile<1, 2, 2>(s, 0, j);
    else
      tile<2, 2, 2>(s, 0, j);
  }
  const int64_t first = j;
  const bool streams = Layout(s.width).bytes() <= kStreamedBytes;
  auto first_row = [&](int b) { return b * base + (b < extra ? b : extra); };  // even blocks: 9 rows are 5 + 4, not 8 + 1
  const int together = streams ? 1 : blocks;
  for (int group = 0; group < blocks; group += together) {
    for (j = first; j < end; j += 2 * kL)
      for (int b = group; b < group + together; ++b) {
        const int row = first_row(b), rows = first_row(b + 1) - row;
        if (j < full)
          tile_rows<2, DEQ_TILE_ROWS>(rows, s, row, j);
        else
          tile_rows<1, DEQ_TILE_ROWS>(rows, s, row, j);
      }
    with_map(s.map, [&](auto map) {
      if constexpr (map() != DeltaMap::kByRow)
        for (int r = first_row(group); r < first_row(group + together); ++r) settle_as<map()>(s, *s.rows[r], nullptr);
    });
  }
}

void measure(DeltaRow& row, DeltaMap map, const float* given, int64_t n) {
  with_map(map, [&](auto m) {
    Sums sums;
    int64_t j = 0;
    auto vector = [&](int64_t at, int i) __attribute__((always_inline)) {
      const V state = state_at<m()>(row, given, at);
      sums.add(i, state, state - M::load(row.x + at));
    };
    for (; j + 2 * kL <= n; j += 2 * kL) {
      vector(j, 0);
      vector(j + kL, 1);
    }
    if (j < n) vector(j, 0);
    sums.store(row.sums, true);
  });
  add_up(row, 1);
}

void feed(DeltaRow& row, DeltaMap map, const float* given, float* before, int64_t n) {
  const Increment::Quantiser quantiser(row);
  char* next = static_cast<char*>(row.next);
  with_map(map, [&](auto m) {
    for (int64_t j = 0; j < n; j += kL) {
      const V x = M::load(row.x + j);
      if (before) M::store(before + j, x);
      M::store(row.x + j, x + quantiser.store(state_at<m()>(row, given, j) - x, next + j * Increment::kBytes));
    }
  });
}

double distance1(const DeltaRow& row, const float* state, int64_t n) {
  V sum[2]{};
  for (int64_t j = 0; j < n; j += kL) sum[j / kL % 2] += M::abs(M::load(state + j) - M::load(row.x + j));
  return lane_sum<float>(sum[0] + sum[1]);
}

void drop_inactive(DeltaRow& row, int64_t n) {
  for (int64_t j = 0; j < n; j += kL) M::store(row.x + j, M::select(M::load(row.y + j) <= M::set(0.0), V{}, M::load(row.x + j)));
}

const deq::DeltaKernels* table() {
  static constexpr deq::DeltaKernels kTable = {
      .precision = Increment::kPrecision,
      .lanes = kL,
      .element_bytes = Increment::kBytes,
      .plane_bytes = plane_bytes,
      .pack = pack,
      .pack_columns = pack_columns,
      .pack_rows = pack_rows,
      .left_out = left_out,
      .affine = affine,
      .spread = spread,
      .most_spread = kMostSpread,
      .step = step,
      .settle = settle,
      .add_up = add_up,
      .measure = measure,
      .distance1 = distance1,
      .drop_inactive = drop_inactive,
      .feed = feed,
  };
  return &kTable;
}

}  // namespace
