// What the CUDA library asks of CUDA: plans and launches against a runtime that remembers them and fails where it is told to, in
// place of NVIDIA's. Linked with the library's own objects.
#include <cuda_runtime_api.h>
#include <math.h>

#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/capacity.h"
#include "cuda_kernels.h"

namespace {

struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t shared;
  bool cooperative;
  unsigned cluster;
};

// A GPU of 132 multiprocessors, to begin with.
struct Fake {
  int major = 9, processors = 132, shared = 227 << 10, cooperates = 1, clusters = 1, resident = 1, clusters_together = 16;
  std::string fails;  // the function that returns an error
  std::vector<Launch> launches;
  std::map<const void*, std::string> names;
  cudaError_t last = cudaSuccess;
  dim3 grid, block;
  size_t bytes = 0;

  cudaError_t result(const char* function) {
    if (fails != function) return cudaSuccess;
    return last = cudaErrorCooperativeLaunchTooLarge;
  }
  cudaError_t launch(const char* function, const void* kernel, dim3 at, dim3 threads, size_t shared_bytes, bool together,
                     unsigned cluster) {
    if (cudaError_t error = result(function)) return error;
    launches.push_back({names[kernel], at, threads, shared_bytes, together, cluster});
    return cudaSuccess;
  }
};

Fake& fake() {  // kernels are registered before main
  static Fake it;
  return it;
}

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  fake().names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  fake().grid = grid, fake().block = block, fake().bytes = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = fake().grid, *block = fake().block, *shared = fake().bytes;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return fake().launch("cudaLaunchKernel", reinterpret_cast<const void*>(kernel), grid, block, shared, false, 1);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return fake().launch("cudaLaunchKernel", kernel, grid, block, shared, false, 1);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return fake().launch("cudaLaunchCooperativeKernel", kernel, grid, block, shared, true, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  return fake().launch("cudaLaunchKernelExC", kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, false,
                       cluster);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = fake().major;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = fake().processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = fake().shared;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = fake().cooperates;
      break;
    case cudaDevAttrClusterLaunch:
      *value = fake().clusters;
      break;
    default:
      *value = -1;
  }
  return fake().result("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  CHECK(value <= fake().shared);
  return fake().result("cudaFuncSetAttribute");
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = fake().resident;
  return fake().result("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = fake().clusters_together;
  return fake().result("cudaOccupancyMaxActiveClusters");
}
cudaError_t cudaGetDevice(int* device) {
  *device = 1;
  return fake().result("cudaGetDevice");
}
cudaError_t cudaSetDevice(int) { return fake().result("cudaSetDevice"); }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return fake().result("cudaMemsetAsync"); }
cudaError_t cudaGetLastError() {
  const cudaError_t error = fake().last;
  fake().last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "so it was told"; }

// Of measurements, which are not run here.
cudaError_t cudaMalloc(void**, size_t) { return cudaErrorMemoryAllocation; }
cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t*) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
}

namespace {

void reset() {
  auto names = fake().names;
  fake() = Fake{};
  fake().names = names;
}

bool says(const char* text) { return std::string(deq_cuda_why()).find(text) != std::string::npos; }

// Nothing is read where the pointers go: no kernel runs.
DeqProblem problem(int64_t B, int64_t m, int64_t S = 1) {
  static DeqReport report;
  DeqProblem p{};
  p.weights = S, p.batch = B, p.width = m;
  p.W = {&report, {m * m, m, 1}}, p.injection = p.out = {&report, {B * m, m, 1}};
  p.report = &report, p.max_iter = 100, p.tol = 1e-4;
  return p;
}

// Plans and solves; the error of whichever fails.
int32_t solve(int64_t B, int64_t m, int32_t regime = -1, DeqCudaPlan* planned = nullptr, int64_t S = 1) {
  DeqCudaPlan plan;
  if (int32_t error = deq_cuda_plan(S, B, m, 0, regime, &plan)) return error;
  if (planned) *planned = plan;
  const DeqProblem p = problem(B, m, S);
  fake().launches.clear();
  return deq_cuda_solve(&p, plan.regime, plan.kernel, plan.blocks, nullptr, plan.scratch, 0, nullptr);
}

void check_launch(size_t i, const char* kernel, unsigned blocks, bool cooperative = false, unsigned cluster = 1) {
  if (!CHECK(i < fake().launches.size())) return;
  const Launch& launch = fake().launches[i];
  CHECK(launch.kernel.find(kernel) != std::string::npos);
  CHECK(launch.grid.x * (cooperative ? launch.grid.y : 1) == blocks && launch.cooperative == cooperative &&
        launch.cluster == cluster);
  CHECK(launch.shared <= static_cast<size_t>(fake().shared));
}

void regimes() {
  reset();
  CHECK(solve(1024, 256) == DEQ_OK);  // one multiprocessor holds W; W is read once a cluster
  check_launch(0, "solve_block", 128, false, deq::kCluster);
  CHECK(solve(5, 256) == DEQ_OK);
  check_launch(0, "solve_block", 5);
  fake().clusters_together = 15;
  CHECK(solve(1024, 256) == DEQ_OK);
  check_launch(0, "solve_block", 128);
  reset();
  fake().fails = "cudaLaunchKernelExC";  // no cluster, but blocks
  CHECK(solve(1024, 256) == DEQ_OK);
  check_launch(0, "solve_block", 128);
  CHECK(cudaGetLastError() == cudaSuccess);
  reset();
  fake().clusters = 0;
  CHECK(solve(1024, 256) == DEQ_OK);
  check_launch(0, "solve_block", 132);
  reset();
  CHECK(solve(8, 2048) == DEQ_OK);  // all of them together hold W
  check_launch(0, "solve_grid", 128, true);
  CHECK(solve(8, 64, DEQ_GRID) == DEQ_OK);  // a group of blocks for every sample
  check_launch(0, "solve_grid", 32, true);
  CHECK(solve(256, 1024) == DEQ_OK);
  check_launch(0, "solve_grid", 128, true);
  CHECK(solve(9, 600, DEQ_GRID, nullptr, 20) == DEQ_OK);  // thirteen weights at once, a group each, then seven
  CHECK(fake().launches.size() == 2);
  check_launch(0, "solve_grid", 130, true);
  check_launch(1, "solve_grid", 70, true);
}

int32_t pack(int64_t m, int64_t S = 1) {
  static float here;
  const DeqView W{&here, {m * m, 1, m}};
  fake().launches.clear();
  return deq_cuda_pack(&W, S, m, &here, 0, nullptr);
}

// A grid has 65535 rows at most, and what is solved later shares the scratch of what is solved before.
void stacks() {
  reset();
  DeqCudaPlan few, many;
  CHECK(solve(1, 64, DEQ_BLOCK, &few, 2000) == DEQ_OK && fake().launches.size() == 1 && fake().launches[0].grid.y == 2000);
  CHECK(solve(1, 64, DEQ_BLOCK, &many, 70000) == DEQ_OK);
  unsigned weights = 0;
  for (size_t i = 0; i < fake().launches.size(); ++i) {
    check_launch(i, "solve_block", 1);
    weights += fake().launches[i].grid.y;
  }
  CHECK(weights == 70000 && many.scratch - 70000 * 16 < few.scratch * 2);
  CHECK(solve(1, 600, DEQ_GRID, nullptr, 70000) == DEQ_OK);
  CHECK(pack(3, 70000) == DEQ_OK && fake().launches.size() == 2 && fake().launches[0].grid.y == 65535 &&
        fake().launches[1].grid.y == 70000 - 65535);
}

void refusals() {
  reset();
  CHECK(solve(8, 4225) == DEQ_NOT_SUPPORTED && says("does not fit into 132 multiprocessors"));
  CHECK(solve(8, 400, DEQ_BLOCK) == DEQ_NOT_SUPPORTED && says("does not fit into the 232448 bytes of one multiprocessor"));
  fake().cooperates = 0;
  CHECK(solve(8, 2048) == DEQ_NOT_SUPPORTED && says("no cooperative launches"));
  reset();
  fake().resident = 0;
  CHECK(solve(8, 100, DEQ_BLOCK) == DEQ_NOT_SUPPORTED && solve(8, 2048) == DEQ_NOT_SUPPORTED && says("no block of"));
  reset();
  fake().shared = 48 << 10;
  CHECK(solve(8, 4096) == DEQ_NOT_SUPPORTED);
  fake().major = 7;
  CHECK(solve(8, 100) == DEQ_NOT_SUPPORTED && says("compute capability 7, 8 is needed"));
  reset();
  DeqCudaPlan plan;
  CHECK(solve(8, 100, -1, &plan) == DEQ_OK);
  const DeqProblem p = problem(8, 100);
  CHECK(deq_cuda_solve(&p, plan.regime, plan.kernel, plan.blocks, nullptr, plan.scratch - 1, 0, nullptr) == DEQ_BAD_ARGUMENT);
  CHECK(says("scratch holds"));
  CHECK(deq_cuda_solve(&p, plan.regime, 99, plan.blocks, nullptr, plan.scratch, 0, nullptr) == DEQ_BAD_ARGUMENT);
}

DeqCudaSubstitution substitution(int64_t B, int64_t m) {
  static float here;
  DeqCudaSubstitution s{};
  s.batch = B, s.width = m, s.residual = &here;
  s.W = {&here, {m * m, m, 1}}, s.injection = s.out = {&here, {B * m, m, 1}};
  return s;
}

int32_t substitute(int64_t B, int64_t m, int64_t missing = 0) {
  const DeqCudaSubstitution s = substitution(B, m);
  fake().launches.clear();
  return deq_cuda_substitute(&s, nullptr, deq_cuda_substitute_bytes(B, m) - missing, 0, nullptr);
}

int32_t rescue(int64_t B, int64_t m, int64_t missing = 0) {
  DeqCudaPlan plan;
  if (int32_t error = deq_cuda_rescue_plan(1, B, m, 0, &plan)) return error;
  const DeqProblem p = problem(B, m);
  fake().launches.clear();
  return deq_cuda_rescue(&p, plan.blocks, nullptr, plan.scratch - missing, 0, nullptr);
}

void others() {
  reset();
  CHECK(substitute(20, 50) == DEQ_OK);
  check_launch(0, "pack_triangle", 1);
  check_launch(1, "substituteILi1E", 3);
  CHECK(substitute(1057, 50) == DEQ_OK);
  check_launch(1, "substituteILi4E", 34);
  CHECK(substitute(0, 50) == DEQ_OK && fake().launches.empty());
  CHECK(substitute(20, 50, 1) == DEQ_BAD_ARGUMENT && says("scratch holds"));
  CHECK(pack(100, 3) == DEQ_OK && fake().launches[0].grid.y == 3);
  check_launch(0, "pack_weight", 16);
  CHECK(pack(0) == DEQ_OK && fake().launches.empty() && pack(-1) == DEQ_BAD_ARGUMENT && says("out of range"));
  CHECK(rescue(1000, 100) == DEQ_OK);  // the Jacobian finds room in shared memory
  check_launch(0, "rescue_samples", 132);
  CHECK(rescue(1000, 512) == DEQ_OK);
  check_launch(0, "rescue_samples", 31);  // as many as 64 MB hold
  CHECK(rescue(1000, 512, 1) == DEQ_BAD_ARGUMENT);
  CHECK(rescue(3, 1024) == DEQ_OK && rescue(3, 1100) == DEQ_NOT_SUPPORTED && says("takes a block too long"));
}

// Whatever fails, the caller is told, with CUDA's own words, and no error is left behind for the next call.
void failures() {
  const struct {
    const char* function;
    std::vector<int32_t (*)()> calls;
  } all[] = {
      {"cudaDeviceGetAttribute",
       {[] { return solve(8, 100); }, [] { return substitute(8, 100); }, [] { return rescue(8, 100); }}},
      {"cudaGetDevice", {[] { return solve(8, 100); }, [] { return substitute(8, 100); }, [] { return rescue(8, 100); }}},
      {"cudaSetDevice", {[] { return solve(8, 100); }, [] { return substitute(8, 100); }, [] { return rescue(8, 100); }}},
      {"cudaFuncSetAttribute", {[] { return solve(8, 100); }, [] { return solve(8, 2048); }, [] { return rescue(8, 100); }}},
      {"cudaOccupancyMaxActiveBlocksPerMultiprocessor", {[] { return solve(8, 100); }, [] { return solve(8, 2048); }}},
      {"cudaMemsetAsync", {[] { return solve(8, 2048); }}},
      {"cudaLaunchCooperativeKernel", {[] { return solve(8, 2048); }}},
      {"cudaLaunchKernel",
       {[] { return solve(8, 100); }, [] { return pack(8); }, [] { return substitute(8, 100); }, [] { return rescue(8, 100); }}},
  };
  for (const auto& [function, calls] : all)
    for (const auto& call : calls) {
      reset();
      fake().fails = function;
      if (!CHECK(call() == DEQ_LAUNCH_FAILED && says("so it was told"))) std::printf("%s: %s\n", function, deq_cuda_why());
      fake().fails = "";
      CHECK(cudaGetLastError() == cudaSuccess && call() == DEQ_OK);
    }
}

}  // namespace

int main() {
  regimes();
  stacks();
  refusals();
  others();
  failures();
  return check_result();
}
