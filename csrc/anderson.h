// Anderson's mixing weights for one sample: argmin |sum_i a_i g_i| subject to sum_i a_i = 1.
#pragma once
#include <math.h>

#include "activations.h"

namespace deq {

constexpr int kMaxDepth = 8;
constexpr double kMaxWeight = 1e3;

// gram(i, j) = <g_i, g_j> for j <= i, newest first, of `count` <= N pairs. Normal equations scaled to unit diagonal, so that the
// regulariser is relative to every residual, solved by Cholesky in double. False if the equations cannot be trusted: the caller
// drops the oldest pair. With N known the device unrolls the loops and keeps all of it in registers.
template <int N, class Gram>
DEQ_HD bool anderson_weights(const Gram& gram, int count, double regulariser, double* a) {
  double L[N][N], scale[N];  // L[i][i] holds the inverse of the diagonal
  bool is_definite = true;
  DEQ_UNROLL for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    const double square = gram(i, i);
    if (!(square > 0)) is_definite = false;
    scale[i] = 1 / sqrt(square);
    DEQ_UNROLL for (int j = 0; j <= i; ++j) {
      double sum = gram(i, j) * scale[i] * scale[j] + (i == j ? regulariser : 0.0);
      DEQ_UNROLL for (int k = 0; k < j; ++k) sum -= L[i][k] * L[j][k];
      if (i == j && !(sum > 0)) is_definite = false;
      L[i][j] = i == j ? 1 / sqrt(sum) : sum * L[j][j];
    }
    double sum = scale[i];
    DEQ_UNROLL for (int k = 0; k < i; ++k) sum -= L[i][k] * a[k];
    a[i] = sum * L[i][i];
  }
  if (!is_definite) return false;
  double total = 0;
  DEQ_UNROLL for (int i = N - 1; i >= 0; --i) {
    if (i >= count) continue;
    DEQ_UNROLL for (int k = i + 1; k < N; ++k) if (k < count) a[i] -= L[k][i] * a[k];
    a[i] *= L[i][i];
  }
  DEQ_UNROLL for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    a[i] *= scale[i];
    total += a[i];
  }
  const double inverse = 1 / total;
  double norm1 = 0;
  DEQ_UNROLL for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    a[i] *= inverse;
    norm1 += fabs(a[i]);
  }
  return norm1 < kMaxWeight;  // false for NaN
}

DEQ_HD bool anderson_weights(const double (&gram)[kMaxDepth][kMaxDepth], int count, double regulariser, double* a) {
  return anderson_weights<kMaxDepth>([&](int i, int j) { return gram[i][j]; }, count, regulariser, a);
}

}  // namespace deq
