// The C interface of the CUDA kernels (csrc/cuda_kernels.h): checks, plans and queues; never waits for the device.
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "capacity.h"
#include "launch.h"
#include "pack.h"

namespace deq {
namespace {

thread_local char why[256] = "nothing has failed";

constexpr int64_t kNoteBytes = 256;  // what follows the notes begins at a multiple

__global__ void __launch_bounds__(kPackThreads) pack_weight(DeqView from, float* to, int64_t width) {
  __shared__ float tile[kPackFloats];
  pack_tile<Device>(from, to, width, tile);
}

int64_t note_bytes(int64_t samples) {
  return (samples * static_cast<int64_t>(sizeof(Note)) + kNoteBytes - 1) / kNoteBytes * kNoteBytes;
}

bool is_well_formed(const DeqProblem& p) {
  return p.weights >= 0 && p.batch >= 0 && p.width >= 1 && p.type == DEQ_FLOAT32 && p.activation >= 0 &&
         p.activation < kActivations && p.max_iter >= 1 && p.report && !p.reflected && (p.W.stride[2] == 1 || p.width == 1) &&
         (p.out.stride[2] == 1 || p.width == 1) && !(p.mask.data && p.mask_is_value && !has_of_value(p.activation));
}

Call call_of(const DeqProblem& p, void* scratch) {
  Call call{};
  call.batch = p.batch, call.width = p.width;
  call.W = static_cast<const float*>(p.W.data);
  call.row_stride = p.W.stride[1], call.matrix_stride = p.W.stride[0];
  call.injection = p.injection, call.start = p.start, call.mask = p.mask, call.out = p.out;
  call.activation = p.activation, call.mask_is_value = p.mask_is_value;
  call.reliable = {make_rule(p.tol, p.max_iter, p.criterion, p.width, false), kBfloat16Pollution, INFINITY, false};
  call.acceleration = p.acceleration;
  call.depth = std::clamp<int32_t>(p.depth, 1, kWindow);
  call.iterations = p.iterations, call.residual = static_cast<float*>(p.residual), call.status = p.status;
  call.report = p.report;
  call.notes = static_cast<Note*>(scratch);
  call.scratch = reinterpret_cast<float*>(static_cast<char*>(scratch) + note_bytes(p.weights * p.batch));
  return call;
}

}  // namespace

int32_t failed(int32_t code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(why, sizeof why, format, arguments);
  va_end(arguments);
  return code;
}

int32_t too_little(int64_t bytes, int64_t needed) {
  return failed(DEQ_BAD_ARGUMENT, "scratch holds %lld bytes, %lld are needed", static_cast<long long>(bytes),
                static_cast<long long>(needed));
}

int32_t check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return DEQ_OK;
  cudaGetLastError();  // an error that is not sticky must not be blamed on the next call
  return failed(DEQ_LAUNCH_FAILED, "%s failed: %s", what, cudaGetErrorString(error));
}

namespace {

// What plans have found out about the first devices: asking again took a call as long as two launches.
constexpr int kKnown = 64;
Limits known[kKnown];
std::atomic<bool> is_known[kKnown];

}  // namespace

int32_t known_limits(int32_t device, Limits* limits) {
  if (device < 0 || device >= kKnown || !is_known[device].load(std::memory_order_acquire)) return find_limits(device, limits);
  *limits = known[device];
  return DEQ_OK;
}

int32_t find_limits(int32_t device, Limits* limits) {
  int major = 0;
  for (const auto& [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&limits->processors, cudaDevAttrMultiProcessorCount},
        std::pair{&limits->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        std::pair{&limits->cooperates, cudaDevAttrCooperativeLaunch}, std::pair{&limits->clusters, cudaDevAttrClusterLaunch}})
    if (int32_t error = check_cuda(cudaDeviceGetAttribute(value, attribute, device), "asking for the device")) return error;
  if (major < 8) return failed(DEQ_NOT_SUPPORTED, "the device has compute capability %d, 8 is needed for bfloat16", major);
  static std::mutex one;
  const std::lock_guard<std::mutex> guard(one);
  if (device >= 0 && device < kKnown && !is_known[device]) {
    known[device] = *limits;
    is_known[device].store(true, std::memory_order_release);
  }
  return DEQ_OK;
}

}  // namespace deq

const char* deq_cuda_why(void) { return deq::why; }

int32_t deq_cuda_kernel(int32_t regime, int64_t width, int64_t batch, int32_t processors, int64_t shared) {
  if (width < 1) return -1;
  return regime == DEQ_GRID ? deq::grid_kernel(width, 1, batch, processors, shared) : deq::block_kernel(width, shared);
}

int32_t deq_cuda_plan(int64_t weights, int64_t batch, int64_t width, int32_t device, int32_t regime, DeqCudaPlan* plan) {
  using namespace deq;
  if (!plan || weights < 1 || batch < 1 || width < 1 || regime < -1 || regime > DEQ_GRID)
    return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  *plan = DeqCudaPlan{};
  Limits limits{};
  if (int32_t error = find_limits(device, &limits)) return error;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  int32_t error = regime == DEQ_GRID ? DEQ_NOT_SUPPORTED : plan_block(weights, batch, width, limits, plan);
  if (error == DEQ_NOT_SUPPORTED && regime != DEQ_BLOCK) error = plan_grid(weights, batch, width, limits, plan);
  if (error) return error;
  plan->scratch += note_bytes(weights * batch);
  return DEQ_OK;
}

int32_t deq_cuda_rescue_plan(int64_t weights, int64_t batch, int64_t width, int32_t device, DeqCudaPlan* plan) {
  using namespace deq;
  if (!plan || weights < 1 || batch < 1 || width < 1) return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  *plan = DeqCudaPlan{};
  Limits limits{};
  if (int32_t error = find_limits(device, &limits)) return error;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  return plan_rescue(weights * batch, width, limits, plan);
}

int32_t deq_cuda_pack(const DeqView* W, int64_t weights, int64_t width, float* packed, int32_t device, void* stream) {
  using namespace deq;
  if (!W || weights < 0 || width < 0) return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  if (weights * width == 0) return DEQ_OK;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  const int64_t tiles = (width + kPackTile - 1) / kPackTile;
  constexpr int64_t kMostRows = 65535;  // of a grid
  for (int64_t first = 0; first < weights; first += kMostRows) {
    DeqView from = *W;
    from.data = static_cast<float*>(W->data) + first * W->stride[0];
    const dim3 grid(static_cast<unsigned>(tiles * tiles), static_cast<unsigned>(std::min(kMostRows, weights - first)));
    pack_weight<<<grid, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(from, packed + first * width * width, width);
    if (int32_t error = check_cuda(cudaGetLastError(), "the launch of a copy of W")) return error;
  }
  return DEQ_OK;
}

int32_t deq_cuda_rescue(const DeqProblem* p, int32_t blocks, void* scratch, int64_t bytes, int32_t device, void* stream) {
  using namespace deq;
  if (!p || !is_well_formed(*p) || blocks < 1) return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  if (p->weights * p->batch == 0) return DEQ_OK;
  Limits limits{};
  if (int32_t error = known_limits(device, &limits)) return error;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  DeqCudaPlan plan{};
  plan.blocks = blocks;
  if (int32_t error = complete_rescue(p->width, limits, &plan)) return error;
  if (bytes < plan.scratch) return too_little(bytes, plan.scratch);
  const Rescue rescue{call_of(*p, nullptr), p->weights, p->tol, p->max_iter,
                      plan.scratch > 0 ? static_cast<double*>(scratch) : nullptr};
  return launch_rescue(rescue, plan, static_cast<cudaStream_t>(stream));
}

int32_t deq_cuda_solve(const DeqProblem* p, int32_t regime, int32_t kernel, int32_t blocks, void* scratch, int64_t bytes,
                       int32_t device, void* stream) {
  using namespace deq;
  if (!p || !is_well_formed(*p)) return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  if (p->weights * p->batch == 0) return DEQ_OK;
  Limits limits{};
  if (int32_t error = known_limits(device, &limits)) return error;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  DeqCudaPlan plan{};
  plan.kernel = kernel, plan.blocks = blocks;
  if (int32_t error = regime == DEQ_GRID ? complete_grid(p->width, &plan) : complete_block(p->weights, p->width, limits, &plan))
    return error;
  const int64_t needed = plan.scratch + note_bytes(p->weights * p->batch);
  if (bytes < needed) return too_little(bytes, needed);
  const Call call = call_of(*p, scratch);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (int32_t error = check_cuda(cudaMemsetAsync(p->report, 0xff, sizeof *p->report, queue), "clearing the report")) return error;
  return regime == DEQ_GRID ? launch_grid(call, p->weights, plan, queue) : launch_block(call, p->weights, plan, limits, queue);
}
