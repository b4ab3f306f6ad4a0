// Weights into panels for one instruction set: a matrix row by row becomes, for every panel of two vectors of outputs, the runs
// that a register tile reads one after the other.
#pragma once
#include <stdint.h>
#include <string.h>

#include "vec.h"

namespace {

// Finite numbers times zero add up to zero; infinity and NaN do not.
template <class T>
DEQ_INLINE bool all_finite(const T* x, int64_t n) {
  using M = VecMath<T>;
  typename M::V sum{};
  for (int64_t j = 0; j < n; j += kLanes<T>) sum += M::load(x + j) * M::set(0.0);
  return LaneSum<T, DEQ_VECTOR_BYTES>::of(sum) == T(0);
}

// A square of 16-byte vectors, transposed in registers.
template <class T>
struct Quad;
template <>
struct Quad<float> {
  static constexpr int64_t kSide = 4;
  DEQ_INLINE void transpose(const float* src, int64_t from, float* dst, int64_t to) {
    typedef float V __attribute__((vector_size(16)));
    V r[4];
    for (int i = 0; i < 4; ++i) memcpy(&r[i], src + i * from, 16);
    const V a = DEQ_SHUFFLE(int32_t, r[0], r[1], 0, 4, 1, 5), b = DEQ_SHUFFLE(int32_t, r[2], r[3], 0, 4, 1, 5);
    const V c = DEQ_SHUFFLE(int32_t, r[0], r[1], 2, 6, 3, 7), d = DEQ_SHUFFLE(int32_t, r[2], r[3], 2, 6, 3, 7);
    r[0] = DEQ_SHUFFLE(int32_t, a, b, 0, 1, 4, 5);
    r[1] = DEQ_SHUFFLE(int32_t, a, b, 2, 3, 6, 7);
    r[2] = DEQ_SHUFFLE(int32_t, c, d, 0, 1, 4, 5);
    r[3] = DEQ_SHUFFLE(int32_t, c, d, 2, 3, 6, 7);
    for (int i = 0; i < 4; ++i) memcpy(dst + i * to, &r[i], 16);
  }
};
template <>
struct Quad<double> {
  static constexpr int64_t kSide = 2;
  DEQ_INLINE void transpose(const double* src, int64_t from, double* dst, int64_t to) {
    typedef double V __attribute__((vector_size(16)));
    V a, b;
    memcpy(&a, src, 16);
    memcpy(&b, src + from, 16);
    const V lo = DEQ_SHUFFLE(int64_t, a, b, 0, 2), hi = DEQ_SHUFFLE(int64_t, a, b, 1, 3);
    memcpy(dst, &lo, 16);
    memcpy(dst + to, &hi, 16);
  }
};

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

// One panel, `width` columns wide of which `valid` exist, out of any strides.
template <class T>
bool pack_panel(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* dst, int64_t width, int64_t valid) {
  constexpr int64_t kBlock = 64, Q = Quad<T>::kSide;  // the block written stays in L1
  const int64_t whole_j = column_stride == 1 ? valid / Q * Q : 0;
  bool finite = true;
  for (int64_t k0 = 0; k0 < m; k0 += kBlock) {
    const int64_t k1 = m < k0 + kBlock ? m : k0 + kBlock, whole_k = k0 + (k1 - k0) / Q * Q;
    for (int64_t j = 0; j < whole_j; j += Q) {
      const T* row = w + j * row_stride;
      if (k1 + kBlock <= m)
        for (int64_t i = 0; i < Q; ++i) fetch(row + i * row_stride + k1, kBlock);
      for (int64_t k = k0; k < whole_k; k += Q) Quad<T>::transpose(row + k, row_stride, dst + k * width + j, width);
    }
    for (int64_t j = 0; j < valid; ++j)
      for (int64_t k = j < whole_j ? whole_k : k0; k < k1; ++k) dst[k * width + j] = w[j * row_stride + k * column_stride];
    for (int64_t k = k0; k < k1; ++k)
      for (int64_t j = valid; j < width; ++j) dst[k * width + j] = T(0);
    finite = finite && all_finite<T>(dst + k0 * width, (k1 - k0) * width);
  }
  return finite;
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
