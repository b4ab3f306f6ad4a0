// The scalar equation z = act(d z + x) that a diagonal element of W leaves, for host and device. csrc/cpu/scalar_root_impl.h does
// the same to vectors of samples.
#pragma once
#include <math.h>
#include <string.h>

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

// The number in the middle between a and b, both finite, by counting the numbers there are: half of the exponents lie below 1.
DEQ_HD int32_t in_order(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }  // its own inverse
DEQ_HD float middle(float a, float b) {
  int32_t i, k;
  memcpy(&i, &a, sizeof i), memcpy(&k, &b, sizeof k);
  i = in_order(i), k = in_order(k);
  const int32_t bits = in_order((i & k) + ((i ^ k) >> 1));
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// One Newton's iteration for p = d act(p) + x, step by step as csrc/cpu/scalar_root_impl.h does it and explains.
template <class A>
struct ScalarRoot {
  static constexpr float kEps = 1.1920928955078125e-07f, kLargest = 3.4028234663852886e38f;
  static constexpr int kNewtonAlone = 8, kMostSteps = kNewtonAlone + 2 * 32;

  float p, a, moved, h, low, high, slope, step;
  bool is_done;

  DEQ_HD void start(const ScalarEquation& of, float x) {
    p = x, a = A::value(p), moved = of.d * a, h = -moved;
    const float reach = fabsf(h) / of.other * 1.01f;
    low = fmaxf(x - reach, -kLargest), high = fminf(x + reach, kLargest);
    judge(of, x);
  }

  // Another step is known; is h its own rounding, or would that step be changed by its curvature in less than p's?
  DEQ_HD void judge(const ScalarEquation& of, float x) {
    if constexpr (A::kOfValue) {
      slope = A::of_value(a);
    } else {
      slope = A::derivative(p);
    }
    step = h / (1 - of.d * slope);
    const bool is_exact = fabsf(h) <= 2 * kEps * (fabsf(p) + fabsf(moved) + fabsf(x));
    const bool is_near = step * step <= 0.25f * kEps * fminf(fabsf(p), 1.0f) && fabsf(step) <= 0.5f * fabsf(p);
    is_done = ((is_exact || is_near) && fabsf(h) < INFINITY) || !(fabsf(x) < INFINITY);
  }

  DEQ_HD void advance(const ScalarEquation& of, float x, int n) {
    if (h < 0) low = p;
    if (h > 0) high = p;
    const float next = p - step;
    p = next > low && next < high ? next : 0.5f * low + 0.5f * high;
    if (n >= kNewtonAlone && n % 2 == 0) p = middle(low, high);
    a = A::value(p);
    moved = of.d * a;
    h = p - moved - x;
    judge(of, x);
  }

  DEQ_HD float value() const { return fabsf(step) < INFINITY ? a - slope * step : a; }
};

// z = act(d z + x) for N values of x; the equation has one root. Closed for the piecewise linear activations; one of the smooth
// ones that is done is not touched again, whatever the others do.
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
    ScalarRoot<A> root[N];
    bool any_busy = false;
    DEQ_UNROLL for (int i = 0; i < N; ++i) root[i].start(of, x[i]), any_busy |= !root[i].is_done;
    for (int n = 0; any_busy && n < ScalarRoot<A>::kMostSteps; ++n) {
      any_busy = false;
      DEQ_UNROLL for (int i = 0; i < N; ++i) {
        if (!root[i].is_done) root[i].advance(of, x[i], n);
        any_busy |= !root[i].is_done;
      }
    }
    DEQ_UNROLL for (int i = 0; i < N; ++i) z[i] = root[i].value();
  }
}

}  // namespace deq
