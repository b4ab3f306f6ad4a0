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

template <class T>
bool pack(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* packed, int64_t first, int64_t last) {
  const int64_t L = kLanes<T>, columns = padded<T>(m);
  constexpr int64_t kBlock = 64;  // rows of W are read in runs of a few cache lines; the block written stays in L1
  bool finite = true;
  for (int64_t k0 = 0; k0 < m; k0 += kBlock) {
    const int64_t k1 = m < k0 + kBlock ? m : k0 + kBlock;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j0 = panel * 2 * L, width = columns - j0 < 2 * L ? L : 2 * L, valid = m - j0 < width ? m - j0 : width;
      T* dst = packed + j0 * m;
      if (row_stride == 1 && valid == width) {
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t j = 0; j < width; j += L)
            VecMath<T>::store(dst + k * width + j, VecMath<T>::load(w + j0 + j + k * column_stride));
      } else {
        constexpr int64_t Q = Quad<T>::kSide;
        const int64_t whole_j = column_stride == 1 ? valid / Q * Q : 0, whole_k = k0 + (k1 - k0) / Q * Q;
        for (int64_t j = 0; j < whole_j; j += Q) {
          const T* row = w + (j0 + j) * row_stride;
          for (int64_t k = k0; k < whole_k; k += Q) Quad<T>::transpose(row + k, row_stride, dst + k * width + j, width);
        }
        for (int64_t j = 0; j < valid; ++j)
          for (int64_t k = j < whole_j ? whole_k : k0; k < k1; ++k)
            dst[k * width + j] = w[(j0 + j) * row_stride + k * column_stride];
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t j = valid; j < width; ++j) dst[k * width + j] = T(0);
      }
      finite = finite && all_finite<T>(dst + k0 * width, (k1 - k0) * width);
    }
  }
  return finite;
}

}  // namespace
