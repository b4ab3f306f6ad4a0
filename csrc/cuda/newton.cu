// Launches of NewtonRescue.
#include <algorithm>

#include "launch.h"
#include "newton.h"

namespace deq {
namespace {

__global__ void __launch_bounds__(kRescueThreads, 1) rescue_samples(const __grid_constant__ Rescue rescue) {
  extern __shared__ __align__(16) char shared[];
  NewtonRescue<Device>(rescue, shared).run();
}

}  // namespace

int32_t complete_rescue(int64_t width, const Limits& limits, DeqCudaPlan* plan) {
  const bool is_shared = jacobian_is_shared(width, limits.shared);
  plan->threads = kRescueThreads;
  plan->shared = newton_vector_bytes(width) + (is_shared ? jacobian_bytes(width) : 0);
  plan->scratch = is_shared ? 0 : plan->blocks * jacobian_bytes(width);
  if (rescued_by_a_block(width) < 1 || plan->shared > limits.shared)
    return failed(DEQ_NOT_SUPPORTED, "a Newton step of width %lld takes a block too long", static_cast<long long>(width));
  return DEQ_OK;
}

int32_t plan_rescue(int64_t samples, int64_t width, const Limits& limits, DeqCudaPlan* plan) {
  const int64_t by_memory =
      jacobian_is_shared(width, limits.shared) ? samples : std::max<int64_t>(1, kJacobianBytes / jacobian_bytes(width));
  plan->blocks = static_cast<int32_t>(std::min<int64_t>({samples, by_memory, limits.processors}));
  if (int32_t error = complete_rescue(width, limits, plan)) return error;
  return allow_shared(rescue_samples, limits);
}

int32_t launch_rescue(const Rescue& rescue, const DeqCudaPlan& plan, cudaStream_t stream) {
  rescue_samples<<<plan.blocks, plan.threads, plan.shared, stream>>>(rescue);
  return check_cuda(cudaGetLastError(), "the launch of the Newton rescue");
}

}  // namespace deq
