// Anderson's mixing weights for one sample: argmin |sum_i a_i g_i| subject to sum_i a_i = 1.
#pragma once
#include <math.h>

#include "activations.h"

namespace deq {

constexpr int kMaxDepth = 8;
constexpr double kMaxWeight = 1e3;

// gram[i][j] = <g_i, g_j>, newest first. Normal equations scaled to unit diagonal, so that the regulariser is relative to
// every residual, solved by Cholesky in double. False if the equations cannot be trusted: the caller drops the oldest pair.
DEQ_HD bool anderson_weights(const double (&gram)[kMaxDepth][kMaxDepth], int count, double regulariser, double* a) {
  double L[kMaxDepth][kMaxDepth], scale[kMaxDepth];
  for (int i = 0; i < count; ++i) {
    if (!(gram[i][i] > 0)) return false;
    scale[i] = 1 / sqrt(gram[i][i]);
  }
  for (int i = 0; i < count; ++i)
    for (int j = 0; j <= i; ++j) {
      double sum = gram[i][j] * scale[i] * scale[j] + (i == j ? regulariser : 0.0);
      for (int k = 0; k < j; ++k) sum -= L[i][k] * L[j][k];
      if (i == j) {
        if (!(sum > 0)) return false;
        L[i][i] = sqrt(sum);
      } else {
        L[i][j] = sum / L[j][j];
      }
    }
  for (int i = 0; i < count; ++i) {
    double sum = scale[i];
    for (int k = 0; k < i; ++k) sum -= L[i][k] * a[k];
    a[i] = sum / L[i][i];
  }
  double total = 0;
  for (int i = count - 1; i >= 0; --i) {
    for (int k = i + 1; k < count; ++k) a[i] -= L[k][i] * a[k];
    a[i] /= L[i][i];
  }
  for (int i = 0; i < count; ++i) {
    a[i] *= scale[i];
    total += a[i];
  }
  double norm1 = 0;
  for (int i = 0; i < count; ++i) {
    a[i] /= total;
    norm1 += fabs(a[i]);
  }
  return norm1 < kMaxWeight;  // false for NaN
}

}  // namespace deq
