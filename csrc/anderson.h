// Anderson's mixing weights for one sample: argmin |sum_i a_i g_i| subject to sum_i a_i = 1.
#pragma once
#include <math.h>

#include "activations.h"

namespace deq {

constexpr int kMaxDepth = 8;
constexpr double kMaxWeight = 1e3;

// gram(i, j) = <g_i, g_j> for j <= i, newest first, of `count` <= N pairs. Solves (gram + regulariser diag(gram)) a = 1, in which
// the regulariser is relative to every residual, by L D L^T in double and scales a to the sum 1. False if the equations cannot be
// trusted: the caller drops the oldest pair. With N known the device unrolls the loops and keeps all of it in registers. The lane
// engine does the same to several samples at once (cpu/lanes_impl.h).
template <int N, class Gram>
DEQ_HD bool anderson_weights(const Gram& gram, int count, double regulariser, double* a) {
  double L[N][N], inverse[N];  // L below its unit diagonal, and 1 / D
  bool is_definite = true;
  DEQ_UNROLL for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    double pivot = gram(i, i), y = 1;
    if (!(pivot > 0)) is_definite = false;
    pivot += regulariser * pivot;
    double scaled[N];  // L[i][j] D[j]
    DEQ_UNROLL for (int j = 0; j < i; ++j) {
      scaled[j] = gram(i, j);
      DEQ_UNROLL for (int k = 0; k < j; ++k) scaled[j] -= scaled[k] * L[j][k];
    }
    DEQ_UNROLL for (int j = 0; j < i; ++j) {
      L[i][j] = scaled[j] * inverse[j];
      pivot -= scaled[j] * L[i][j];
      y -= L[i][j] * a[j];
    }
    if (!(pivot > 0)) is_definite = false;
    inverse[i] = 1 / pivot;
    a[i] = y;
  }
  if (!is_definite) return false;
  double total = 0;
  DEQ_UNROLL for (int i = N - 1; i >= 0; --i) {
    if (i >= count) continue;
    a[i] *= inverse[i];
    DEQ_UNROLL for (int k = i + 1; k < N; ++k) if (k < count) a[i] -= L[k][i] * a[k];
    total += a[i];
  }
  const double scale = 1 / total;
  double norm1 = 0;
  DEQ_UNROLL for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    a[i] *= scale;
    norm1 += fabs(a[i]);
  }
  return norm1 < kMaxWeight;  // false for NaN
}

DEQ_HD bool anderson_weights(const double (&gram)[kMaxDepth][kMaxDepth], int count, double regulariser, double* a) {
  return anderson_weights<kMaxDepth>([&](int i, int j) { return gram[i][j]; }, count, regulariser, a);
}

// The pairs worth holding of a sample that is seen to be slow, from its last two residuals: `dot` of them, the squares of the
// new and the old one. Where they are nearly orthogonal and shrink, the spectrum is a disc without slow modes of its own, and
// three pairs save what five do (evaluations to 1e-5 with 3 / 5 pairs, m = 256: radius1.0 31 / 31, orthogonal0.99 29 / 28, but
// outlier0.95 63 / 46, and monotone1.0, which grows, 104 / 51).
constexpr int kShallowDepth = 3;
DEQ_HD int useful_depth(double dot, double new2, double old2, int most) {
  const bool is_disc = new2 < old2 && 4 * dot * dot < new2 * old2;
  return is_disc && most > kShallowDepth ? kShallowDepth : most;
}

}  // namespace deq
