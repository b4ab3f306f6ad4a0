// The scalar equation z = act(d z + x) that a diagonal element of W leaves, for host and device. csrc/cpu/scalar_root_impl.h does
// the same to vectors of samples.
#pragma once
#include <math.h>

#include <type_traits>

#include "scalar_math.h"

namespace deq {

// Range of an activation's derivative: 1 - d act' > 0 everywhere makes the root of z = act(d z + x) unique.
struct Slopes {
  double least, most;
};

DEQ_HD Slopes slopes(int32_t activation) {
  switch (activation) {
    case kIdentity:
      return {1, 1};
    case kLeakyRelu:
      return {0.01, 1};
    case kGelu:
      return {-0.128904145, 1.128904145};
    case kSilu:
      return {-0.09983932, 1.09983932};
    case kSigmoid:
      return {0, 0.25};
    default:
      return {0, 1};
  }
}

// A lower bound of 1 - d act'.
DEQ_HD double least_slope(int32_t activation, double d) {
  const Slopes s = slopes(activation);
  const double a = d * s.least, b = d * s.most;
  return 1 - (a < b ? b : a);
}

// d, and what its roots need of it: 1 / (1 - d), and 1 / (1 - 0.01 d) for leaky relu, else the bound above.
struct ScalarEquation {
  float d, inverse, other;
};

DEQ_HD ScalarEquation scalar_equation(int32_t activation, float d) {
  const float other = activation == kLeakyRelu ? 1 / (1 - 0.01f * d) : static_cast<float>(least_slope(activation, d));
  return {d, 1 / (1 - d), other};
}

// z = act(d z + x) for N values of x; the equation has one root. Closed for the piecewise linear activations; smooth ones solve
// p = d act(p) + x by Newton's method inside a bracket: the derivative 1 - d act' is at least `other`, so that the root is no
// farther from p = x than |d act(x)| / other. One that is done is not touched again, whatever the others do.
template <class A, int N>
DEQ_HD void scalar_roots(const ScalarEquation& of, const float (&x)[N], float (&z)[N]) {
  using M = ScalarMath<float>;
  if constexpr (std::is_same_v<A, Identity<M>>) {
    DEQ_UNROLL for (int i = 0; i < N; ++i) z[i] = x[i] * of.inverse;
  } else if constexpr (std::is_same_v<A, Relu<M>>) {
    DEQ_UNROLL for (int i = 0; i < N; ++i) z[i] = M::positive(x[i]) * of.inverse;
  } else if constexpr (std::is_same_v<A, LeakyRelu<M>>) {
    DEQ_UNROLL for (int i = 0; i < N; ++i) z[i] = x[i] > 0 ? x[i] * of.inverse : x[i] * 0.01f * of.other;
  } else {
    constexpr float kTight = 2 * 1.1920928955078125e-07f;
    constexpr int kMostSteps = 60;  // a bracket halves at worst: bisection alone would be done
    float p[N], h[N], low[N], high[N];
    bool is_busy[N], any_busy = false;
    DEQ_UNROLL for (int i = 0; i < N; ++i) {
      p[i] = x[i], z[i] = A::value(p[i]), h[i] = -of.d * z[i];
      const float reach = fabsf(h[i]) / of.other * 1.01f;
      low[i] = x[i] - reach, high[i] = x[i] + reach;
      is_busy[i] = fabsf(h[i]) > kTight * (fabsf(p[i]) + fabsf(x[i])) && fabsf(h[i]) < INFINITY;
      any_busy |= is_busy[i];
    }
    for (int step = 0; any_busy && step < kMostSteps; ++step) {
      any_busy = false;
      DEQ_UNROLL for (int i = 0; i < N; ++i) {
        if (!is_busy[i]) continue;
        float slope;
        if constexpr (A::kOfValue) {
          slope = 1 - of.d * A::of_value(z[i]);
        } else {
          slope = 1 - of.d * A::derivative(p[i]);
        }
        if (h[i] < 0) low[i] = p[i];
        if (h[i] > 0) high[i] = p[i];
        const float next = p[i] - h[i] / slope;
        p[i] = next > low[i] && next < high[i] ? next : 0.5f * low[i] + 0.5f * high[i];
        z[i] = A::value(p[i]);
        const float moved = of.d * z[i];
        h[i] = p[i] - moved - x[i];
        is_busy[i] = fabsf(h[i]) > kTight * (fabsf(p[i]) + fabsf(moved) + fabsf(x[i])) && fabsf(h[i]) < INFINITY;
        any_busy |= is_busy[i];
      }
    }
  }
}

}  // namespace deq
