// The math policy of activations.h for one number, on the host and on the device.
#pragma once
#include <math.h>

#include "activations.h"

namespace deq {

template <class T>
struct ScalarMath;

template <>
struct ScalarMath<float> {
  using V = float;
  static DEQ_HD V set(double x) { return static_cast<V>(x); }
  static DEQ_HD V select(bool mask, V a, V b) { return mask ? a : b; }
  static DEQ_HD V positive(V x) { return x < 0 ? V(0) : x; }
  static DEQ_HD V abs(V x) { return fabsf(x); }
  static DEQ_HD V exp(V x) { return expf(x); }
  static DEQ_HD V expm1(V x) { return expm1f(x); }
  static DEQ_HD V log1p01(V x) { return log1pf(x); }
  static DEQ_HD V tanh(V x) { return tanhf(x); }
  static DEQ_HD V erfc_abs(V x) { return erfcf(fabsf(x)); }
};

template <>
struct ScalarMath<double> {
  using V = double;
  static DEQ_HD V set(double x) { return x; }
  static DEQ_HD V select(bool mask, V a, V b) { return mask ? a : b; }
  static DEQ_HD V positive(V x) { return x < 0 ? V(0) : x; }
  static DEQ_HD V abs(V x) { return fabs(x); }
  static DEQ_HD V exp(V x) { return ::exp(x); }
  static DEQ_HD V expm1(V x) { return ::expm1(x); }
  static DEQ_HD V log1p01(V x) { return log1p(x); }
  static DEQ_HD V tanh(V x) { return ::tanh(x); }
  static DEQ_HD V erfc_abs(V x) { return erfc(fabs(x)); }
};

// work(Activation{}) with the struct of activations.h that `number` names.
template <class M, class Work>
DEQ_HD void with_activation(int32_t number, const Work& work) {
  switch (number) {
    case kRelu:
      return work(Relu<M>{});
    case kLeakyRelu:
      return work(LeakyRelu<M>{});
    case kElu:
      return work(Elu<M>{});
    case kGelu:
      return work(Gelu<M>{});
    case kSilu:
      return work(Silu<M>{});
    case kTanh:
      return work(Tanh<M>{});
    case kSigmoid:
      return work(Sigmoid<M>{});
    case kSoftplus:
      return work(Softplus<M>{});
    default:
      return work(Identity<M>{});
  }
}

// act'(x) from y = act(x) where y determines it.
template <class M>
DEQ_HD typename M::V derivative_of_value(int32_t number, typename M::V y) {
  typename M::V d = M::set(1.0);
  with_activation<M>(number, [&](auto activation) {
    using A = decltype(activation);
    if constexpr (A::kOfValue) d = A::of_value(y);
  });
  return d;
}

}  // namespace deq
