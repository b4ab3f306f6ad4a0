// Regime C: launches of GridSolve.
#include "capacity.h"
#include "grid_solve.h"
#include "launch.h"

namespace deq {
namespace {

template <int KERNEL>
__global__ void __launch_bounds__(kGridThreads, 1) solve_grid(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char shared[];
  constexpr GridKernel kernel = kGridKernels[KERNEL];
  GridSolve<Device, kernel.rows, kernel.columns, kernel.held>(call, shared).run();
}

using Kernel = void (*)(Call);
constexpr Kernel kKernels[kGridKernelCount] = {solve_grid<0>, solve_grid<1>, solve_grid<2>, solve_grid<3>};

}  // namespace

int32_t complete_grid(int64_t width, DeqCudaPlan* plan) {
  const bool is_known = plan->kernel >= 0 && plan->kernel < kGridKernelCount;
  const GridKernel kernel = kGridKernels[is_known ? plan->kernel : 0];
  const GridLayout at = grid_layout(width, kernel.rows, kernel.columns, kernel.held);
  if (!is_known || plan->blocks < at.blocks || plan->blocks % at.blocks != 0 || at.steps / kGridWarps < kernel.held)
    return failed(DEQ_BAD_ARGUMENT, "kernel %d in %d blocks is no plan for width %lld", plan->kernel, plan->blocks,
                  static_cast<long long>(width));
  plan->regime = DEQ_GRID;
  plan->threads = kGridThreads, plan->shared = at.bytes;
  const GridScratch in = grid_scratch(width, kernel.rows, kernel.columns);
  plan->scratch = plan->blocks / at.blocks * (in.flags + in.floats) * static_cast<int64_t>(sizeof(float));
  return DEQ_OK;
}

int32_t plan_grid(int64_t weights, int64_t batch, int64_t width, const Limits& limits, DeqCudaPlan* plan) {
  if (!limits.cooperates) return failed(DEQ_NOT_SUPPORTED, "the device has no cooperative launches");
  plan->kernel = grid_kernel(width, weights, batch, limits.processors, limits.shared);
  if (plan->kernel < 0)
    return failed(DEQ_NOT_SUPPORTED, "a weight of width %lld does not fit into %d multiprocessors of %d bytes",
                  static_cast<long long>(width), limits.processors, limits.shared);
  const GridKernel kernel = kGridKernels[plan->kernel];
  const int blocks = grid_layout(width, kernel.rows, kernel.columns, kernel.held).blocks;
  const GridShares shares = grid_shares(weights, batch, limits.processors / blocks);
  plan->blocks = blocks * static_cast<int32_t>(shares.groups * shares.weights);
  if (int32_t error = complete_grid(width, plan)) return error;
  if (int32_t error = allow_shared(kKernels[plan->kernel], limits)) return error;
  int resident = 0;
  if (int32_t error = check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kKernels[plan->kernel], plan->threads,
                                                                               static_cast<size_t>(plan->shared)),
                                 "counting blocks"))
    return error;
  if (resident < 1) return failed(DEQ_NOT_SUPPORTED, "no block of %d threads fits a multiprocessor", plan->threads);
  return DEQ_OK;
}

int32_t launch_grid(Call call, int64_t weights, const DeqCudaPlan& plan, cudaStream_t stream) {
  const GridKernel kernel = kGridKernels[plan.kernel];
  const int blocks = grid_layout(call.width, kernel.rows, kernel.columns, kernel.held).blocks;
  const GridShares shares = grid_shares(weights, call.batch, plan.blocks / blocks);
  call.groups = static_cast<int32_t>(shares.groups);
  for (call.first_weight = 0; call.first_weight < weights; call.first_weight += shares.weights) {
    const int64_t left = weights - call.first_weight, groups = shares.groups * (left < shares.weights ? left : shares.weights);
    const int64_t flags = groups * grid_scratch(call.width, kernel.rows, kernel.columns).flags;
    if (int32_t error = check_cuda(cudaMemsetAsync(call.scratch, 0, flags * sizeof(float), stream), "lowering flags"))
      return error;
    void* arguments[] = {&call};
    if (int32_t error = check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kKernels[plan.kernel]),
                                                               dim3(blocks, static_cast<unsigned>(groups)), plan.threads,
                                                               arguments, static_cast<size_t>(plan.shared), stream),
                                   "the cooperative launch of a grid solve"))
      return error;
  }
  return DEQ_OK;
}

}  // namespace deq
