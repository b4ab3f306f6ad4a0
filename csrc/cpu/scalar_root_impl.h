// The root of the scalar equation that a diagonal element of W leaves, a vector of them at a time, for one instruction set;
// included after kernels_impl.h.
#pragma once
#include <limits>
#include <type_traits>

#include "kernels_impl.h"

namespace {

// Newton alone takes three to five steps, and more only where |d| is large: from then on it takes turns with bisection.
constexpr int kNewtonAlone = 8;
// A bracket that loses half of its numbers at every second step is used up after so many.
template <class T>
constexpr int kMostSteps = kNewtonAlone + 2 * 8 * static_cast<int>(sizeof(T));

template <class T>
constexpr double kEps = sizeof(T) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;

template <class I>
DEQ_INLINE bool all_lanes(I mask) {
  I zero{};
  I missing = ~mask;
  return memcmp(&missing, &zero, sizeof missing) == 0;
}

// The number in the middle between a and b, both finite, by counting the numbers there are: half of the exponents lie below 1.
template <class T>
DEQ_INLINE typename Simd<T>::V middle(typename Simd<T>::V a, typename Simd<T>::V b) {
  using M = VecMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  constexpr int kSign = 8 * sizeof(T) - 1;
  const I magnitude = ~reinterpret_cast<I>(M::set(-0.0));
  const auto ordered = [&](I bits) { return bits ^ ((bits >> kSign) & magnitude); };  // its own inverse
  const I i = ordered(reinterpret_cast<I>(a)), k = ordered(reinterpret_cast<I>(b));
  return reinterpret_cast<V>(ordered((i & k) + ((i ^ k) >> 1)));
}

// z = act(d z + x) and the pre-activation p = d z + x. `inverse` and `other` as in deq::Scalars; the equation has one root.
//
// Smooth activations solve h(p) = p - d act(p) - x = 0 by Newton's method inside a bracket: h' = 1 - d act' is at least `other`,
// so that the root is no farther from p = x than |d act(x)| / other. It ends where h is its own rounding, or where another step
// would be changed by its curvature in less than the rounding of p. That step is still taken, for p and along the tangent for z,
// which is then right to rounding where act(p) is only as good as p (softplus at p = -69 loses 69 ulp). A lane that is done is
// not touched again: its result does not depend on the other lanes.
template <class T, class Act>
DEQ_INLINE typename Simd<T>::V root(typename Simd<T>::V x, typename Simd<T>::V d, typename Simd<T>::V inverse,
                                    typename Simd<T>::V other, typename Simd<T>::V* pre) {
  using M = VecMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  if constexpr (std::is_same_v<Act, deq::Identity<M>>) {
    *pre = x * inverse;
    return *pre;
  } else if constexpr (std::is_same_v<Act, deq::Relu<M>>) {
    const V z = M::positive(x) * inverse;
    *pre = M::select(x > M::set(0.0), z, x);
    return z;
  } else if constexpr (std::is_same_v<Act, deq::LeakyRelu<M>>) {
    const V z = M::select(x > M::set(0.0), x * inverse, x * M::set(0.01) * other);
    *pre = M::select(x > M::set(0.0), z, x * other);
    return z;
  } else {
    constexpr double kLargest = std::numeric_limits<T>::max();
    V p = x, a = Act::value(p), moved = d * a, h = -moved, s, step;
    const V reach = M::abs(h) / other * M::set(1.01);
    V lo = M::select(x - reach > M::set(-kLargest), x - reach, M::set(-kLargest));
    V hi = M::select(x + reach < M::set(kLargest), x + reach, M::set(kLargest));
    const I is_hopeless = ~(M::abs(x) < M::set(INFINITY));
    for (int n = 0;; ++n) {
      if constexpr (Act::kOfValue) {
        s = Act::of_value(a);
      } else {
        s = Act::derivative(p);
      }
      step = h / (M::set(1.0) - d * s);
      const V near = M::select(M::abs(p) < M::set(1.0), M::abs(p), M::set(1.0));
      I done = (M::abs(h) <= M::set(2 * kEps<T>) * (M::abs(p) + M::abs(moved) + M::abs(x))) |
               ((step * step <= M::set(kEps<T> / 4) * near) & (M::abs(step) <= M::set(0.5) * M::abs(p)));
      done = (done & (M::abs(h) < M::set(INFINITY))) | is_hopeless;
      if (n == kMostSteps<T> || all_lanes(done)) break;
      lo = M::select(h < M::set(0.0), p, lo);
      hi = M::select(h > M::set(0.0), p, hi);
      V next = p - step;
      next = M::select((next > lo) & (next < hi), next, M::set(0.5) * lo + M::set(0.5) * hi);
      if (n >= kNewtonAlone && n % 2 == 0) next = middle<T>(lo, hi);
      p = M::select(done, p, next);
      a = M::select(done, a, Act::value(p));  // not a bit of which depends on where it is compiled
      moved = d * a;
      h = M::select(done, h, p - moved - x);  // of the first p = x it has more digits
    }
    const I is_finite = M::abs(step) < M::set(INFINITY);
    *pre = M::select(is_finite, p - step, p);
    return M::select(is_finite, a - s * step, a);
  }
}

}  // namespace
