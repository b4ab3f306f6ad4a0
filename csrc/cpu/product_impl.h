// Products of two matrices for one instruction set: the gradient of a weight, whose inner dimension is the batch, and the inverse
// of the Cayley map. On a core of AMD torch's own reach less than half of what it can (Zen 5: 113 of 283 GFLOP/s in float32,
// these 230 to 260).
#pragma once
#include <algorithm>

#include "kernels.h"
#include "pack_impl.h"
#include "vec.h"

namespace {

using deq::Product;

constexpr int64_t kDepth = 256;  // most of the inner dimension at a time: a panel of the right matrix takes 32 KB
// Up to this inner dimension the time goes into writing the result: rows are finished one tile after the other, and nothing is
// packed that is used but once.
constexpr int64_t kThin = 64;

// sums[r][v] = sum over k < depth of left(r, k) right(k, v), in the order of k. ROWS: left(r, k) is left[r * left_stride + k],
// else left[k * left_stride + r].
template <class T, int NV, bool ROWS>
DEQ_INLINE void product_tile(const T* left, int64_t left_stride, int rows, const T* right, int64_t right_stride, int64_t depth,
                             typename VecMath<T>::V (&sums)[DEQ_TILE_ROWS][NV]) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int R = DEQ_TILE_ROWS;
  [[maybe_unused]] const T* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    row[r] = left + (ROWS ? std::min(r, rows - 1) * left_stride : 0);  // rows that are not there: the last one again
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sums[r][v] = V{};
  }
  for (int64_t k = 0; k < depth; ++k, right += right_stride) {
    V b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) b[v] = M::load(right + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V a = (ROWS ? row[r][k] : left[k * left_stride + r]) - V{};
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sums[r][v] += a * b[v];
    }
  }
}

// One tile of the result, `rows` x `columns` of it; or several side by side, whole ones, each with the columns of the right
// matrix behind those of the one before.
template <class T, int NV, bool ROWS>
__attribute__((noinline)) void product_block(const Product<T>& p, const T* left, int64_t left_stride, int rows, const T* right,
                                             int64_t right_stride, int64_t depth, int64_t columns, int64_t tiles, T* out,
                                             bool adds, bool streams) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int64_t L = kLanes<T>;
  V sums[DEQ_TILE_ROWS][NV];
  const V factor = p.factor - V{};
  if (rows == DEQ_TILE_ROWS && columns == NV * L) {
    for (int64_t i = 0; i < tiles; ++i, right += NV * L, out += NV * L) {
      product_tile<T, NV, ROWS>(left, left_stride, rows, right, right_stride, depth, sums);
      T* to = out;
#pragma GCC unroll 16
      for (int r = 0; r < DEQ_TILE_ROWS; ++r, to += p.out_stride)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          const V x = factor * sums[r][v];
          if (streams)
            M::stream(to + v * L, x);
          else
            M::store(to + v * L, adds ? M::load(to + v * L) + x : x);
        }
    }
    return;
  }
  product_tile<T, NV, ROWS>(left, left_stride, rows, right, right_stride, depth, sums);
  T part[DEQ_TILE_ROWS][NV * L];
#pragma GCC unroll 16
  for (int r = 0; r < DEQ_TILE_ROWS; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) M::store(part[r] + v * L, factor * sums[r][v]);
  for (int r = 0; r < rows; ++r, out += p.out_stride)
    for (int64_t j = 0; j < columns; ++j) out[j] = adds ? out[j] + part[r][j] : part[r][j];
}

// packed[k][r] of a tile of rows, zero where there is no row.
template <class T>
void pack_left(const T* left, int64_t row_stride, int64_t inner_stride, int rows, int64_t depth, T* packed) {
  constexpr int R = DEQ_TILE_ROWS;
  if (rows == R && row_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) memcpy(packed + k * R, left + k * inner_stride, R * sizeof(T));
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int r = 0; r < R; ++r) packed[k * R + r] = r < rows ? left[r * row_stride + k * inner_stride] : T(0);
}

// packed[k][j] of `width` columns, zero where there is none.
template <class T>
void pack_right(const T* right, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns, int64_t width,
                T* packed) {
  using M = VecMath<T>;
  if (row_stride == 1 && depth > 1) {  // columns are contiguous
    for (int64_t k = 0; k < depth && columns < width; ++k)
      std::fill(packed + k * width + columns, packed + (k + 1) * width, T(0));
    return Transposition<T>().run(right, column_stride, columns, depth, packed, width);
  }
  for (int64_t k = 0; k < depth; ++k, right += row_stride, packed += width) {
    if (columns == width && column_stride == 1) {
      for (int64_t j = 0; j < width; j += kLanes<T>) M::store(packed + j, M::load(right + j));
    } else {
      for (int64_t j = 0; j < width; ++j) packed[j] = j < columns ? right[j * column_stride] : T(0);
    }
  }
}

// Whether rows so far apart share few sets of a cache, so that they can be read where they are.
template <class T>
bool is_spread(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
}

// Rows [first, last) of the result.
template <class T>
void product_rows(const Product<T>& p, int64_t first, int64_t last, bool streams) {
  constexpr int64_t L = kLanes<T>, R = DEQ_TILE_ROWS;
  T *const panel = p.scratch, *const tiles = panel + kDepth * 2 * L;
  const bool few = last - first <= R;  // rows, so that packing a panel would cost as much as it saves
  const bool by_rows = p.left_inner == 1, as_it_is = by_rows || (p.left_row == 1 && (few || is_spread<T>(p.left_inner)));
  const bool right_as_it_is = p.right_column == 1 && (few || is_spread<T>(p.right_row));
  const int64_t chunks = std::max<int64_t>(1, (p.inner + kDepth - 1) / kDepth);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t k0 = p.inner * chunk / chunks, depth = p.inner * (chunk + 1) / chunks - k0;
    const bool adds = p.adds || k0 > 0;
    auto tile_at = [&](int64_t i) { return tiles + (i - first) / R * (R * kDepth); };
    auto lies_well = [&](int64_t i) { return as_it_is && (by_rows || last - i >= R); };
    for (int64_t i = first; i < last; i += R)
      if (!lies_well(i))
        pack_left(p.left + i * p.left_row + k0 * p.left_inner, p.left_row, p.left_inner, static_cast<int>(std::min(R, last - i)),
                  depth, tile_at(i));
    for (int64_t j = 0, tiles; j < p.columns; j += tiles * 2 * L) {
      const int64_t columns = std::min(2 * L, p.columns - j), width = columns > L ? 2 * L : L;
      const bool is_there = right_as_it_is && columns == width;
      tiles = is_there && last - first == R && width > L ? (p.columns - j) / width : 1;
      const T* right = p.right + k0 * p.right_row + j * p.right_column;
      if (!is_there) pack_right(right, p.right_row, p.right_column, depth, columns, width, panel);
      for (int64_t i = first; i < last; i += R) {
        const int rows = static_cast<int>(std::min(R, last - i));
        const bool in_place = lies_well(i);
        const T* left = in_place ? p.left + i * p.left_row + k0 * p.left_inner : tile_at(i);
        const int64_t left_stride = !in_place ? R : by_rows ? p.left_row : p.left_inner;
        const auto block = in_place && by_rows ? width > L ? product_block<T, 2, true> : product_block<T, 1, true>
                           : width > L         ? product_block<T, 2, false>
                                               : product_block<T, 1, false>;
        block(p, left, left_stride, rows, is_there ? right : panel, is_there ? p.right_row : width, depth, columns, tiles,
              p.out + i * p.out_stride + j, adds, streams);
      }
    }
  }
}

template <class T>
void product(const Product<T>& p) {
  constexpr int64_t R = DEQ_TILE_ROWS;
  const bool is_thin = p.inner <= kThin;
  const int64_t together = is_thin ? R : p.rows;
  const bool is_aligned = (reinterpret_cast<uintptr_t>(p.out) | p.out_stride * sizeof(T)) % DEQ_VECTOR_BYTES == 0;
  const bool streams = is_thin && is_aligned && p.is_large && !p.adds;
  for (int64_t i = 0; i < p.rows; i += together) product_rows(p, i, std::min(i + together, p.rows), streams);
  if (streams) VecMath<T>::fence();
}

// Elements of scratch memory for a product of so many rows.
template <class T>
int64_t product_scratch(int64_t rows) {
  constexpr int64_t R = DEQ_TILE_ROWS;
  return kDepth * (2 * kLanes<T> + (rows + R - 1) / R * R);
}

}  // namespace
