// Weights into panels for one instruction set: a matrix row by row becomes, for every panel of two vectors of outputs, the runs
// that a register tile reads one after the other.
#pragma once
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "vec.h"

namespace {

// A square of vectors of kBytes, transposed in registers: blocks of one lane change sides, then of two, then of four.
template <class T, int kBytes>
struct Square {
  static constexpr int kSide = kBytes / sizeof(T);
  typedef T V __attribute__((vector_size(kBytes)));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer I __attribute__((vector_size(kBytes)));

  DEQ_INLINE void transpose(const T* src, int64_t from, T* dst, int64_t to) {
    V zeros{};
    transpose(src, from, dst, to, zeros);
  }

  // Adds zero times every element to `zeros`.
  DEQ_INLINE void transpose(const T* src, int64_t from, T* dst, int64_t to, V& zeros) {
    V rows[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      memcpy(&rows[i], src + i * from, sizeof(V));
      zeros += rows[i] * T(0);
    }
    exchange<1>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) memcpy(dst + i * to, &rows[i], sizeof(V));
  }

 private:
  template <int step>
  DEQ_INLINE void exchange(V (&rows)[kSide]) {
    if constexpr (step < kSide) {
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i)
        if (i / step % 2 == 0) {
          const V a = rows[i], b = rows[i + step];
          rows[i] = blocks<step, false>(a, b, std::make_integer_sequence<int, kSide>{});
          rows[i + step] = blocks<step, true>(a, b, std::make_integer_sequence<int, kSide>{});
        }
      exchange<2 * step>(rows);
    }
  }

  // Of blocks of `step` lanes: the even ones of a and b in turns, or the odd ones.
  template <int step, bool odd, int... l>
  DEQ_INLINE V blocks(V a, V b, std::integer_sequence<int, l...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (l / step % 2 ? kSide + l - (odd ? 0 : step) : l + (odd ? step : 0))...);
#else
    return __builtin_shuffle(a, b, I{(l / step % 2 ? kSide + l - (odd ? 0 : step) : l + (odd ? step : 0))...});
#endif
  }
};
template <class T>
using Quad = Square<T, 16>;

// W is read in long runs, and asked for some rows ahead: a panel's share of a row is too short for the hardware's prefetcher.
// 2048 x 2048 out of memory: 2.3 ms against 4.9 ms with one panel at a time.
constexpr int64_t kAhead = 4;

template <class T>
DEQ_INLINE void fetch(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// Whole panels of a W whose columns are contiguous (a transposed matrix): row k of W has its pieces of all panels side by side.
template <class T>
bool pack_columns(const T* w, int64_t column_stride, int64_t m, T* packed, int64_t panels) {
  using M = VecMath<T>;
  constexpr int64_t L = kLanes<T>;
  typename M::V sum{};  // finite numbers times zero add up to zero; infinity and NaN do not
  for (int64_t k = 0; k < m; ++k) {
    const T* row = w + k * column_stride;
    if (k + kAhead < m) fetch(row + kAhead * column_stride, panels * 2 * L);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t v = 0; v < 2; ++v) {
        const typename M::V x = M::load(row + (2 * p + v) * L);
        M::store(packed + p * 2 * L * m + (2 * k + v) * L, x);
        sum += x * M::set(0.0);
      }
  }
  return LaneSum<T, DEQ_VECTOR_BYTES>::of(sum) == T(0);
}

// dst[k][j] <- w[j][k], by squares of whole vectors, at the edges of 16 bytes, and one by one. Remembers whether all that it saw
// was finite: asking the elements while they are in registers is free, reading them again took three times as long as the rest.
template <class T>
class Transposition {
 public:
  inline __attribute__((always_inline)) void run(const T* w, int64_t from, int64_t rows, int64_t columns, T* dst, int64_t to) {
    cover<DEQ_VECTOR_BYTES>(w, from, rows, columns, dst, to);
  }
  bool finite() const {
    return LaneSum<T, DEQ_VECTOR_BYTES>::of(whole_) == T(0) && LaneSum<T, 16>::of(quad_) == T(0) && single_ == T(0);
  }

 private:
  template <int kBytes>
  inline __attribute__((always_inline)) void cover(const T* w, int64_t from, int64_t rows, int64_t columns, T* dst, int64_t to) {
    if constexpr (kBytes < 16) {
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t k = 0; k < columns; ++k) single_ += T(0) * (dst[k * to + j] = w[j * from + k]);
    } else {
      constexpr int64_t kSide = Square<T, kBytes>::kSide, kNext = kBytes > 16 ? 16 : 0;
      const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
      for (int64_t j = 0; j < whole_rows; j += kSide)
        for (int64_t k = 0; k < whole_columns; k += kSide) {
          if constexpr (kBytes == DEQ_VECTOR_BYTES)
            Square<T, kBytes>::transpose(w + j * from + k, from, dst + k * to + j, to, whole_);
          else
            Square<T, kBytes>::transpose(w + j * from + k, from, dst + k * to + j, to, quad_);
        }
      if (whole_columns < columns)
        cover<kNext>(w + whole_columns, from, whole_rows, columns - whole_columns, dst + whole_columns * to, to);
      if (whole_rows < rows) cover<kNext>(w + whole_rows * from, from, rows - whole_rows, columns, dst + whole_rows, to);
    }
  }

  // Zero times what was seen: finite numbers add up to zero, infinity and NaN do not.
  typename Simd<T>::V whole_{};
  typename Quad<T>::V quad_{};
  T single_ = 0;
};

// One panel, `width` columns wide of which `valid` exist, out of any strides.
template <class T>
bool pack_panel(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* dst, int64_t width, int64_t valid) {
  constexpr int64_t kBlock = 64;  // asked for ahead; the block written stays in L1
  for (int64_t k = 0; k < m; ++k)
    for (int64_t j = valid; j < width; ++j) dst[k * width + j] = T(0);
  if (column_stride != 1) {
    T zeros = 0;
    for (int64_t j = 0; j < valid; ++j)
      for (int64_t k = 0; k < m; ++k) zeros += T(0) * (dst[k * width + j] = w[j * row_stride + k * column_stride]);
    return zeros == T(0);
  }
  Transposition<T> transposition;
  for (int64_t k0 = 0; k0 < m; k0 += kBlock) {
    const int64_t k1 = m < k0 + kBlock ? m : k0 + kBlock;
    if (k1 + kBlock <= m)
      for (int64_t j = 0; j < valid; ++j) fetch(w + j * row_stride + k1, kBlock);
    transposition.run(w + k0, row_stride, valid, k1 - k0, dst + k0 * width, width);
  }
  return transposition.finite();
}

template <class T>
bool pack(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* packed, int64_t first, int64_t last) {
  const int64_t L = kLanes<T>, columns = padded<T>(m);
  constexpr int64_t kGroup = 8;  // panels written side by side
  bool finite = true;
  for (int64_t panel = first; panel < last;) {
    const int64_t j0 = panel * 2 * L, whole = row_stride == 1 ? (m - j0) / (2 * L) : 0;
    const int64_t group = whole < kGroup ? whole : kGroup, count = group < last - panel ? group : last - panel;
    if (count > 0) {
      finite = pack_columns<T>(w + j0, column_stride, m, packed + j0 * m, count) && finite;
      panel += count;
      continue;
    }
    const int64_t width = columns - j0 < 2 * L ? L : 2 * L, valid = m - j0 < width ? m - j0 : width;
    finite = pack_panel<T>(w + j0 * row_stride, row_stride, column_stride, m, packed + j0 * m, width, valid) && finite;
    ++panel;
  }
  return finite;
}

}  // namespace
