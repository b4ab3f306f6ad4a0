// Diagonal weights, alone and with one of low rank added, for one instruction set; included after kernels_impl.h.
#pragma once
#include "sample_tiles_impl.h"
#include "scalar_root_impl.h"

namespace {

using deq::Row;

// ---- diagonal ---------------------------------------------------------------------------------------------------------

template <class T, class Act>
__attribute__((noinline)) void diagonal_activation(const Row<T>& row, double* step2, double* size2) {
  using M = VecMath<T>;
  using V = typename M::V;
  V step_sum{}, size_sum{};
  const V unit = M::set(1.0) * row.unit;
  for (int64_t j = 0; j < padded<T>(row.width); j += kLanes<T>) {
    const V x = M::load(row.x + j), d = M::load(row.scalars.d + j), valid = valid_lanes<T>(j, row.width);
    V pre;
    const V z = root<T, Act>(x, d, M::load(row.scalars.inverse + j), M::load(row.scalars.other + j), &pre);
    const V f = Act::value(d * z + x);
    M::store(row.z + j, z);
    if (row.derivative) M::store(row.derivative + j, Act::derivative(pre));
    const V step = (f - z) * unit * valid, size = f * unit * valid;
    step_sum += step * step;
    size_sum += size * size;
  }
  *step2 = lane_sum<T>(step_sum);
  *size2 = lane_sum<T>(size_sum);
}

template <class T>
void diagonal(const Row<T>& row, double* step2, double* size2) {
  with_activation<T>(row.activation, [&](auto act) { diagonal_activation<T, decltype(act)>(row, step2, size2); });
}

// ---- diagonal + low rank ------------------------------------------------------------------------------------------------

template <class T, int NV, class Solve>
DEQ_INLINE void reduce_with(const deq::Reduced<T>& t, Solve solve) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>, N = NV * L;
  for (int64_t j0 = 0; j0 < t.outputs; j0 += kPanel) {
    const int count = t.outputs - j0 < kPanel ? static_cast<int>(t.outputs - j0) : static_cast<int>(kPanel);
    add_product<T, NV>(t.x + j0 * N, t.P + j0 * t.rank, t.q, t.rank);
    const T* w = t.Q + j0 * t.rank;
    V z[NV][kPanel];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      V size2 = M::load(t.size + v * L);
#pragma GCC unroll 16
      for (int l = 0; l < kPanel; ++l) {
        z[v][l] = V{};
        if (l >= count) continue;
        z[v][l] = solve(j0 + l, (j0 + l) * N + v * L, M::load(t.x + (j0 + l) * N + v * L));
        size2 += z[v][l] * z[v][l];
      }
      M::store(t.size + v * L, size2);
    }
    for (int64_t k = 0; k < t.rank; ++k, w += kPanel) {
      V sum[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[v] = M::load(t.following + k * N + v * L);
#pragma GCC unroll 16
      for (int l = 0; l < kPanel; ++l) {
        const V a = w[l] - V{};
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[v] += a * z[v][l];
      }
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) M::store(t.following + k * N + v * L, sum[v]);
    }
  }
}

template <class T, int NV, class Act>
__attribute__((noinline)) void reduce_activation(const deq::Reduced<T>& t) {
  using V = typename Simd<T>::V;
  reduce_with<T, NV>(t, [&](int64_t j, int64_t, V x) {
    V pre;
    return root<T, Act>(x, t.scalars.d[j] - V{}, t.scalars.inverse[j] - V{}, t.scalars.other[j] - V{}, &pre);
  });
}

template <class T, int NV>
void reduce_tile(const deq::Reduced<T>& t) {
  using M = VecMath<T>;
  if (t.mask) {
    reduce_with<T, NV>(t, [&](int64_t, int64_t at, typename M::V x) { return M::load(t.mask + at) * x; });
  } else {
    with_activation<T>(t.activation, [&](auto act) { reduce_activation<T, NV, decltype(act)>(t); });
  }
}

template <class T>
void reduce(const deq::Reduced<T>& t) {
  if (t.samples == kLanes<T>) return reduce_tile<T, 1>(t);
  reduce_tile<T, kTileVectors<T>>(t);
}

// `solve(j, at, x, next, f, out)` returns z of output j from x, and from the sum `next` at q' sets f(z) and z(q').
template <class T, int NV, class Solve>
DEQ_INLINE void last_with(const deq::Last<T>& last, Solve solve) {
  using M = VecMath<T>;
  using V = typename M::V;
  const deq::Reduced<T>& t = last.at;
  constexpr int L = kLanes<T>, N = NV * L;
  for (int64_t j0 = 0; j0 < t.outputs; j0 += kPanel) {
    const int64_t count = t.outputs - j0 < kPanel ? t.outputs - j0 : kPanel;
    add_product<T, NV>(t.x + j0 * N, t.P + j0 * t.rank, t.q, t.rank);
    add_product<T, NV>(last.out + j0 * N, t.P + j0 * t.rank, t.following, t.rank);
    for (int v = 0; v < NV; ++v) {
      V step2 = M::load(last.sums + v * L), size2 = M::load(last.sums + N + v * L);
      for (int64_t j = j0; j < j0 + count; ++j) {
        const int64_t at = j * N + v * L;
        V f, out;
        const V z = solve(j, at, M::load(t.x + at), M::load(last.out + at), &f, &out);
        M::store(last.out + at, out);
        step2 += (f - z) * (f - z);
        size2 += f * f;
      }
      M::store(last.sums + v * L, step2);
      M::store(last.sums + N + v * L, size2);
    }
  }
}

template <class T, int NV, class Act>
__attribute__((noinline)) void last_activation(const deq::Last<T>& last) {
  using V = typename Simd<T>::V;
  last_with<T, NV>(last, [&](int64_t j, int64_t, V x, V next, V* f, V* out) {
    const deq::Scalars<T>& s = last.at.scalars;
    const V d = s.d[j] - V{}, inverse = s.inverse[j] - V{}, other = s.other[j] - V{};
    V pre;
    const V z = root<T, Act>(x, d, inverse, other, &pre);
    *f = Act::value(d * z + next);
    *out = root<T, Act>(next, d, inverse, other, &pre);
    return z;
  });
}

template <class T, int NV>
void last_tile(const deq::Last<T>& last) {
  using M = VecMath<T>;
  using V = typename M::V;
  const deq::Reduced<T>& t = last.at;
  if (!t.mask) return with_activation<T>(t.activation, [&](auto act) { last_activation<T, NV, decltype(act)>(last); });
  last_with<T, NV>(last, [&](int64_t j, int64_t at, V x, V next, V* f, V* out) {
    const V e = M::load(t.mask + at), d = t.scalars.d[j] - V{}, z = e * x;
    *f = e / (M::set(1.0) + d * e) * (d * z + next);  // e = s / (1 - d s)
    *out = e * next;
    return z;
  });
}

template <class T>
void last(const deq::Last<T>& t) {
  if (t.at.samples == kLanes<T>) return last_tile<T, 1>(t);
  last_tile<T, kTileVectors<T>>(t);
}

}  // namespace
