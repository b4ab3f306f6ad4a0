// Scalar roots and substitution for one instruction set; included after kernels_impl.h.
//
// One tile is up to two vectors of samples. Eight outputs at a time: first the product with all outputs before them (a GEMM whose
// broadcast operand is W), then the eight in order. Nothing is masked or permuted, and the roots are vectors over samples.
#pragma once
#include <type_traits>

#include "kernels_impl.h"
#include "triangular.h"

namespace {

using deq::kPanel;
using deq::Lanes;
using deq::Row;

// Sums over k are cut into runs: the rounding error of a long sum grows with the run, not with m.
constexpr int64_t kSumRun = 512;

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

// Tiles of two vectors fill the FMA pipeline where the registers suffice: 16 accumulators of 32.
template <class T>
constexpr int kTileVectors = DEQ_VECTOR_BYTES == 64 ? 2 : 1;

template <class T>
void substitute(const Lanes<T>& t) {
  for (int i = 0; i < 2 * t.samples; ++i) t.sums[i] = T(0);
  if (t.samples == kLanes<T>) return substitute_tile<T, 1>(t);
  substitute_tile<T, kTileVectors<T>>(t);
}

// ---- layout -----------------------------------------------------------------------------------------------------------

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

template <class T>
const deq::TriangularKernels<T>* triangular_table() {
  static constexpr deq::TriangularKernels<T> kTable = {
      .lanes = kLanes<T>,
      .samples = kTileVectors<T> * kLanes<T>,
      .pack = pack_triangle<T>,
      .substitute = substitute<T>,
      .load = load_tile<T>,
      .store = store_tile<T>,
      .scale = scale_tile<T>,
      .diagonal = diagonal<T>,
      .reduce = reduce<T>,
      .last = last<T>,
  };
  return &kTable;
}

}  // namespace
