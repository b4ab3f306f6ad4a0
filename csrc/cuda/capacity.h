// Which kernel serves which width, by what it needs of a multiprocessor. The C++ side of deq/gpu_plan.py's capacities.
#pragma once
#include "block_solve.h"

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

}  // namespace deq
