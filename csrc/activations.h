// The activations of z = act(W z + c), written once for every vector width and for the device.
//
// `M` is a math policy: M::V is the value type (a SIMD vector or a scalar) and M has set, select, positive, abs, exp, expm1,
// log1p01, tanh and erfc_abs. One struct per row of deq/activations.py; tests/test_activations.py holds the two languages
// together.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define DEQ_HD __host__ __device__ __forceinline__
#define DEQ_UNROLL _Pragma("unroll")
#else
#define DEQ_UNROLL
#define DEQ_HD inline __attribute__((always_inline))
#endif

namespace deq {

enum ActivationNumber : int32_t {
  kIdentity = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kElu = 3,
  kGelu = 4,
  kSilu = 5,
  kTanh = 6,
  kSigmoid = 7,
  kSoftplus = 8,
  kActivations = 9,
};

// act(a x) = a act(x) for every a > 0: such a problem may be rescaled by any power of two without changing a bit of its path.
DEQ_HD bool is_homogeneous(int32_t number) { return number <= kLeakyRelu; }

// kOfValue of the structs below, for code that knows only the number.
DEQ_HD bool has_of_value(int32_t number) { return number != kGelu && number != kSilu; }

// of_value(y) is the derivative at x from y = value(x); kOfValue is false where y does not determine it.
template <class M>
struct Identity {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return x; }
  static DEQ_HD V derivative(V x) { return of_value(x); }
  static DEQ_HD V of_value(V) { return M::set(1.0); }
};

template <class M>
struct Relu {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return M::positive(x); }
  static DEQ_HD V derivative(V x) { return of_value(x); }
  static DEQ_HD V of_value(V y) { return M::select(y > M::set(0.0), M::set(1.0), M::set(0.0)); }
};

template <class M>
struct LeakyRelu {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return M::select(x > M::set(0.0), x, x * M::set(0.01)); }
  static DEQ_HD V derivative(V x) { return of_value(x); }
  static DEQ_HD V of_value(V y) { return M::select(y > M::set(0.0), M::set(1.0), M::set(0.01)); }
};

template <class M>
struct Elu {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return M::select(x > M::set(0.0), x, M::expm1(x)); }
  static DEQ_HD V derivative(V x) { return M::select(x > M::set(0.0), M::set(1.0), M::exp(x)); }
  static DEQ_HD V of_value(V y) { return M::select(y > M::set(0.0), M::set(1.0), y + M::set(1.0)); }
};

template <class M>
struct Gelu {
  using V = typename M::V;
  static constexpr bool kOfValue = false;
  // By erfc of |x|: 1 + erf(x) would lose every digit on the negative side.
  static DEQ_HD V cdf(V x) {
    V tail = M::set(0.5) * M::erfc_abs(x * M::set(0.70710678118654752440));
    return M::select(x > M::set(0.0), M::set(1.0) - tail, tail);
  }
  static DEQ_HD V value(V x) { return x * cdf(x); }
  static DEQ_HD V derivative(V x) { return cdf(x) + x * M::exp(M::set(-0.5) * x * x) * M::set(0.39894228040143267794); }
};

template <class M>
struct Sigmoid {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  // 1 / (1 + exp(-|x|)) and its complement: no overflow on either side.
  static DEQ_HD V value(V x) {
    V e = M::exp(-M::abs(x));
    return M::select(x > M::set(0.0), M::set(1.0), e) / (M::set(1.0) + e);
  }
  static DEQ_HD V derivative(V x) { return of_value(value(x)); }
  static DEQ_HD V of_value(V y) { return y * (M::set(1.0) - y); }
};

template <class M>
struct Silu {
  using V = typename M::V;
  static constexpr bool kOfValue = false;
  static DEQ_HD V value(V x) { return x * Sigmoid<M>::value(x); }
  static DEQ_HD V derivative(V x) {
    V s = Sigmoid<M>::value(x);
    return s * (M::set(1.0) + x * (M::set(1.0) - s));
  }
};

template <class M>
struct Tanh {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return M::tanh(x); }
  static DEQ_HD V derivative(V x) { return of_value(value(x)); }
  static DEQ_HD V of_value(V y) { return M::set(1.0) - y * y; }
};

template <class M>
struct Softplus {
  using V = typename M::V;
  static constexpr bool kOfValue = true;
  static DEQ_HD V value(V x) { return M::positive(x) + M::log1p01(M::exp(-M::abs(x))); }
  static DEQ_HD V derivative(V x) { return Sigmoid<M>::value(x); }
  static DEQ_HD V of_value(V y) { return -M::expm1(-y); }
};

}  // namespace deq
