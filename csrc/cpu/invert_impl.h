// The inverse of a small matrix for one instruction set: the diagonal blocks of a recursive inverse.
#pragma once
#include "vec.h"

namespace {

// a[j] -= factor * b[j], 0 <= j < n.
DEQ_INLINE void subtract_multiple(double* a, const double* b, double factor, int64_t n) {
  using M = VecMath<double>;
  const M::V f = factor - M::V{};
  int64_t j = 0;
  for (; j + kLanes<double> <= n; j += kLanes<double>) M::store(a + j, M::load(a + j) - f * M::load(b + j));
  for (; j < n; ++j) a[j] -= factor * b[j];
}

// Gauss and Jordan's elimination without pivoting: column k of the identity takes the place of the column that step k makes one.
// In double: in float its error is twice that of a pivoted LU, and it would be the error of the whole inverse. A pivot of zero
// ends in numbers that are not finite.
template <class T>
void invert(T* a, int64_t stride, int64_t n, double* work) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) work[i * n + j] = static_cast<double>(a[i * stride + j]);
  for (int64_t k = 0; k < n; ++k) {
    double* pivot_row = work + k * n;
    const double inverse = 1 / pivot_row[k];
    pivot_row[k] = 1;
    for (int64_t j = 0; j < n; ++j) pivot_row[j] *= inverse;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      double* row = work + i * n;
      const double factor = row[k];
      row[k] = 0;
      subtract_multiple(row, pivot_row, factor, n);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) a[i * stride + j] = static_cast<T>(work[i * n + j]);
}

}  // namespace
