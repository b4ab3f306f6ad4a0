// The root of the scalar equation that a diagonal element of W leaves, a vector of them at a time, for one instruction set;
// included after kernels_impl.h.
#pragma once
#include <type_traits>

#include "kernels_impl.h"

namespace {

constexpr int kMaxNewton = 60;  // a bracket halves at worst: bisection alone would be done

template <class T>
constexpr double kEps = sizeof(T) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;

template <class I>
DEQ_INLINE bool all_lanes(I mask) {
  I zero{};
  I missing = ~mask;
  return memcmp(&missing, &zero, sizeof missing) == 0;
}

// z = act(d z + x) and the pre-activation p = d z + x. `inverse` and `other` as in deq::Scalars; the equation has one root.
//
// Smooth activations solve p = d act(p) + x by Newton's method inside a bracket: the derivative 1 - d act' is at least `other`,
// so that the root is no farther from p = x than |d act(x)| / other. A lane that is done is not touched again: its result does
// not depend on the other lanes.
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
    V p = x, a = Act::value(p), h = -d * a;
    const V reach = M::abs(h) / other * M::set(1.01);
    V lo = x - reach, hi = x + reach;
    const V tight = M::set(2 * kEps<T>);
    I done = M::abs(h) <= tight * (M::abs(p) + M::abs(x));
    for (int n = 0; n < kMaxNewton && !all_lanes(done); ++n) {
      V slope;
      if constexpr (Act::kOfValue) {
        slope = M::set(1.0) - d * Act::of_value(a);
      } else {
        slope = M::set(1.0) - d * Act::derivative(p);
      }
      lo = M::select(h < M::set(0.0), p, lo);
      hi = M::select(h > M::set(0.0), p, hi);
      V next = p - h / slope;
      next = M::select((next > lo) & (next < hi), next, M::set(0.5) * lo + M::set(0.5) * hi);
      p = M::select(done, p, next);
      a = Act::value(p);
      h = p - d * a - x;
      done |= (M::abs(h) <= tight * (M::abs(p) + M::abs(d * a) + M::abs(x))) | ~(M::abs(h) < M::set(INFINITY));
    }
    *pre = p;
    return a;
  }
}

}  // namespace
