// Regime A: launches of BlockSolve.
#include <algorithm>

#include "block_solve.h"
#include "capacity.h"
#include "launch.h"

namespace deq {
namespace {

template <int KERNEL>
__global__ void __launch_bounds__(kBlockKernels[KERNEL].threads, 1) solve_block(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char shared[];
  BlockSolve<Device, kBlockKernels[KERNEL].rows, kBlockKernels[KERNEL].held>(call, shared).run();
}

using Kernel = void (*)(Call);
constexpr Kernel kKernels[kBlockKernelCount] = {solve_block<0>, solve_block<1>, solve_block<2>};

// Weights of a launch, whose blocks have scratch of their own each: a grid has no more rows, and what waits for its turn in a
// later launch shares that of those before. The last blocks of a launch leave a part of the device idle: a small one of so many.
constexpr int64_t kMostRows = 65535, kTurns = 16;

int64_t weights_at_once(int64_t weights, int64_t blocks, const Limits& limits) {
  return std::min({weights, kMostRows, std::max<int64_t>(1, kTurns * limits.processors / blocks)});
}

int32_t launch_stretch(const Call& call, int64_t weights, const DeqCudaPlan& plan, const Limits& limits, cudaStream_t stream) {
  const dim3 grid(plan.blocks, static_cast<unsigned>(weights));
  if (limits.clusters && shares_weight(call.width, plan.blocks)) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = plan.threads;
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int together = 0;  // clusters that a device has room for, which depends on how its multiprocessors are grouped
    const bool fits = cudaOccupancyMaxActiveClusters(&together, kKernels[plan.kernel], &config) == cudaSuccess &&
                      static_cast<int64_t>(together) * kCluster >= plan.blocks * weights;
    if (fits && cudaLaunchKernelEx(&config, kKernels[plan.kernel], call) == cudaSuccess) return DEQ_OK;
    cudaGetLastError();  // then every block reads all of W
  }
  kKernels[plan.kernel]<<<grid, plan.threads, plan.shared, stream>>>(call);
  return check_cuda(cudaGetLastError(), "the launch of a block solve");
}

}  // namespace

int32_t complete_block(int64_t weights, int64_t width, const Limits& limits, DeqCudaPlan* plan) {
  if (plan->kernel < 0 || plan->kernel >= kBlockKernelCount || !holds(kBlockKernels[plan->kernel], width) || plan->blocks < 1)
    return failed(DEQ_BAD_ARGUMENT, "kernel %d in %d blocks is no plan for width %lld", plan->kernel, plan->blocks,
                  static_cast<long long>(width));
  const BlockKernel& kernel = kBlockKernels[plan->kernel];
  const BlockLayout at = block_layout(width, kernel.rows, kernel.held);
  plan->regime = DEQ_BLOCK;
  plan->threads = (at.warps + 1) * kWarp, plan->shared = at.bytes;
  if (at.bytes + at.exchange <= limits.shared) plan->shared += at.exchange;
  plan->scratch =
      weights_at_once(weights, plan->blocks, limits) * plan->blocks * block_scratch(width) * static_cast<int64_t>(sizeof(float));
  return DEQ_OK;
}

int32_t plan_block(int64_t weights, int64_t batch, int64_t width, const Limits& limits, DeqCudaPlan* plan) {
  plan->kernel = block_kernel(width, limits.shared);
  plan->blocks = 1;
  if (plan->kernel < 0)
    return failed(DEQ_NOT_SUPPORTED, "a weight of width %lld does not fit into the %d bytes of one multiprocessor",
                  static_cast<long long>(width), limits.shared);
  if (int32_t error = complete_block(weights, width, limits, plan)) return error;
  if (int32_t error = allow_shared(kKernels[plan->kernel], limits)) return error;
  int resident = 0;
  if (int32_t error = check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kKernels[plan->kernel], plan->threads,
                                                                               static_cast<size_t>(plan->shared)),
                                 "counting blocks"))
    return error;
  if (resident < 1) return failed(DEQ_NOT_SUPPORTED, "no block of %d threads fits a multiprocessor", plan->threads);
  // Samples are spread over all blocks first: eight in one take no longer than one.
  const int64_t all = static_cast<int64_t>(resident) * limits.processors, share = std::max<int64_t>(1, all / weights);
  plan->blocks = static_cast<int32_t>(limits.clusters ? block_count(width, batch, share) : std::min(batch, share));
  return complete_block(weights, width, limits, plan);
}

int32_t launch_block(Call call, int64_t weights, const DeqCudaPlan& plan, const Limits& limits, cudaStream_t stream) {
  const BlockKernel& kernel = kBlockKernels[plan.kernel];
  call.exchanges = plan.shared > block_layout(call.width, kernel.rows, kernel.held).bytes;
  const int64_t most = weights_at_once(weights, plan.blocks, limits);
  for (call.first_weight = 0; call.first_weight < weights; call.first_weight += most)
    if (int32_t error = launch_stretch(call, std::min(most, weights - call.first_weight), plan, limits, stream)) return error;
  return DEQ_OK;
}

}  // namespace deq
