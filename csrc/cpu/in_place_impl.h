// W z + c in float32 straight from W as the caller has it, for one instruction set: where W is new in every call and few samples
// share it, packing all of it takes longer than the products. Here a W whose columns are contiguous; in_place_rows_impl.h has the
// one whose rows are.
//
// Every sum runs in the order of the packed W (kernels_impl.h): the result is the same to the last bit.
#pragma once
#include "ahead.h"
#include "delta.h"
#include "in_place_rows_impl.h"
#include "kernels.h"
#include "vec.h"

namespace {

using deq::Affine;

// What is taken of W together: a quarter of a 1 MB L2 cache, while as much again is on its way.
constexpr int64_t kRowsTogether = 64, kColumnsTogether = 1024;
static_assert(deq::kSumChunk % kRowsTogether == 0, "a chunk of the sum ends with such a group");

// Some values of k of one panel.
struct Block {
  int64_t k0, k1;
  int64_t j;      // the panel's first column
  int64_t valid;  // lanes of the last vector that exist
};

// kRows rows of z times NV vectors of columns. The sum of a chunk waits in `out`, that of the chunks before it in `total`.
template <int kRows, int NV>
__attribute__((noinline)) void affine_tile(const Affine& a, const Block& block, int row0, Ahead<float>* ahead) {
  using M = VecMath<float>;
  using V = M::V;
  constexpr int64_t L = kLanes<float>, kChunk = deq::kSumChunk;
  const int64_t k0 = block.k0, k1 = block.k1;
  const float *z[kRows], *w = a.w + k0 * a.stride + block.j;
  V acc[kRows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    z[r] = a.z[row0 + r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = k0 % kChunk == 0 ? V{} : M::load(a.out[row0 + r] + block.j + v * L);
  }
  auto add = [&](int64_t k, bool is_whole) __attribute__((always_inline)) {
    V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = is_whole || v + 1 < NV ? M::load(w + v * L) : load_first<float>(w + v * L, block.valid);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = z[r][k] - V{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
    }
    w += a.stride;
  };
  int64_t k = k0;
  if (block.valid < L)
    for (; k < k1; ++k) add(k, false);
  if (ahead) {
    Ahead<float> rows = *ahead;
    for (; k < k1; ++k) {
      rows.ask<NV * DEQ_VECTOR_BYTES / 64>();
      add(k, true);
    }
    *ahead = rows;
  }
  for (; k < k1; ++k) add(k, true);
  const bool last = k1 == a.width, ends = last || k1 % kChunk == 0;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = block.j + v * L;
      float *out = a.out[row0 + r] + at, *total = a.total[row0 + r] + at;
      V sum = acc[r][v];
      if (ends && k0 >= kChunk) sum = M::load(total) + sum;
      if (last) sum += M::load(a.c[row0 + r] + at);
      M::store(ends && !last ? total : out, sum);
    }
}

template <int NV, int kRows>
DEQ_INLINE void affine_tiles(int rows, const Affine& a, const Block& block, int row0, Ahead<float>* ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return affine_tile<kRows, NV>(a, block, row0, ahead);
    affine_tiles<NV, kRows - 1>(rows, a, block, row0, ahead);
  }
}

// All rows of z times one block of NV vectors.
template <int NV, int kRows>
DEQ_INLINE void affine_block(const Affine& a, const Block& block, int n, Ahead<float>* ahead) {
  const int tiles = (n + kRows - 1) / kRows;
  for (int t = 0; t < tiles; ++t) {
    const int row = n * t / tiles;
    affine_tiles<NV, kRows>(n * (t + 1) / tiles - row, a, block, row, t == 0 ? ahead : nullptr);
  }
}

// W whose columns are contiguous: the columns [from, to) of some rows, then of the next.
void affine_columns(const Affine& a, int n, int64_t from, int64_t to) {
  constexpr int64_t L = kLanes<float>;
  constexpr int kFew = DEQ_TILE_ROWS / 2;
  const int64_t run = (to < a.width ? to : a.width) - from;
  for (int64_t k0 = 0, k1; k0 < a.width; k0 = k1) {
    k1 = a.width < k0 + kRowsTogether ? a.width : k0 + kRowsTogether;
    const int64_t k2 = a.width < k1 + kRowsTogether ? a.width : k1 + kRowsTogether;
    Ahead<float> ahead(a.w + k1 * a.stride + from, run, a.stride, k2 - k1);
    int64_t j = from;
    if (n <= kFew)
      for (; j + 4 * L <= from + run; j += 4 * L) affine_block<4, kFew>(a, Block{k0, k1, j, L}, n, &ahead);
    for (; j < to; j += 2 * L) {
      const int64_t left = a.width - j;
      if (left > L)
        affine_block<2, DEQ_TILE_ROWS>(a, Block{k0, k1, j, left < 2 * L ? left - L : L}, n, &ahead);
      else
        affine_block<1, DEQ_TILE_ROWS>(a, Block{k0, k1, j, left}, n, nullptr);
    }
  }
}

void affine(const Affine& a, int n) {
  if (a.lanes) {
    with_shape(n, [&](auto shape) { affine_rows<shape.S, shape.R, shape.NV>(a, n); });
    return;
  }
  for (int64_t from = a.from; from < a.to; from += kColumnsTogether)
    affine_columns(a, n, from, a.to < from + kColumnsTogether ? a.to : from + kColumnsTogether);
}

}  // namespace
