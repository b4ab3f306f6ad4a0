// Sums of outer products for one instruction set: the gradient of a weight, a product whose inner dimension is the batch. For a
// small batch it is bound by writing the result, once.
#pragma once
#include "vec.h"

namespace {

// out[i][j] = sum_b u[b][i] z[b][j] for MR rows i and NV vectors from column j.
template <class T, int MR, int NV>
DEQ_INLINE void outer_tile(const T* u, int64_t u_stride, const T* z, int64_t z_stride, int64_t batch, T* out,
                           int64_t out_stride) {
  using M = VecMath<T>;
  using V = typename M::V;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  for (int64_t b = 0; b < batch; ++b, u += u_stride, z += z_stride) {
    V right[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) right[v] = M::load(z + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const V left = u[r] - V{};
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) M::store(out + r * out_stride + v * kLanes<T>, acc[r][v]);
}

// MR rows over all columns. The last vector may overlap the one before: what both write is the same.
template <class T, int MR>
__attribute__((noinline)) void outer_rows(const T* u, int64_t u_stride, const T* z, int64_t z_stride, int64_t batch,
                                          int64_t columns, T* out) {
  const int64_t L = kLanes<T>;
  int64_t j = 0;
  for (; j + 2 * L <= columns; j += 2 * L) outer_tile<T, MR, 2>(u, u_stride, z + j, z_stride, batch, out + j, columns);
  for (; j < columns && columns >= L; j += L) {
    j = j < columns - L ? j : columns - L;
    outer_tile<T, MR, 1>(u, u_stride, z + j, z_stride, batch, out + j, columns);
  }
  for (; j < columns; ++j)
    for (int r = 0; r < MR; ++r) {
      T sum = 0;
      for (int64_t b = 0; b < batch; ++b) sum += u[b * u_stride + r] * z[b * z_stride + j];
      out[r * columns + j] = sum;
    }
}

template <class T>
void outer(const T* u, int64_t u_stride, const T* z, int64_t z_stride, int64_t batch, int64_t columns, T* out, int64_t first,
           int64_t last) {
  int64_t i = first;
  for (; i + DEQ_TILE_ROWS <= last; i += DEQ_TILE_ROWS)
    outer_rows<T, DEQ_TILE_ROWS>(u + i, u_stride, z, z_stride, batch, columns, out + i * columns);
  for (; i < last; ++i) outer_rows<T, 1>(u + i, u_stride, z, z_stride, batch, columns, out + i * columns);
}

}  // namespace
