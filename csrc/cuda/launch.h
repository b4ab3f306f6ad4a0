// Host side that the CUDA files share: what failed, and the launches of each regime.
#pragma once
#include <cuda_runtime.h>

#include "../cuda_kernels.h"
#include "call.h"
#include "newton.h"

namespace deq {

// Remembers why this thread's call failed, for deq_cuda_why(), and returns `code`.
int32_t failed(int32_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// DEQ_OK, or DEQ_LAUNCH_FAILED with what CUDA said about `what`.
int32_t check_cuda(cudaError_t error, const char* what);

// DEQ_BAD_ARGUMENT, saying that scratch holds less than what is needed.
int32_t too_little(int64_t bytes, int64_t needed);

// The device that a call is for; the one before comes back at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    has_moved_ = error_ == cudaSuccess;
  }
  ~DeviceScope() {
    if (has_moved_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool has_moved_ = false;
  cudaError_t error_;
};

struct Limits {
  int processors, shared;  // and dynamic shared memory that a block may have
  int cooperates;          // whether all blocks of a launch can be resident together
  int clusters;            // whether blocks can be launched in clusters
};

// Of a device; DEQ_NOT_SUPPORTED for one that is too old for all kernels.
int32_t find_limits(int32_t device, Limits* limits);
// The same without asking CUDA again, where a plan has asked.
int32_t known_limits(int32_t device, Limits* limits);

// Lets a kernel have as much dynamic shared memory as a block can: once, when a launch of it is planned. What a launch needs is
// said there.
template <class Kernel>
int32_t allow_shared(Kernel* kernel, const Limits& limits) {
  return check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared),
                    "asking for shared memory");
}

// Regime A, one weight a row of blocks: completes a plan of its kernel and blocks, chooses both, and launches it.
int32_t complete_block(int64_t weights, int64_t width, const Limits& limits, DeqCudaPlan* plan);
int32_t plan_block(int64_t weights, int64_t batch, int64_t width, const Limits& limits, DeqCudaPlan* plan);
int32_t launch_block(Call call, int64_t weights, const DeqCudaPlan& plan, const Limits& limits, cudaStream_t stream);

// Regime C, as many weights at a time as there are groups for.
int32_t complete_grid(int64_t width, DeqCudaPlan* plan);
int32_t plan_grid(int64_t weights, int64_t batch, int64_t width, const Limits& limits, DeqCudaPlan* plan);
int32_t launch_grid(Call call, int64_t weights, const DeqCudaPlan& plan, cudaStream_t stream);

// Samples that failed, after a solve.
int32_t complete_rescue(int64_t width, const Limits& limits, DeqCudaPlan* plan);
int32_t plan_rescue(int64_t samples, int64_t width, const Limits& limits, DeqCudaPlan* plan);
int32_t launch_rescue(const Rescue& rescue, const DeqCudaPlan& plan, cudaStream_t stream);

}  // namespace deq
