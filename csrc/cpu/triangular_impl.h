// Substitution for one instruction set; included after kernels_impl.h.
//
// One tile is up to two vectors of samples. Eight outputs at a time: first the product with all outputs before them (a GEMM whose
// broadcast operand is W), then the eight in order.
#pragma once
#include "sample_tiles_impl.h"
#include "scalar_root_impl.h"

namespace {

using deq::Lanes;

// The outputs [j0, j0 + count) in order, given the sums over all outputs before j0. `solve(j, at, x, f)` returns z of output j
// from the sum x of the others and stores f = act(d z + x); `at` is the offset in the tile.
template <class T, int NV, class Solve>
DEQ_INLINE void own_outputs(const Lanes<T>& t, const T* w, int64_t j0, Solve solve) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>, N = NV * L;
  const int count = t.width - j0 < kPanel ? static_cast<int>(t.width - j0) : static_cast<int>(kPanel);
  const T* block = w + j0 * kPanel;  // [earlier output][later output]
  for (int v = 0; v < NV; ++v) {
    T *own = t.x + j0 * N + v * L, *sums = t.sums + v * L;
    const V unit = M::load(t.unit + v * L);
    V step2 = M::load(sums), size2 = M::load(sums + N), acc[kPanel];
#pragma GCC unroll 16
    for (int l = 0; l < kPanel; ++l) acc[l] = M::load(own + l * N);
#pragma GCC unroll 16
    for (int l = 0; l < kPanel; ++l) {
      if (l >= count) break;
      V f;
      const V z = solve(j0 + l, (j0 + l) * N + v * L, acc[l], &f);
      M::store(own + l * N, z);
      const V step = (f - z) * unit, size = f * unit;
      step2 += step * step;
      size2 += size * size;
#pragma GCC unroll 16
      for (int i = l + 1; i < kPanel; ++i) acc[i] += (block[l * kPanel + i] - V{}) * z;
    }
    M::store(sums, step2);
    M::store(sums + N, size2);
  }
}

template <class T, int NV, class Solve>
DEQ_INLINE void substitute_with(const Lanes<T>& t, Solve solve) {
  for (int64_t p = 0; p < deq::triangle_panels(t.width); ++p) {
    const T* w = t.packed + deq::triangle_offset(p);
    if (p > 0) add_product<T, NV>(t.x + p * kPanel * t.samples, w, t.x, p * kPanel);
    own_outputs<T, NV>(t, w, p * kPanel, solve);
  }
}

template <class T, int NV, class Act>
__attribute__((noinline)) void substitute_activation(const Lanes<T>& t) {
  using M = VecMath<T>;
  using V = typename M::V;
  substitute_with<T, NV>(t, [&](int64_t j, int64_t at, V x, V* f) {
    const T d = t.scalars.d[j];
    V pre = x, z;
    if (d == T(0)) {
      z = *f = Act::value(x);
    } else {
      const V diagonal = d - V{};
      z = root<T, Act>(x, diagonal, t.scalars.inverse[j] - V{}, t.scalars.other[j] - V{}, &pre);
      *f = Act::value(diagonal * z + x);
    }
    if (t.writes_derivative) M::store(t.mask + at, Act::derivative(pre));
    return z;
  });
}

template <class T, int NV>
__attribute__((noinline)) void substitute_masked(const Lanes<T>& t) {
  using M = VecMath<T>;
  using V = typename M::V;
  substitute_with<T, NV>(t, [&](int64_t j, int64_t at, V x, V* f) {
    const T d = t.scalars.d[j];
    const V s = M::load(t.mask + at);
    if (d == T(0)) return *f = s * x;
    const V u = s * x / (M::set(1.0) - d * s);
    *f = s * (x + d * u);
    return u;
  });
}

template <class T, int NV>
void substitute_tile(const Lanes<T>& t) {
  if (t.mask && !t.writes_derivative) return substitute_masked<T, NV>(t);
  with_activation<T>(t.activation, [&](auto act) { substitute_activation<T, NV, decltype(act)>(t); });
}

template <class T>
void substitute(const Lanes<T>& t) {
  for (int i = 0; i < 2 * t.samples; ++i) t.sums[i] = T(0);
  if (t.samples == kLanes<T>) return substitute_tile<T, 1>(t);
  substitute_tile<T, kTileVectors<T>>(t);
}

template <class T>
void pack_triangle(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, bool strict, T* packed, int64_t first,
                   int64_t last) {
  constexpr int64_t Q = Quad<T>::kSide;
  for (int64_t p = first; p < last; ++p) {
    const int64_t j0 = p * kPanel, rows = m - j0 < kPanel ? m - j0 : kPanel;
    T* dst = packed + deq::triangle_offset(p);
    const bool quads = column_stride == 1 && rows == kPanel;
    if (quads)
      for (int64_t l = 0; l < kPanel; l += Q)
        for (int64_t k = 0; k < j0; k += Q)
          Quad<T>::transpose(w + (j0 + l) * row_stride + k, row_stride, dst + k * kPanel + l, kPanel);
    for (int64_t k = quads ? j0 : 0; k < j0 + kPanel; ++k)
      for (int64_t l = 0; l < kPanel; ++l) {
        const bool inside = l < rows && (k < j0 + l || (k == j0 + l && !strict));
        dst[k * kPanel + l] = inside ? w[(j0 + l) * row_stride + k * column_stride] : T(0);
      }
  }
}

}  // namespace
