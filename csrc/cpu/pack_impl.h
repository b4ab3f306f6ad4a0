// Weights into panels for one instruction set: a matrix row by row becomes, for every panel of two vectors of outputs, the runs
// that a register tile reads one after the other.
#pragma once
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "ahead.h"
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
#if DEQ_VECTOR_BYTES == 64
    if constexpr (kBytes == 64 && sizeof(T) == 4) return transpose_quarters(src, from, dst, to, zeros);
#endif
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
#if DEQ_VECTOR_BYTES == 64
  // The loads bring quarters of rows to their place, which leaves half of the shuffles: 6 microseconds for 10 at 256 x 256. Four
  // rows at a time are read to their end: the lines of sixteen may share one set of the L1 cache, which holds eight.
  DEQ_INLINE void transpose_quarters(const T* src, int64_t from, T* dst, int64_t to, V& zeros) {
    constexpr __mmask16 kAll = 0xFFFF;  // masked: of the plain forms GCC 12 warns that they read what is not set
    __m512 rows[4][4];                  // [i][q]: columns 4 q to 4 q + 3 of the rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const T* at = src + i * from + 4 * q;
        __m512 row = _mm512_castps128_ps512(_mm_loadu_ps(at));
        row = _mm512_maskz_insertf32x4(kAll, row, _mm_loadu_ps(at + 4 * from), 1);
        row = _mm512_maskz_insertf32x4(kAll, row, _mm_loadu_ps(at + 8 * from), 2);
        rows[i][q] = _mm512_maskz_insertf32x4(kAll, row, _mm_loadu_ps(at + 12 * from), 3);
      }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512d low01 = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, rows[0][q], rows[1][q])),
                    high01 = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(kAll, rows[0][q], rows[1][q])),
                    low23 = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, rows[2][q], rows[3][q])),
                    high23 = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(kAll, rows[2][q], rows[3][q]));
      const V columns[4] = {reinterpret_cast<V>(_mm512_maskz_unpacklo_pd(0xFF, low01, low23)),
                            reinterpret_cast<V>(_mm512_maskz_unpackhi_pd(0xFF, low01, low23)),
                            reinterpret_cast<V>(_mm512_maskz_unpacklo_pd(0xFF, high01, high23)),
                            reinterpret_cast<V>(_mm512_maskz_unpackhi_pd(0xFF, high01, high23))};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        memcpy(dst + (4 * q + i) * to, &columns[i], sizeof(V));
        zeros += columns[i] * T(0);
      }
    }
  }
#endif

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

// One panel, `width` columns wide, out of any strides; `left` rows of W are left from its first one on. A W of 1024 x 1024 in the
// L3 cache takes 160 microseconds, where a block asked for the next block's lines of all rows 400.
template <class T>
bool pack_panel(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* dst, int64_t width, int64_t left) {
  constexpr int64_t kBlock = 64;  // what is written stays in L1
  const int64_t valid = left < width ? left : width;
  for (int64_t k = 0; k < m; ++k)
    for (int64_t j = valid; j < width; ++j) dst[k * width + j] = T(0);
  if (column_stride != 1) {
    T zeros = 0;
    for (int64_t j = 0; j < valid; ++j)
      for (int64_t k = 0; k < m; ++k) zeros += T(0) * (dst[k * width + j] = w[j * row_stride + k * column_stride]);
    return zeros == T(0);
  }
  Transposition<T> transposition;
  Ahead<T> ahead(w + valid * row_stride, m, row_stride, left - valid < width ? left - valid : width);
  for (int64_t k0 = 0; k0 < m; k0 += kBlock) {
    const int64_t k1 = m < k0 + kBlock ? m : k0 + kBlock;
    for (int64_t lines = 0; lines < valid * kBlock * static_cast<int64_t>(sizeof(T)) / 64; lines += 4) ahead.template ask<4>();
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
    const int64_t width = columns - j0 < 2 * L ? L : 2 * L;
    finite = pack_panel<T>(w + j0 * row_stride, row_stride, column_stride, m, packed + j0 * m, width, m - j0) && finite;
    ++panel;
  }
  return finite;
}

}  // namespace
