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

// The instances of GridSolve: tiles a block, eights of slots, k-steps of a warp held in registers; those with less for a block to
// do in an evaluation first, and last the one that holds the widest W.
struct GridKernel {
  int rows, columns, held;
};
constexpr GridKernel kGridKernels[] = {{1, 1, 0}, {2, 4, 0}, {4, 4, 0}, {2, 1, 7}};
constexpr int kGridKernelCount = 4;

// The groups that so many multiprocessors with `shared` bytes a block have room for; 0 where they do not hold W.
inline int64_t possible_groups(const GridKernel& kernel, int64_t width, int processors, int64_t shared) {
  const GridLayout at = grid_layout(width, kernel.rows, kernel.columns, kernel.held);
  const bool fits = at.steps / kGridWarps >= kernel.held && at.bytes <= shared;
  return fits ? processors / at.blocks : 0;
}

// The kernel for `batch` samples of each of so many W of this width: the first that solves all of them at once, or else the most;
// -1 if none holds W.
inline int grid_kernel(int64_t width, int64_t weights, int64_t batch, int processors, int64_t shared) {
  int best = -1;
  int64_t most = 0;
  for (int i = 0; i < kGridKernelCount; ++i) {
    const int64_t slots = kGridKernels[i].columns * kSlots, groups = possible_groups(kGridKernels[i], width, processors, shared);
    if (groups > 0 && groups >= weights * ((batch + slots - 1) / slots)) return i;
    if (groups * slots > most) best = i, most = groups * slots;
  }
  return best;
}

// How so many groups are shared out: groups of a weight, no more than it has samples, and weights that are solved at once. The
// fewer samples a group has, the fewer wait for another's anchor.
struct GridShares {
  int64_t groups, weights;
};
inline GridShares grid_shares(int64_t weights, int64_t batch, int64_t possible) {
  int64_t groups = possible / weights;
  if (groups > batch) groups = batch;
  if (groups < 1) groups = 1;
  return {groups, weights < possible / groups ? weights : possible / groups};
}

}  // namespace deq
