// The lane engine's inner loops for one instruction set (lanes.h).
#pragma once
#include <type_traits>

#include "../judge.h"
#include "kernels.h"
#include "lane_blocks_impl.h"
#include "lanes.h"
#include "vec.h"

namespace {

using deq::kMaxDepth;
using deq::LaneMap;
using deq::LaneProduct;
using deq::LaneRecords;
using deq::LaneSweep;
using deq::LaneWindows;

constexpr int kLaneRows = DEQ_VECTOR_BYTES == 64 ? 16 : 8;  // outputs of one register tile
constexpr int kLaneBlock = 8;  // a scalar product is a sum of sums over so many: its rounding error grows with both, not with m

// Outputs [j, j + R). The order of k is that of the row engine's tiles, and so are the bits.
template <class T, int R>
__attribute__((noinline)) void lane_tile(const LaneProduct<T>& s, int64_t j) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>;
  const int64_t panel = j / (2 * L) * (2 * L), left = padded<T>(s.width) - panel, stride = left < 2 * L ? left : 2 * L;
  const T *w = s.packed + panel * s.width + (j - panel), *z = s.z;
  V acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = V{};
  for (int64_t k = 0; k < s.width; ++k, w += stride, z += L) {
    const V b = M::load(z);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] += (w[r] - V{}) * b;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) M::store(s.x + (j + r) * L, acc[r] + M::load(s.c + (j + r) * L));
}

template <class T, int R>
DEQ_INLINE void lane_tiles(const LaneProduct<T>& s, int64_t j, int64_t end) {
  for (; j + R <= end; j += R) lane_tile<T, R>(s, j);
  if constexpr (R > 1)
    if (j < end) lane_tiles<T, R / 2>(s, j, end);
}

template <class T>
void lane_product(const LaneProduct<T>& s) {
  constexpr int64_t kPanel = 2 * kLanes<T>;
  for (int64_t j = 0; j < s.width; j += kPanel) lane_tiles<T, kLaneRows>(s, j, j + kPanel < s.width ? j + kPanel : s.width);
}

// Squares are added up one after the other: then it makes no difference which elements are left out because they are zero in all
// lanes, which depends on the batch.
//
// Outputs of a sweep, every one the sum of lane_tile() without products with zeros: rows[0..R) with a mask, else [first, first +
// R).
template <class T, bool masked, int R>
__attribute__((noinline)) uint64_t sweep_tile(const LaneSweep<T>& s, const int32_t* rows, int64_t first,
                                              typename Simd<T>::V* sums) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>;
  constexpr int kPointers = masked ? R : 1;
  const T *w[kPointers], *z = s.z;
  V acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < kPointers; ++r) w[r] = s.w + (masked ? rows[r] : first);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = V{};
  for (uint64_t rest = s.nonzero; rest; rest &= rest - 1) {
    const int64_t k = __builtin_ctzll(rest), at = k * s.width;
    const V b = M::load(z + k * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] += ((masked ? w[r % kPointers][at] : w[0][at + r]) - V{}) * b;
  }
  const auto live = M::load(s.live) != V{};
  const uint64_t kept = s.kept;
  uint64_t nonzero = 0;
  V step = sums[0], size = sums[1];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t row = masked ? rows[r] : first + r, at = row * L;
    const V x = acc[r] + M::load(s.c + at);
    V y, decisive;
    if constexpr (masked) {
      decisive = M::load(s.d + at);
      y = decisive * x;
    } else {
      decisive = y = M::positive(x);
    }
    const V before = M::load(z + at), diff = y - before;
    M::store(s.out + at, M::select(live, y, before));
    step += diff * diff;
    size += y * y;
    nonzero |= static_cast<uint64_t>((nonzero_lanes<T>(decisive) & kept) != 0) << row;
  }
  sums[0] = step;
  sums[1] = size;
  return nonzero;
}

template <class T, bool masked, int R>
DEQ_INLINE uint64_t sweep_tiles(const LaneSweep<T>& s, const int32_t* rows, int64_t first, int64_t end,
                                typename Simd<T>::V* sums) {
  uint64_t nonzero = 0;
  for (; first + R <= end; first += R) nonzero |= sweep_tile<T, masked, R>(s, rows + first, first, sums);
  if constexpr (R > 1) nonzero |= sweep_tiles<T, masked, R / 2>(s, rows, first, end, sums);
  return nonzero;
}

template <class T>
uint64_t lane_sweep(const LaneSweep<T>& s) {
  using M = VecMath<T>;
  typename M::V sums[2] = {};
  uint64_t nonzero;
  int32_t rows[64];
  if (s.d) {
    int64_t count = 0;
    for (uint64_t rest = s.nonzero; rest; rest &= rest - 1) rows[count++] = __builtin_ctzll(rest);
    nonzero = sweep_tiles<T, true, kLaneBlock>(s, rows, 0, count, sums);
  } else {
    nonzero = sweep_tiles<T, false, kLaneRows>(s, rows, 0, s.width, sums);
  }
  M::store(s.step2, sums[0]);
  M::store(s.size2, sums[1]);
  return nonzero;
}

template <class T, class F>
DEQ_INLINE void map_with(const LaneMap<T>& s, F f) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>;
  const auto live = M::load(s.live) != V{};
  V step2{}, size2{};
  for (int64_t j = 0; j < s.width; ++j) {
    const V y = f(M::load(s.x + j * L), j * L), z = M::load(s.z + j * L), diff = y - z;
    M::store(s.out + j * L, M::select(live, y, z));
    step2 += diff * diff;
    size2 += y * y;
  }
  M::store(s.step2, step2);
  M::store(s.size2, size2);
}

template <class T>
void lane_map(const LaneMap<T>& s) {
  using M = VecMath<T>;
  using V = typename M::V;
  if (s.d && s.reflected)
    return map_with(s, [&](V x, int64_t at) __attribute__((always_inline)) {
      const V y = M::load(s.d + at) * x;
      return y + y - x;
    });
  if (s.d) return map_with(s, [&](V x, int64_t at) __attribute__((always_inline)) { return M::load(s.d + at) * x; });
  with_activation<T>(s.activation, [&](auto act) {
    using Act = decltype(act);
    if (s.reflected)
      return map_with(s, [](V x, int64_t) __attribute__((always_inline)) {
        const V y = Act::value(x);
        return y + y - x;
      });
    return map_with(s, [](V x, int64_t) __attribute__((always_inline)) { return Act::value(x); });
  });
}

template <class T>
deq::LaneNews lane_look(LaneRecords<T>& s, const T* live, const T* step2, const T* size2, T tol2, T leave2, T reach2) {
  using M = VecMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  const V step = M::load(step2), size = M::load(size2), last = M::load(s.step2), left = M::load(s.left);
  const I is_first = last == M::set(static_cast<double>(INFINITY));
  const V start = M::load(s.first2), first = M::select(is_first & (size > start), size, start);
  const V limit = M::select(is_first, first * (reach2 - V{}), M::load(s.limit2));
  const I open = (M::load(live) != V{}) & (left > M::set(1.0)) & (size > M::set(sizeof(T) == 4 ? 1e-20 : 1e-120)) &
                 (size < M::set(sizeof(T) == 4 ? 1e30 : 1e120));
  const I converged = open & (step <= leave2 * size);
  const I at_speed = step <= M::set(deq::kSlowContraction * deq::kSlowContraction) * last;
  const I common = open & (step > leave2 * size) & ((step > tol2 * size) | at_speed) & (size <= limit) &
                   (step <= M::load(s.slowest) * last) & (step * M::load(s.best_size2) < M::load(s.best_step2) * size);
  const I known = converged | common;
  M::store(s.first2, M::select(known, first, start));
  M::store(s.limit2, M::select(known, limit, M::load(s.limit2)));
  M::store(s.before2, M::select(known, last, M::load(s.before2)));
  M::store(s.step2, M::select(known, step, last));
  M::store(s.best_step2, M::select(known, step, M::load(s.best_step2)));
  M::store(s.best_size2, M::select(known, size, M::load(s.best_size2)));
  M::store(s.left, M::select(known, left - M::set(1.0), left));
  auto bits = [](I mask) { return static_cast<uint32_t>(nonzero_lanes<T>(M::select(mask, M::set(1.0), V{}))); };
  return {bits(converged), static_cast<uint32_t>(nonzero_lanes<T>(M::load(live))) & ~bits(known)};
}

template <class T, int N>
DEQ_INLINE void lane_take_n(LaneWindows<T>& s, const int* order, const T* f, const T* y, int64_t width) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>;
  const T* g[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) g[i] = s.g[order[i]];
  T *new_f = s.f[order[0]], *new_g = s.g[order[0]];
  const V factor = M::load(s.factor);
  V dots[N] = {};
  for (int64_t block = 0; block < width; block += kLaneBlock) {
    const int64_t end = block + kLaneBlock < width ? block + kLaneBlock : width;
    V part[N] = {};
    for (int64_t j = block; j < end; ++j) {
      const V value = M::load(f + j * L), diff = (value - M::load(y + j * L)) * factor;
      M::store(new_f + j * L, value);
      M::store(new_g + j * L, diff);
      part[0] += diff * diff;
#pragma GCC unroll 8
      for (int i = 1; i < N; ++i) part[i] += diff * M::load(g[i] + j * L);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) dots[i] += part[i];
  }
  for (int i = 0; i < N; ++i) {
    M::store(s.gram[order[0]][order[i]], dots[i]);
    M::store(s.gram[order[i]][order[0]], dots[i]);
  }
}

// Calls f with a number from 1 to kMaxDepth as a constant.
template <int N = kMaxDepth, class F>
DEQ_INLINE void with_count(int count, F&& f) {
  if (count == N) return f(std::integral_constant<int, N>{});
  if constexpr (N > 1) with_count<N - 1>(count, f);
}

template <class T>
void lane_take(LaneWindows<T>& s, const int* order, int count, const T* f, const T* y, int64_t width) {
  with_count(count, [&](auto n) __attribute__((always_inline)) { lane_take_n<T, decltype(n)::value>(s, order, f, y, width); });
}

// Half a vector of float32, or a vector of float64, as float64.
DEQ_INLINE Simd<double>::V widened(const float* at) {
  typedef float Half __attribute__((vector_size(DEQ_VECTOR_BYTES / 2)));
  Half half;
  memcpy(&half, at, sizeof half);
  return __builtin_convertvector(half, Simd<double>::V);
}
DEQ_INLINE Simd<double>::V widened(const double* at) { return VecMath<double>::load(at); }
DEQ_INLINE void store_narrowed(float* at, Simd<double>::V x) {
  typedef float Half __attribute__((vector_size(DEQ_VECTOR_BYTES / 2)));
  const Half half = __builtin_convertvector(x, Half);
  memcpy(at, &half, sizeof half);
}
DEQ_INLINE void store_narrowed(double* at, Simd<double>::V x) { VecMath<double>::store(at, x); }

// anderson_weights() of anderson.h for the lanes from `first` on, kLanes<double> of them, of the `count` newest pairs: solves
// (Gram + regulariser diag(Gram)) a = 1 by L D L^T. Where it cannot be trusted, bits of `open` stay set.
template <class T>
void lane_weights(LaneWindows<T>& s, const int* order, int count, double regulariser, int first, VecMath<double>::I* open) {
  using M = VecMath<double>;
  using V = M::V;
  using I = M::I;
  V low[kMaxDepth][kMaxDepth], inverse[kMaxDepth], a[kMaxDepth];  // low[i][k] holds L[i][k] D[k]
  I trusted = *open & (widened(s.held + first) >= M::set(count));
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j <= i; ++j) {
      V sum = widened(s.gram[order[i]][order[j]] + first);
      if (i == j) {
        trusted &= sum > M::set(0.0);
        sum += sum * M::set(regulariser);
      }
      for (int k = 0; k < j; ++k) sum -= low[i][k] * low[j][k] * inverse[k];
      low[i][j] = sum;
    }
    trusted &= low[i][i] > M::set(0.0);
    inverse[i] = M::set(1.0) / low[i][i];
    a[i] = M::set(1.0);
    for (int k = 0; k < i; ++k) a[i] -= low[i][k] * a[k];
    a[i] *= inverse[i];
  }
  V total{}, norm1{};
  for (int i = count - 1; i >= 0; --i) {
    V rest{};
    for (int k = i + 1; k < count; ++k) rest += low[k][i] * a[k];
    a[i] -= rest * inverse[i];
    total += a[i];
  }
  for (int i = 0; i < count; ++i) {
    a[i] = a[i] / total;
    norm1 += M::abs(a[i]);
  }
  trusted &= norm1 < M::set(deq::kMaxWeight);
  for (int i = 0; i < count; ++i) store_narrowed(s.weights[i] + first, M::select(trusted, a[i], widened(s.weights[i] + first)));
  *open &= ~trusted;
}

template <class T, int N>
DEQ_INLINE void lane_mix_n(const LaneWindows<T>& s, const int* order, T* f, int64_t width) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int L = kLanes<T>;
  V weight[N];
  typename M::I counts[N];
  const T* row[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    weight[i] = M::load(s.weights[i]);
    counts[i] = M::load(s.held) > M::set(i);
    row[i] = s.f[order[i]];
  }
  for (int64_t j = 0; j < width; ++j) {
    V sum{};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum += weight[i] * M::select(counts[i], M::load(row[i] + j * L), V{});
    M::store(f + j * L, M::select(counts[0], sum, M::load(f + j * L)));
  }
}

template <class T>
void lane_mix(LaneWindows<T>& s, const int* order, int count, T regulariser, T* f, int64_t width) {
  using M = VecMath<double>;
  constexpr int kWide = kLanes<double>;
  for (int lane = 0; lane < kLanes<T>; ++lane) s.weights[0][lane] = 1;
  for (int i = 1; i < count; ++i) memset(s.weights[i], 0, sizeof s.weights[i]);
  for (int first = 0; first < kLanes<T>; first += kWide) {
    auto open = widened(s.held + first) > M::set(1.0);
    for (int n = count; n > 1 && nonzero_lanes<double>(M::select(open, M::set(1.0), M::V{})); --n)
      lane_weights(s, order, n, static_cast<double>(regulariser), first, &open);
  }
  with_count(count, [&](auto n) __attribute__((always_inline)) { lane_mix_n<T, decltype(n)::value>(s, order, f, width); });
}

template <class T>
const deq::LaneKernels<T>* lane_table() {
  static constexpr deq::LaneKernels<T> kTable = {
      .lanes = kLanes<T>,
      .product = lane_product<T>,
      .map = lane_map<T>,
      .sweep = lane_sweep<T>,
      .look = lane_look<T>,
      .nonzero = lane_nonzero<T>,
      .columns = lane_columns<T>,
      .rows = lane_rows<T>,
      .reach = lane_reach<T>,
      .scale = lane_scale<T>,
      .move = lane_move<T>,
      .take = lane_take<T>,
      .mix = lane_mix<T>,
  };
  return &kTable;
}

}  // namespace
