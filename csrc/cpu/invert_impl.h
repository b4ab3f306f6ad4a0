// The inverse of a small matrix for one instruction set: the diagonal blocks of a recursive inverse.
#pragma once
#include "vec.h"

namespace {

// row[j] -= sum_t factor[t] pivots[t * n + j], 0 <= j < n: a row is read and written once for P pivots.
template <int P>
DEQ_INLINE void subtract_multiples(double* row, const double (&factor)[P], const double* pivots, int64_t n) {
  using M = VecMath<double>;
  int64_t j = 0;
  for (; j + kLanes<double> <= n; j += kLanes<double>) {
    M::V sum = M::load(row + j);
#pragma GCC unroll 8
    for (int t = 0; t < P; ++t) sum -= factor[t] * M::load(pivots + t * n + j);
    M::store(row + j, sum);
  }
  for (; j < n; ++j)
    for (int t = 0; t < P; ++t) row[j] -= factor[t] * pivots[t * n + j];
}

// One step of the elimination for the P columns from k: the pivot rows are eliminated among themselves, then from all others.
template <int P>
void eliminate(double* work, int64_t n, int64_t k) {
  double* pivots = work + k * n;
  for (int p = 0; p < P; ++p) {
    double* row = pivots + p * n;
    const double inverse = 1 / row[k + p];
    row[k + p] = 1;
    for (int64_t j = 0; j < n; ++j) row[j] *= inverse;
    for (int t = 0; t < P; ++t) {
      if (t == p) continue;
      const double factor[1] = {pivots[t * n + k + p]};
      pivots[t * n + k + p] = 0;
      subtract_multiples<1>(pivots + t * n, factor, row, n);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (i >= k && i < k + P) continue;
    double* row = work + i * n;
    double factor[P];
    for (int t = 0; t < P; ++t) {
      factor[t] = row[k + t];
      row[k + t] = 0;
    }
    subtract_multiples<P>(row, factor, pivots, n);
  }
}

// Gauss and Jordan's elimination without pivoting: columns of the identity take the place of those that a step makes such. In
// double: in float its error is twice that of a pivoted LU, and it would be the error of the whole inverse. A pivot of zero ends
// in numbers that are not finite. 64 x 64 on Zen 4: 28 us, one column at a time 54.
template <class T>
void invert(T* a, int64_t stride, int64_t n, double* work) {
  constexpr int kTogether = 4;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) work[i * n + j] = static_cast<double>(a[i * stride + j]);
  int64_t k = 0;
  for (; k + kTogether <= n; k += kTogether) eliminate<kTogether>(work, n, k);
  for (; k < n; ++k) eliminate<1>(work, n, k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) a[i * stride + j] = static_cast<T>(work[i * n + j]);
}

}  // namespace
