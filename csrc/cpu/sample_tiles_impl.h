// Tiles of samples, one a lane, for one instruction set: in and out of them, and their product with a panel of weights. Nothing
// is masked or permuted. Included after kernels_impl.h.
#pragma once
#include "kernels_impl.h"
#include "structured_kernels.h"

namespace {

using deq::kPanel;

// Tiles of two vectors fill the FMA pipeline where the registers suffice: 16 accumulators of 32.
template <class T>
constexpr int kTileVectors = DEQ_VECTOR_BYTES == 64 ? 2 : 1;

// Sums over k are cut into runs: the rounding error of a long sum grows with the run, not with m.
constexpr int64_t kSumRun = 512;

// own[l] += sum over k < count of w[k][l] z[k], eight outputs of NV vectors of samples.
template <class T, int NV>
__attribute__((noinline)) void add_product(T* own, const T* w, const T* z, int64_t count) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>, N = NV * L;
  V total[kPanel][NV];
#pragma GCC unroll 16
  for (int l = 0; l < kPanel; ++l)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) total[l][v] = M::load(own + l * N + v * L);
  for (int64_t k0 = 0; k0 < count; k0 += kSumRun) {
    const int64_t k1 = count < k0 + kSumRun ? count : k0 + kSumRun;
    V acc[kPanel][NV];
#pragma GCC unroll 16
    for (int l = 0; l < kPanel; ++l)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[l][v] = V{};
    const T *row = z + k0 * N, *weights = w + k0 * kPanel;
    for (int64_t k = k0; k < k1; ++k, row += N, weights += kPanel) {
      V b[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) b[v] = M::load(row + v * L);
#pragma GCC unroll 16
      for (int l = 0; l < kPanel; ++l) {
        const V a = weights[l] - V{};
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[l][v] += a * b[v];
      }
    }
#pragma GCC unroll 16
    for (int l = 0; l < kPanel; ++l)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) total[l][v] += acc[l][v];
  }
#pragma GCC unroll 16
  for (int l = 0; l < kPanel; ++l)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) M::store(own + l * N + v * L, total[l][v]);
}

// The larger magnitude of every lane, as bits: magnitudes order like their bit patterns, NaN above infinity.
template <class T>
DEQ_INLINE typename Simd<T>::I larger(typename Simd<T>::I largest, typename Simd<T>::V x) {
  using I = typename Simd<T>::I;
  const I bits = reinterpret_cast<I>(VecMath<T>::abs(x));
  return bits > largest ? bits : largest;
}

// Those magnitudes as numbers, infinity in place of NaN.
template <class T>
DEQ_INLINE typename Simd<T>::V magnitudes(typename Simd<T>::I largest) {
  using M = VecMath<T>;
  const typename M::V infinite = M::set(INFINITY);
  return M::select(largest >= reinterpret_cast<typename M::I>(infinite), infinite, reinterpret_cast<typename M::V>(largest));
}

template <class T>
void scale_tile(T* x, const T* factor, int64_t m, int samples, T* largest) {
  using M = VecMath<T>;
  for (int v = 0; v < samples; v += kLanes<T>) {
    const typename M::V f = M::load(factor + v);
    typename M::I most{};
    for (int64_t k = 0; k < m; ++k) {
      const typename M::V value = M::load(x + k * samples + v) * f;
      most = larger<T>(most, value);
      M::store(x + k * samples + v, value);
    }
    M::store(largest + v, magnitudes<T>(most));
  }
}

template <class T>
void load_tile(const T* rows, int64_t row_stride, int n, int64_t m, bool reversed, int samples, T* x, T* largest) {
  using M = VecMath<T>;
  constexpr int64_t Q = Quad<T>::kSide;
  const int64_t to = reversed ? -samples : samples, whole_b = n / Q * Q, whole_k = m / Q * Q;
  T* first = x + (reversed ? m - 1 : 0) * samples;
  for (int64_t k = 0; k < whole_k; k += Q)
    for (int64_t b = 0; b < whole_b; b += Q) Quad<T>::transpose(rows + b * row_stride + k, row_stride, first + k * to + b, to);
  for (int64_t k = 0; k < m; ++k) {
    for (int64_t b = k < whole_k ? whole_b : 0; b < n; ++b) first[k * to + b] = rows[b * row_stride + k];
    for (int64_t b = n; b < samples; ++b) first[k * to + b] = T(0);
  }
  for (int64_t i = m * samples; i < deq::triangle_panels(m) * kPanel * samples; ++i) x[i] = T(0);
  if (!largest) return;
  for (int v = 0; v < samples; v += kLanes<T>) {
    typename M::I most{};
    for (int64_t k = 0; k < m; ++k) most = larger<T>(most, M::load(x + k * samples + v));
    M::store(largest + v, magnitudes<T>(most));
  }
}

template <class T>
void store_tile(const T* x, int n, int64_t m, bool reversed, int samples, T* rows, int64_t row_stride) {
  constexpr int64_t Q = Quad<T>::kSide;
  const int64_t from = reversed ? -samples : samples, whole_b = n / Q * Q, whole_k = m / Q * Q;
  const T* first = x + (reversed ? m - 1 : 0) * samples;
  for (int64_t b = 0; b < whole_b; b += Q)
    for (int64_t k = 0; k < whole_k; k += Q)
      Quad<T>::transpose(first + k * from + b, from, rows + b * row_stride + k, row_stride);
  for (int64_t b = 0; b < n; ++b)
    for (int64_t k = b < whole_b ? whole_k : 0; k < m; ++k) rows[b * row_stride + k] = first[k * from + b];
}

}  // namespace
