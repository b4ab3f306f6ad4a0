// The inner loops for one instruction set. The including file defines DEQ_VECTOR_BYTES, DEQ_TILE_ROWS and kName.
//
// Register tile: up to DEQ_TILE_ROWS samples x two vectors of outputs. Every output is summed over k in the same order in
// every tile shape, so that a sample's result does not depend on which samples share its tile.
#pragma once
#include "../activations.h"
#include "../kernels.h"
#include "invert_impl.h"
#include "kernels.h"
#include "pack_impl.h"
#include "product_impl.h"
#include "rows_impl.h"
#include "vec.h"

namespace {

using deq::kSumChunk;
using deq::Step;

// acc[r][p * 2 + v] = sum_k z[r][k] * w[p][k][v] over NP panels of NV vectors.
template <class T, int MR, int NV, int NP>
DEQ_INLINE void product(const T* const* z, const T* w, int64_t panel_stride, int64_t k0, int64_t k1,
                        typename Simd<T>::V (&acc)[MR][NV * NP]) {
  using M = VecMath<T>;
  using V = typename M::V;
  const T* row[MR];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) row[r] = z[r];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV * NP; ++v) acc[r][v] = V{};
  const T* wk = w + k0 * (NV * kLanes<T>);
  for (int64_t k = k0; k < k1; ++k, wk += NV * kLanes<T>) {
    V b[NV * NP];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) b[p * NV + v] = M::load(wk + p * panel_stride + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      V a = row[r][k] - V{};  // a broadcast: x - 0 is x for every x, x + 0 is not
#pragma GCC unroll 16
      for (int v = 0; v < NV * NP; ++v) acc[r][v] += a * b[v];
    }
  }
}

// The sums of a row in the step's segment.
template <class T>
DEQ_INLINE T* sums_of(const Step<T>& s, int row) {
  return s.sums[row] + s.segment * (2 * kLanes<T>);
}

// Finishes one vector of one row.
template <class T, class Act>
DEQ_INLINE void finish(typename Simd<T>::V x, typename Simd<T>::V valid, const T* z, T* out, typename Simd<T>::V* step2,
                       typename Simd<T>::V* size2) {
  using M = VecMath<T>;
  typename M::V y = Act::value(x) * valid, diff = y - M::load(z);
  M::store(out, y);
  *step2 += diff * diff;
  *size2 += y * y;
}

// The same for a tile whose pre-activations were spilled to `tile`: the activations too large to inline in every tile shape.
template <class T, class Act>
void finish_tile(const T* tile, int rows, int vectors, const Step<T>& s, int row0, int64_t j) {
  using M = VecMath<T>;
  const int L = kLanes<T>;
  for (int v = 0; v < vectors; ++v) {
    const typename M::V valid = valid_lanes<T>(j + v * L, s.width);
    for (int r = 0; r < rows; ++r) {
      T* sums = sums_of(s, row0 + r);
      const int64_t at = j + v * L;
      typename M::V step2{}, size2{};
      if (at > s.from) step2 = M::load(sums), size2 = M::load(sums + L);
      typename M::V x = M::load(tile + (r * vectors + v) * L) + M::load(s.c[row0 + r] + at);
      finish<T, Act>(x, valid, s.z[row0 + r] + at, s.out[row0 + r] + at, &step2, &size2);
      M::store(sums, step2);
      M::store(sums + L, size2);
    }
  }
}

// The reflected map: its pre-activation is kept, because the result cannot be told from the reflection.
template <class T, class Act>
void finish_reflected(const T* tile, int rows, int vectors, const Step<T>& s, int row0, int64_t j) {
  using M = VecMath<T>;
  const int L = kLanes<T>;
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = j + v * L;
    const typename M::V valid = valid_lanes<T>(at, s.width);
    for (int r = 0; r < rows; ++r) {
      T* sums = sums_of(s, row0 + r);
      typename M::V step2{}, size2{};
      if (at > s.from) step2 = M::load(sums), size2 = M::load(sums + L);
      const typename M::V x = M::load(tile + (r * vectors + v) * L) + M::load(s.c[row0 + r] + at);
      const typename M::V f = s.d ? M::load(s.d[row0 + r] + at) * x : Act::value(x) * valid, y = f + f - x;
      const typename M::V diff = y - M::load(s.z[row0 + r] + at);
      M::store(s.pre[row0 + r] + at, x);
      M::store(s.out[row0 + r] + at, y);
      M::store(sums, step2 + diff * diff);
      M::store(sums + L, size2 + y * y);
    }
  }
}

template <class T>
using FinishTile = void (*)(const T*, int, int, const Step<T>&, int, int64_t);

template <class T>
FinishTile<T> finish_tile_for(int32_t activation, bool reflected) {
  FinishTile<T> f = nullptr;
  with_activation<T>(activation,
                     [&](auto act) { f = reflected ? &finish_reflected<T, decltype(act)> : &finish_tile<T, decltype(act)>; });
  return f;
}

// Finishes the register tile in place; `map(r, v, x)` is the inlined activation.
template <class T, int MR, int N, class Map>
DEQ_INLINE void finish_rows(const Step<T>& s, int row0, int64_t j, const typename Simd<T>::V (&acc)[MR][N], Map map) {
  using M = VecMath<T>;
  using V = typename M::V;
  const int L = kLanes<T>;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    T* sums = sums_of(s, row0 + r);
    const T *c = s.c[row0 + r] + j, *z = s.z[row0 + r] + j;
    T* out = s.out[row0 + r] + j;
    V step2{}, size2{};
    if (j > s.from) step2 = M::load(sums), size2 = M::load(sums + L);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      V y = map(r, v, acc[r][v] + M::load(c + v * L));
      V diff = y - M::load(z + v * L);
      M::store(out + v * L, y);
      step2 += diff * diff;
      size2 += y * y;
    }
    M::store(sums, step2);
    M::store(sums + L, size2);
  }
}

// Whether the map of the step is so short that every tile has its own copy of it.
template <class T>
bool finishes_inline(const Step<T>& s) {
  return s.pre == nullptr && (s.d != nullptr || s.activation == deq::kRelu);
}

// One register tile: rows [row0, row0 + MR), NP panels of NV vectors from column j.
template <class T, int MR, int NV, int NP>
__attribute__((noinline)) void tile(const Step<T>& s, FinishTile<T> finish_spilled, int row0, int64_t j) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int N = NV * NP;
  const int L = kLanes<T>;
  const T* w = s.packed + j * s.width;
  const int64_t stride = NV * L * s.width;
  V acc[MR][N];
  product<T, MR, NV, NP>(s.z + row0, w, stride, 0, s.width < kSumChunk ? s.width : kSumChunk, acc);
  // Seven rows: GCC 12 would keep the sums of earlier chunks in registers and spill within the product (79 against 115 GFLOP/s).
  constexpr bool kHeld = MR * N == 14;
  for (int64_t k = kSumChunk; k < s.width; k += kSumChunk) {
    V part[MR][N];
    [[maybe_unused]] alignas(DEQ_VECTOR_BYTES) T held[kHeld ? MR * N * kLanes<T> : 1];
    if constexpr (kHeld) {
#pragma GCC unroll 16
      for (int i = 0; i < MR * N; ++i) M::store(held + i * L, acc[i / N][i % N]);
      asm("" : "+m"(held));
    }
    product<T, MR, NV, NP>(s.z + row0, w, stride, k, s.width < k + kSumChunk ? s.width : k + kSumChunk, part);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) {
        if constexpr (kHeld) acc[r][v] = M::load(held + (r * N + v) * L);
        acc[r][v] += part[r][v];
      }
  }
  if (!finishes_inline(s)) {
    alignas(DEQ_VECTOR_BYTES) T spilled[MR * N * kLanes<T>];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) M::store(spilled + (r * N + v) * L, acc[r][v]);
    finish_spilled(spilled, MR, N, s, row0, j);
    return;
  }
  // relu(0) = 0 and d = 0 in the padding: no lanes to mask.
  if (s.d) {
    finish_rows<T, MR, N>(s, row0, j, acc, [&](int r, int v, V x) { return M::load(s.d[row0 + r] + j + v * L) * x; });
  } else {
    finish_rows<T, MR, N>(s, row0, j, acc, [](int, int, V x) { return deq::Relu<M>::value(x); });
  }
}

// The tile shapes of up to MR rows, tried from the largest down.
template <class T, int NV, int NP, int MR>
DEQ_INLINE void tile_rows(int rows, const Step<T>& s, FinishTile<T> f, int row0, int64_t j) {
  if constexpr (MR > 0) {
    if (rows == MR) return tile<T, MR, NV, NP>(s, f, row0, j);
    tile_rows<T, NV, NP, MR - 1>(rows, s, f, row0, j);
  }
}

// Up to this width tiles of half as many rows and two panels, which finish a row half as often. Zen 4, share of the FMA peak:
// 0.90 for 0.87 at m = 64, 0.94 for 0.93 at 128, 0.97 for 0.96 at 256. Not where some of these tiles would be of three rows:
// those make more of the time than they save.
constexpr int64_t kSquareWidth = 256;

template <class T>
void step_with(const Step<T>& s, int n, FinishTile<T> f) {
  const int64_t L = kLanes<T>, full = s.to / (2 * L) * (2 * L);
  int64_t j = s.from;
  // One or two rows do not fill the FMA pipeline with one panel: take several at once.
  if (n == 1)
    for (; j + 8 * L <= full; j += 8 * L) tile<T, 1, 2, 4>(s, f, 0, j);
  else if (n == 2)
    for (; j + 4 * L <= full; j += 4 * L) tile<T, 2, 2, 2>(s, f, 0, j);
#if DEQ_VECTOR_BYTES == 64
  constexpr int kRows = DEQ_TILE_ROWS / 2;
  if (s.width <= kSquareWidth && finishes_inline(s) && n >= DEQ_TILE_ROWS && n % kRows == 0) {
    for (; j + 4 * L <= full; j += 4 * L)
      for (int row = 0; row < n; row += kRows) tile<T, kRows, 2, 2>(s, f, row, j);
  }
#endif
  const int blocks = (n + DEQ_TILE_ROWS - 1) / DEQ_TILE_ROWS, base = n / blocks, extra = n % blocks;
  for (; j < s.to; j += 2 * L) {
    int row = 0;
    for (int b = 0; b < blocks; ++b) {  // even blocks: 9 rows are 5 + 4, not 8 + 1
      const int rows = base + (b < extra);
      if (j < full)
        tile_rows<T, 2, 1, DEQ_TILE_ROWS>(rows, s, f, row, j);
      else
        tile_rows<T, 1, 1, DEQ_TILE_ROWS>(rows, s, f, row, j);
      row += rows;
    }
  }
}

#if DEQ_VECTOR_BYTES == 64
// lane_sum of eight vectors at once, to the same bits: every halving leaves two of them in one vector. A third of the operations;
// one after the other they took 5 % of a solve at 64 x 256.
DEQ_INLINE void lane_sums(const Simd<float>::V (&v)[8], double* out) {
  using V = Simd<float>::V;
  typedef int I __attribute__((vector_size(64)));
  typedef float Half __attribute__((vector_size(32)));
  typedef double Wide __attribute__((vector_size(64)));
  V pairs[4], fours[2];
  const auto halve = [](const V& p, const V& q, const I& low, const I& high)
                         __attribute__((always_inline)) { return __builtin_shuffle(p, q, low) + __builtin_shuffle(p, q, high); };
  constexpr I kLow8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr I kLow4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr I kLow2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) pairs[i] = halve(v[2 * i], v[2 * i + 1], kLow8, kLow8 + 8);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) fours[i] = halve(pairs[2 * i], pairs[2 * i + 1], kLow4, kLow4 + 4);
  const V twos = halve(fours[0], fours[1], kLow2, kLow2 + 2);
  constexpr I kEven = {0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14};
  const V sums = halve(twos, twos, kEven, kEven + 1);
  Half half;
  memcpy(&half, &sums, sizeof half);
  const Wide wide = __builtin_convertvector(half, Wide);
  memcpy(out, &wide, sizeof wide);
}
#endif

template <class T>
void add_up(const Step<T>& s, int n, int segments) {
  using M = VecMath<T>;
  using V = typename M::V;
  const auto sum_of = [&](int i) __attribute__((always_inline)) {  // i-th of all rows' pairs
    const T* sums = s.sums[i / 2] + i % 2 * kLanes<T>;
    V sum = M::load(sums);
    for (int segment = 1; segment < segments; ++segment) sum += M::load(sums + segment * (2 * kLanes<T>));
    return sum;
  };
  int i = 0;
#if DEQ_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    for (; i + 8 <= 2 * n; i += 8) {
      const V sums[8] = {sum_of(i),     sum_of(i + 1), sum_of(i + 2), sum_of(i + 3),
                         sum_of(i + 4), sum_of(i + 5), sum_of(i + 6), sum_of(i + 7)};
      lane_sums(sums, s.totals + i);
    }
#endif
  for (; i < 2 * n; ++i) s.totals[i] = lane_sum<T>(sum_of(i));
}

template <class T>
void step(const Step<T>& s, int n) {
  step_with<T>(s, n, finish_tile_for<T>(s.activation, s.pre != nullptr));
}

}  // namespace
#include "lanes_impl.h"
#include "skip_impl.h"
namespace {

// The derivative as a finish: out = act'(x), no sums.
template <class T, class Act>
void finish_derivative(const T* tile, int rows, int vectors, const Step<T>& s, int row0, int64_t j) {
  using M = VecMath<T>;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = j + v * kLanes<T>;
      typename M::V x = M::load(tile + (r * vectors + v) * kLanes<T>) + M::load(s.c[row0 + r] + at);
      M::store(s.out[row0 + r] + at, Act::derivative(x));
    }
}

template <class T>
void derivative(const Step<T>& s, int n) {
  Step<T> spilling = s;
  FinishTile<T> f = nullptr;
  with_activation<T>(s.activation, [&](auto act) { f = &finish_derivative<T, decltype(act)>; });
  spilling.activation = deq::kActivations;  // any number but relu: always through f
  step_with<T>(spilling, n, f);
}

// Independent FMA chains on registers: the ceiling that the tiles are measured against.
template <class T>
double peak_flops(int64_t repeats) {
  using V = typename Simd<T>::V;
  constexpr int kChains = DEQ_TILE_ROWS + 4;
  V acc[kChains], a = VecMath<T>::set(0.5), b = VecMath<T>::set(1e-3);
  for (int i = 0; i < kChains; ++i) acc[i] = VecMath<T>::set(i);
  for (int64_t n = 0; n < repeats; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
  }
  V sum{};
  for (int i = 0; i < kChains; ++i) sum += acc[i];
  volatile T sink = sum[0];
  (void)sink;
  return 2.0 * kChains * kLanes<T> * repeats;
}

template <class T>
const deq::Kernels<T>* table() {
  static constexpr deq::Kernels<T> kTable = {
      .name = kName,
      .lanes = kLanes<T>,
      .panel = 2 * kLanes<T>,
      .rows = DEQ_TILE_ROWS,
      .copy_in = copy_in<T>,
      .scale = scale<T>,
      .copy_out = copy_out<T>,
      .pack = pack<T>,
      .step = step<T>,
      .add_up = add_up<T>,
      .find_nonzeros = find_nonzeros<T>,
      .skip_step = skip_step<T>,
      .derivative = derivative<T>,
      .derivative_of_value = derivative_of_value<T>,
      .first = first<T>,
      .residual = residual<T>,
      .dots = dots<T>,
      .mix = mix<T>,
      .product = product<T>,
      .product_scratch = product_scratch<T>,
      .invert = invert<T>,
      .absorb = absorb,
      .peak_flops = peak_flops<T>,
      .lane = lane_table<T>,
  };
  return &kTable;
}

}  // namespace
