// A weight with strides of any kind to rows side by side, as the solving kernels read them: the transpose of an adjoint, mostly.
#pragma once
#include "../kernels.h"
#include "device.h"

namespace deq {

constexpr int kPackTile = 32, kPackThreads = 256;
constexpr int kPackFloats = kPackTile * (kPackTile + 1);  // an odd stride: a column lies in all banks

// One tile a block, the tiles of a weight row by row: read along columns, which lie side by side in a transpose.
template <class Gpu>
DEQ_GPU void pack_tile(const DeqView& from, float* to, int64_t width, float* tile) {
  const int64_t tiles = (width + kPackTile - 1) / kPackTile, weight = Gpu::row();
  const int64_t first_row = Gpu::block() / tiles * kPackTile, first_column = Gpu::block() % tiles * kPackTile;
  const int own = Gpu::thread() % kPackTile, others = Gpu::thread() / kPackTile;
  const float* source = static_cast<const float*>(from.data) + weight * from.stride[0];
  for (int j = others; j < kPackTile; j += kPackThreads / kPackTile) {
    const int64_t row = first_row + own, column = first_column + j;
    if (row < width && column < width) tile[j * (kPackTile + 1) + own] = source[row * from.stride[1] + column * from.stride[2]];
  }
  Gpu::sync();
  for (int i = others; i < kPackTile; i += kPackThreads / kPackTile) {
    const int64_t row = first_row + i, column = first_column + own;
    if (row < width && column < width) to[(weight * width + row) * width + column] = tile[own * (kPackTile + 1) + i];
  }
}

}  // namespace deq
