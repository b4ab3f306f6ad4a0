// Loops over the elements of a row for one instruction set: everything that a solve does to a sample but products with W.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "../activations.h"
#include "../kernels.h"
#include "vec.h"

namespace {

// Calls f with the activation's struct.
template <class T, class F>
DEQ_INLINE void with_activation(int32_t number, F&& f) {
  using M = VecMath<T>;
  switch (number) {
    case deq::kRelu:
      return f(deq::Relu<M>{});
    case deq::kLeakyRelu:
      return f(deq::LeakyRelu<M>{});
    case deq::kElu:
      return f(deq::Elu<M>{});
    case deq::kGelu:
      return f(deq::Gelu<M>{});
    case deq::kSilu:
      return f(deq::Silu<M>{});
    case deq::kTanh:
      return f(deq::Tanh<M>{});
    case deq::kSigmoid:
      return f(deq::Sigmoid<M>{});
    case deq::kSoftplus:
      return f(deq::Softplus<M>{});
    default:
      return f(deq::Identity<M>{});
  }
}

// 1 in the lanes that hold elements below m, 0 in the padding.
template <class T>
DEQ_INLINE typename Simd<T>::V valid_lanes(int64_t j, int64_t m) {
  using M = VecMath<T>;
  static_assert(kLanes<T> <= 16);
  constexpr T kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t left = m - j < 16 ? m - j : 16;
  return M::select(M::load(kIndex) < M::set(static_cast<double>(left)), M::set(1.0), M::set(0.0));
}

// x = act(.) becomes act'(.), in place; kept at zero in the padding.
template <class T>
void derivative_of_value(int32_t activation, T* x, int64_t m) {
  using M = VecMath<T>;
  with_activation<T>(activation, [&](auto act) {
    using Act = decltype(act);
    if constexpr (Act::kOfValue) {
      for (int64_t j = 0; j < padded<T>(m); j += kLanes<T>) M::store(x + j, Act::of_value(M::load(x + j)) * valid_lanes<T>(j, m));
    }
  });
}

template <class T>
double first(int32_t activation, const T* c, const T* d, T* out, int64_t m) {
  using M = VecMath<T>;
  typename M::V size2{};
  with_activation<T>(activation, [&](auto act) {
    using Act = decltype(act);
    for (int64_t j = 0; j < padded<T>(m); j += kLanes<T>) {
      typename M::V x = M::load(c + j), y = d ? M::load(d + j) * x : Act::value(x) * valid_lanes<T>(j, m);
      M::store(out + j, y);
      size2 += y * y;
    }
  });
  return lane_sum<T>(size2);
}

template <class T>
void residual(const T* f, const T* y, T* f_row, T* g_row, int64_t n) {
  using M = VecMath<T>;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    typename M::V v = M::load(f + j);
    M::store(f_row + j, v);
    M::store(g_row + j, v - M::load(y + j));
  }
}

template <class T>
void dots(const T* g, const T* const* rows, int count, int64_t n, double* out) {
  using M = VecMath<T>;
  for (int i = 0; i < count; ++i) {
    typename M::V sum{};
    for (int64_t j = 0; j < n; j += kLanes<T>) sum += M::load(g + j) * M::load(rows[i] + j);
    out[i] = lane_sum<T>(sum);
  }
}

template <class T>
void mix(const T* const* rows, const T* weights, int count, int64_t n, T* out) {
  using M = VecMath<T>;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    typename M::V sum = M::set(0.0) + weights[0] * M::load(rows[0] + j);
    for (int i = 1; i < count; ++i) sum += weights[i] * M::load(rows[i] + j);
    M::store(out + j, sum);
  }
}

template <class T>
T copy_in(const T* src, int64_t n, int64_t to, T* dst) {
  using M = VecMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  const int64_t L = kLanes<T>;
  I largest{};  // magnitudes order like their bit patterns, NaN above infinity
  auto take = [&](const V& v) __attribute__((always_inline)) {
    const I bits = reinterpret_cast<I>(M::abs(v));
    largest = bits > largest ? bits : largest;
    return v;
  };
  int64_t j = 0;
  for (; j + L <= n; j += L) M::store(dst + j, take(M::load(src + j)));
  for (; j < to; j += L) M::store(dst + j, take(load_first<T>(src + j, n > j ? n - j : 0)));
  using E = std::remove_reference_t<decltype(largest[0])>;
  const E most = LaneMax<E, DEQ_VECTOR_BYTES>::of(largest);
  T result;
  memcpy(&result, &most, sizeof result);
  return result < static_cast<T>(INFINITY) ? result : static_cast<T>(INFINITY);
}

template <class T>
void scale(T* x, T factor, int64_t n) {
  using M = VecMath<T>;
  for (int64_t j = 0; j < n; j += kLanes<T>) M::store(x + j, M::load(x + j) * factor);
}

template <class T>
bool copy_out(const T* src, T factor, int64_t n, T* dst) {
  using M = VecMath<T>;
  using I = typename M::I;
  const int64_t L = kLanes<T>;
  I bad{};
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    typename M::V v = M::load(src + j) * factor;
    bad |= ~(M::abs(v) < M::set(INFINITY));
    M::store(dst + j, v);
  }
  bool ok = true;
  for (; j < n; ++j) {
    dst[j] = src[j] * factor;
    ok = ok && fabs(static_cast<double>(dst[j])) < INFINITY;
  }
  for (int i = 0; i < L; ++i) ok = ok && bad[i] == 0;
  return ok;
}

// Multiply, fold, multiply, rotate in 64-bit lanes: the order of the words and every bit of them count. One multiplication would
// leave the highest bit of a word alone, so that the sign of a number and a 0 that becomes 2 in the next word of its lane
// cancelled. Eight vectors of AVX-512 hide it: 119 GB/s instead of 138 in the cache, AVX2 20 instead of 42 (Zen 5).
void absorb(uint64_t* lanes, const void* data, int64_t blocks) {
  typedef uint64_t U __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  constexpr int kVectors = deq::kHashLanes * 8 / DEQ_VECTOR_BYTES;
  U h[kVectors];
  memcpy(h, lanes, sizeof h);
  const char* p = static_cast<const char*>(data);
  for (int64_t n = 0; n < blocks; ++n, p += sizeof h) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      U w;
      memcpy(&w, p + i * sizeof w, sizeof w);
      U x = (h[i] ^ w) * 0x9E3779B185EBCA87ull;
      x = (x ^ (x >> 32)) * 0xC2B2AE3D27D4EB4Full;
      h[i] = (x << 31) | (x >> 33);
    }
  }
  memcpy(lanes, h, sizeof h);
}

}  // namespace
