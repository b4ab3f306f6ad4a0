// SIMD vectors and their elementary functions, for the instruction set that the including file is compiled for.
//
// GCC/Clang vector extensions: one source serves AVX-512, AVX2, SSE2 and NEON, and reaches the same share of the FMA peak as
// hand-written intrinsics (109 of 118 GFLOP/s each, 8 x 32 tile, Zen 4). Everything here has internal linkage, because the
// same inline function compiled for two instruction sets must never be merged by the linker.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef DEQ_VECTOR_BYTES
#error "define DEQ_VECTOR_BYTES before including vec.h"
#endif
#if DEQ_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace {

#define DEQ_INLINE static inline __attribute__((always_inline))

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127, kExpTerms = 7, kLogTerms = 9, kErfTerms = 13;
  static constexpr double kRound = 12582912.0;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr double kLn2Hi = 0.693359375;  // ln 2 in two parts, the first exact in 10 bits
  static constexpr double kLn2Lo = -2.12194440e-4;
  static constexpr double kExpMin = -87.0, kExpMax = 88.0;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023, kExpTerms = 13, kLogTerms = 18, kErfTerms = 24;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -708.0, kExpMax = 709.0;
};

// 1 / n!, and the Chebyshev series on w = (x - 3.75) / (x + 3.75) of (1 + 2 x) exp(x^2) erfc(x), x >= 0 (60-digit fit).
constexpr double kInvFactorial[] = {
    1.0,         1.0,          1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,          1.0 / 720,          1.0 / 5040,
    1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0, 1.0 / 87178291200.0};
constexpr double kErfc[] = {
    1.1775789345674017541,       -0.0045900545806464773309,  -0.084249133366517915584,   0.059209939998191890498,
    -0.026658668435305752277,    0.0090749976707052650939,   -0.0024131635404176081909,  0.00049077583652580863229,
    -0.000069169733025012063671, 4.1390279860730101675e-6,   7.7403830661984906686e-7,   -2.1886401049234395661e-7,
    1.0764999465670910377e-8,    4.5219598112182868979e-9,   -7.7544002088313511065e-10, -6.3180883408866844944e-11,
    2.8687950109306698981e-11,   1.945586854577734723e-13,   -9.6546967484334389059e-13, 3.2525481481487398415e-14,
    3.3478119482868053878e-14,   -1.8645628804193131015e-15, -1.2507950530688647085e-15, 7.418235256624043463e-17};

// The math policy of csrc/activations.h. Errors are a few ulp of max(|result|, 1); measured in tests/cpp/test_math.cpp.
template <class T>
struct VecMath {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr int kLanes = DEQ_VECTOR_BYTES / sizeof(T);

  DEQ_INLINE V set(double x) { return static_cast<T>(x) - V{}; }  // x - 0 keeps the sign of -0
  DEQ_INLINE V select(I mask, V a, V b) { return mask ? a : b; }
  DEQ_INLINE V positive(V x) { return select(set(0.0) > x, set(0.0), x); }  // NaN stays NaN: a sum that overflowed is no zero
  DEQ_INLINE V abs(V x) { return reinterpret_cast<V>(reinterpret_cast<I>(x) & ~reinterpret_cast<I>(set(-0.0))); }
  DEQ_INLINE V load(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  DEQ_INLINE void store(T* p, V v) { memcpy(p, &v, sizeof v); }
  // To whole vectors, past the caches where there is an instruction for it. fence() before another thread may read them.
  DEQ_INLINE void stream(T* p, V v) {
#if DEQ_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif DEQ_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
    store(p, v);
#endif
  }
  DEQ_INLINE void fence() {
#if DEQ_VECTOR_BYTES > 16
    _mm_sfence();
#endif
  }

  // x = n ln 2 + r with |r| <= ln 2 / 2; returns expm1(r) and 2^n. kBelow: x is known to be at most kExpMax.
  template <bool kBelow = false>
  DEQ_INLINE V expm1_reduced(V x, V* scale) {
    x = select(x < set(S::kExpMin), set(S::kExpMin), x);
    if constexpr (!kBelow) x = select(x > set(S::kExpMax), set(S::kExpMax), x);
    V shifted = x * set(1.44269504088896340736) + set(S::kRound);
    V n = shifted - set(S::kRound);
    V r = (x - n * set(S::kLn2Hi)) - n * set(S::kLn2Lo);
    V p = set(kInvFactorial[S::kExpTerms]);
    for (int i = S::kExpTerms - 1; i >= 1; --i) p = p * r + set(kInvFactorial[i]);
    // The integer n sits in the low bits of `shifted`, above them the bits of kRound itself.
    I bits = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(set(S::kRound));
    *scale = reinterpret_cast<V>((bits + S::kBias) << S::kMantissa);
    return p * r;
  }
  DEQ_INLINE V exp(V x) {
    V scale, p = expm1_reduced(x, &scale);
    return select(x < set(S::kExpMin), set(0.0), p * scale + scale);
  }
  DEQ_INLINE V expm1(V x) {
    V scale, p = expm1_reduced(x, &scale);
    return p * scale + (scale - set(1.0));
  }
  // With e = exp(-2 |x|), (1 - e) / (1 + e) where it is small, else 1 - 2 e / (1 + e): within 1.0 units of 2^-24 for |x| > 1 and
  // 1.4 anywhere, where the first form alone loses 2.5, and 1 - tanh^2 near 1 many times of that.
  DEQ_INLINE V tanh(V x) {
    V scale, p = expm1_reduced<true>(set(-2.0) * abs(x), &scale);
    V e = p * scale + scale, minus = (set(1.0) - scale) - p * scale;  // 1 - e
    I is_large = e < set(0.5);
    V q = select(is_large, e + e, minus) / (e + set(1.0));
    q = select(is_large, set(1.0) - q, q);
    return reinterpret_cast<V>(reinterpret_cast<I>(q) | (reinterpret_cast<I>(x) & reinterpret_cast<I>(set(-0.0))));
  }
  // log(1 + x) for 0 <= x <= 1: 2 atanh(s), s = x / (2 + x) <= 1/3.
  DEQ_INLINE V log1p01(V x) {
    V s = x / (x + set(2.0)), s2 = s * s, p = set(1.0 / (2 * S::kLogTerms + 1));
    for (int i = S::kLogTerms - 1; i >= 0; --i) p = p * s2 + set(1.0 / (2 * i + 1));
    return set(2.0) * s * p;
  }
  // erfc(|x|)
  DEQ_INLINE V erfc_abs(V x) {
    V a = abs(x);
    a = select(a > set(30.0), set(30.0), a);  // 0 long before; keeps a * a finite
    V w2 = set(2.0) * (a - set(3.75)) / (a + set(3.75));
    V b1 = set(0.0), b2 = set(0.0);
    for (int i = S::kErfTerms - 1; i >= 1; --i) {  // Clenshaw
      V b = w2 * b1 - b2 + set(kErfc[i]);
      b2 = b1;
      b1 = b;
    }
    V series = set(0.5) * w2 * b1 - b2 + set(kErfc[0]);
    return exp(-a * a) * series / (set(1.0) + set(2.0) * a);
  }
};

template <class T, int kBytes>
struct Halves {
  typedef T V __attribute__((vector_size(kBytes)));
  typedef T H __attribute__((vector_size(kBytes / 2)));
  H low, high;
  // In registers where the instruction set has a name for it: GCC takes the copies through memory, at twice the time.
  inline __attribute__((always_inline)) explicit Halves(const V& v) {
#if DEQ_VECTOR_BYTES == 64
    if constexpr (kBytes == 64) {  // masked: of the plain form GCC 12 warns that it reads nothing that is set
      low = reinterpret_cast<H>(_mm512_maskz_extractf64x4_pd(0xFF, reinterpret_cast<__m512d>(v), 0));
      high = reinterpret_cast<H>(_mm512_maskz_extractf64x4_pd(0xFF, reinterpret_cast<__m512d>(v), 1));
      return;
    }
#endif
#if DEQ_VECTOR_BYTES >= 32
    if constexpr (kBytes == 32) {
      low = reinterpret_cast<H>(_mm256_castpd256_pd128(reinterpret_cast<__m256d>(v)));
      high = reinterpret_cast<H>(_mm256_extractf128_pd(reinterpret_cast<__m256d>(v), 1));
      return;
    }
#endif
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  }
};

// Sum of the lanes by halving, in a fixed order.
template <class T, int kBytes>
struct LaneSum {
  DEQ_INLINE T of(const typename Halves<T, kBytes>::V& v) {
    const Halves<T, kBytes> half(v);
    return LaneSum<T, kBytes / 2>::of(half.low + half.high);
  }
};
template <class T>
struct LaneSum<T, 16> {
  typedef T V __attribute__((vector_size(16)));
  DEQ_INLINE T of(const V& v) {
    T sum = 0;
    if constexpr (sizeof(T) == 4) {
      sum = (v[0] + v[2]) + (v[1] + v[3]);
    } else {
      sum = v[0] + v[1];
    }
    return sum;
  }
};
template <class T>
DEQ_INLINE double lane_sum(const typename Simd<T>::V& v) {
  return static_cast<double>(LaneSum<T, DEQ_VECTOR_BYTES>::of(v));
}

// Largest lane of integers E by halving.
template <class E, int kBytes>
struct LaneMax {
  DEQ_INLINE E of(const typename Halves<E, kBytes>::V& v) {
    const Halves<E, kBytes> half(v);
    return LaneMax<E, kBytes / 2>::of(half.low > half.high ? half.low : half.high);
  }
};
template <class E>
struct LaneMax<E, 16> {
  typedef E V __attribute__((vector_size(16)));
  DEQ_INLINE E of(const V& v) {
    E most = v[0];
    for (int i = 1; i < static_cast<int>(16 / sizeof(E)); ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
};

template <class T>
constexpr int kLanes = VecMath<T>::kLanes;

// One bit a lane: is it other than zero?
template <class T>
DEQ_INLINE uint64_t nonzero_lanes(const typename Simd<T>::V& v) {
#if DEQ_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_NEQ_UQ);
  else
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_setzero_pd(), _CMP_NEQ_UQ);
#elif DEQ_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  else
    return static_cast<unsigned>(
        _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(v), _mm256_setzero_pd(), _CMP_NEQ_UQ)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint64_t>(v[i] != 0) << i;
  return bits;
#endif
}

// The first n lanes from p on, the others zero; reads nothing behind them.
template <class T>
DEQ_INLINE typename Simd<T>::V load_first(const T* p, int64_t n) {
  using V = typename Simd<T>::V;
#if DEQ_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<V>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  else
    return reinterpret_cast<V>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
  V v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < n) v[i] = p[i];
  return v;
#endif
}

template <class T>
int64_t padded(int64_t m) {
  return (m + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

}  // namespace
