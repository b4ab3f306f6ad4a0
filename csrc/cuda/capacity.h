// Which kernel serves which width, by what it needs of a multiprocessor; deq/cuda_capacity.py has the same in Python.
// What there is no kernel for, and why, is in README.md beside this file.
#pragma once
#include <initializer_list>

#include "block_solve.h"
#include "grid_solve.h"

namespace deq {

// The instances of BlockSolve: tiles a warp, k-steps held in registers, threads of the largest block.
struct BlockKernel {
  int rows, held, threads;
};
constexpr BlockKernel kBlockKernels[] = {{1, 0, 288}, {2, 0, 352}, {2, 2, 384}};
constexpr int kBlockKernelCount = 3;

inline bool holds(const BlockKernel& kernel, int64_t width) {
  return tiles_of(width) <= kernel.rows * (kernel.threads / kWarp - 1) && tiles_of(width) > kernel.held;
}

// The first kernel that holds a W of this width in `shared` bytes a block, or -1.
inline int block_kernel(int64_t width, int64_t shared) {
  for (int i = 0; i < kBlockKernelCount; ++i)
    if (holds(kBlockKernels[i], width) && block_layout(width, kBlockKernels[i].rows, kBlockKernels[i].held).bytes <= shared)
      return i;
  return -1;
}

// Blocks of a cluster, which share one read of W; more are not portable.
constexpr int kCluster = 8;
// Bytes of W that all blocks read together from which a cluster pays: 1.4 us at 6.2 TB/s, for two barriers of 0.25 us (H200).
constexpr int64_t kSharedFrom = 8 << 20;

// Whether so many blocks are launched in clusters, where the device has any.
inline bool shares_weight(int64_t width, int64_t blocks) {
  return blocks % kCluster == 0 && blocks * width * width * static_cast<int64_t>(sizeof(float)) >= kSharedFrom;
}

// The blocks of a plan for `batch` samples: of so many that could run, those that make whole clusters while that leaves no sample
// to wait for longer. A batch that comes in many turns needs every multiprocessor.
inline int64_t block_count(int64_t width, int64_t batch, int64_t possible) {
  const int64_t blocks = batch < possible ? batch : possible, whole = blocks / kCluster * kCluster;
  constexpr int64_t kTurns = 4;
  return shares_weight(width, whole) && batch <= kTurns * kSlots * whole ? whole : blocks;
}

// The instances of GridSolve: tiles a block, eights of slots, k-steps of a warp held in registers.
struct GridKernel {
  int rows, columns, held;
};
constexpr GridKernel kGridKernels[] = {{1, 1, 0}, {1, 4, 0}, {2, 1, 7}};
constexpr int kGridKernelCount = 3;

inline bool holds(const GridKernel& kernel, int64_t width, int processors, int64_t shared) {
  const GridLayout at = grid_layout(width, kernel.rows, kernel.columns, kernel.held);
  return at.blocks <= processors && at.steps / kGridWarps >= kernel.held && at.bytes <= shared;
}

// The kernel for `batch` samples of a W of this width on so many multiprocessors with `shared` bytes a block, or -1. More samples
// than slots are solved one after the other.
inline int grid_kernel(int64_t width, int64_t batch, int processors, int64_t shared) {
  if (batch > kSlots && holds(kGridKernels[1], width, processors, shared)) return 1;
  for (int i : {0, 2})
    if (holds(kGridKernels[i], width, processors, shared)) return i;
  return -1;
}

}  // namespace deq
