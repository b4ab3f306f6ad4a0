// Measures what the plan's formulas are made of: barriers, exchanges, chains of kernels, rates of one multiprocessor. The only
// file here that waits for the device; nothing calls it but `deq bench constants`.
#include <cooperative_groups.h>
#include <string.h>

#include <algorithm>
#include <utility>

#include "device.h"
#include "launch.h"

namespace deq {
namespace {

namespace groups = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kSteps = 2000;              // barriers, or passes, of the longer of two runs
constexpr int kCluster = 8;               // blocks of a cluster; more are not portable
constexpr int kWords = 64;                // data words that a block sends in an exchange: 16 outputs of 8 samples in bfloat16
constexpr int kBroadcast = 2048 * 8 / 4;  // Quads that all blocks read: the increments of 8 samples at width 4096

// Memory of a measurement; zero before every run.
struct Memory {
  uint32_t* flags;
  uint64_t* words;
  Quad* state;
  float* out;
};

__global__ void __launch_bounds__(kThreads, 1) grid_barrier(Memory, int steps) {
  const groups::grid_group grid = groups::this_grid();
  for (int i = 0; i < steps; ++i) grid.sync();
}

__global__ void __launch_bounds__(kThreads, 1) flag_barrier(Memory memory, int steps) {
  for (uint32_t epoch = 1; epoch <= static_cast<uint32_t>(steps); ++epoch) {
    Device::sync();
    if (threadIdx.x == 0) Device::release(memory.flags + blockIdx.x, epoch);
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
      while (Device::acquire(memory.flags + block) < epoch) {
      }
  }
}

// Data and flag in one word of eight bytes: no fence, no flag of its own. Every block reads the words of all.
__global__ void __launch_bounds__(kThreads, 1) word_exchange(Memory memory, int steps) {
  const unsigned words = gridDim.x * kWords;
  uint32_t sum = 0;
  for (uint32_t epoch = 1; epoch <= static_cast<uint32_t>(steps); ++epoch) {
    uint64_t* buffer = memory.words + (epoch & 1) * words;
    if (threadIdx.x < kWords)
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(buffer + blockIdx.x * kWords + threadIdx.x),
                   "l"(static_cast<uint64_t>(epoch) << 32 | (sum & 1))
                   : "memory");
    for (unsigned i = threadIdx.x; i < words; i += kThreads) {
      uint64_t word;
      do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(buffer + i) : "memory");
      while (word >> 32 < epoch);
      sum += static_cast<uint32_t>(word);
    }
    Device::sync();
  }
  if (sum == 1) memory.out[0] = 1;
}

__global__ void __launch_bounds__(kThreads, 1) broadcast(Memory memory, int steps) {
  uint32_t sum = 0;
  for (int i = 0; i < steps; ++i)
    for (int k = threadIdx.x; k < kBroadcast; k += kThreads) {
      const uint4 value = __ldcg(reinterpret_cast<const uint4*>(memory.state) + k);
      sum += value.x ^ value.y ^ value.z ^ value.w;
    }
  if (sum == 1) memory.out[0] = 1;
}

__global__ void __launch_bounds__(kThreads, 1) block_barrier(Memory, int steps) {
  for (int i = 0; i < steps; ++i) Device::sync();
}

__global__ void __launch_bounds__(kThreads, 1) cluster_barrier(Memory, int steps) {
#if __CUDA_ARCH__ >= 900
  const groups::cluster_group cluster = groups::this_cluster();
  for (int i = 0; i < steps; ++i) cluster.sync();
#endif
}

constexpr int kProducts = 8;  // independent ones of a warp and step

__global__ void __launch_bounds__(kThreads, 1) tensor_core(Memory memory, int steps) {
  float sum[kProducts][4] = {};
  const Quad a{{threadIdx.x, 1, 2, 3}};
  Pair b{{4, threadIdx.x}};
  for (int i = 0; i < steps; ++i) {
    DEQ_UNROLL for (int p = 0; p < kProducts; ++p) Device::multiply(sum[p], a, b);
    b.word[0] ^= 1;
  }
  float total = 0;
  DEQ_UNROLL for (int p = 0; p < kProducts; ++p) total += sum[p][0];
  if (total == 1) memory.out[0] = 1;
}

constexpr int kReads = 4;  // Quads of a thread and step

__global__ void __launch_bounds__(kThreads, 1) shared_reads(Memory memory, int steps) {
  __shared__ Quad data[kThreads * kReads];
  for (int i = threadIdx.x; i < kThreads * kReads; i += kThreads) data[i] = memory.state[i];
  Device::sync();
  uint32_t sum = 0;
  for (int i = 0; i < steps; ++i) DEQ_UNROLL for (int r = 0; r < kReads; ++r) {
      const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(data + threadIdx.x + r * kThreads));
      uint32_t word[4];  // volatile, both: the same Quads in every step, which compiler and assembler would read once
      asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(at));
      sum += word[0] ^ word[1] ^ word[2] ^ word[3];
    }
  if (sum == 1) memory.out[0] = 1;
}

__global__ void nothing(Memory) {}

using Kernel = void (*)(Memory, int);

struct Measurement {
  const char* name;
  Kernel kernel;
  enum Launch { kPlain, kCooperative, kClustered } launch;
  double amount;  // per block and step, of the rate; 0: the time of a step is the result
  bool all_blocks;
};

constexpr Measurement kMeasurements[] = {
    {"grid_barrier", grid_barrier, Measurement::kCooperative, 0, false},
    {"flag_barrier", flag_barrier, Measurement::kCooperative, 0, false},
    {"word_exchange", word_exchange, Measurement::kCooperative, 0, false},
    {"block_barrier", block_barrier, Measurement::kPlain, 0, false},
    {"cluster_barrier", cluster_barrier, Measurement::kClustered, 0, false},
    {"broadcast", broadcast, Measurement::kCooperative, kBroadcast * sizeof(Quad), true},
    {"tensor_core", tensor_core, Measurement::kPlain, kProducts * 2.0 * 16 * 8 * 16 * (kThreads / kWarp), true},
    {"shared_reads", shared_reads, Measurement::kPlain, static_cast<double>(kReads) * kThreads * sizeof(Quad), false},
};

// Owns the device memory, stream and events of a measurement.
class Bench {
 public:
  ~Bench() {
    cudaFree(base_);
    if (stream_) cudaStreamDestroy(stream_);
    for (cudaEvent_t event : event_)
      if (event) cudaEventDestroy(event);
  }

  int32_t open(int device) {
    int processors = 0;
    if (int32_t error =
            check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the device"))
      return error;
    blocks_ = processors;
    const size_t flags = 4096, words = 2 * sizeof(uint64_t) * kWords * blocks_, state = kBroadcast * sizeof(Quad);
    bytes_ = flags + words + state + 256;
    if (int32_t error = check_cuda(cudaMalloc(&base_, bytes_), "allocating")) return error;
    memory_ = {reinterpret_cast<uint32_t*>(base_), reinterpret_cast<uint64_t*>(base_ + flags),
               reinterpret_cast<Quad*>(base_ + flags + words), reinterpret_cast<float*>(base_ + flags + words + state)};
    for (cudaEvent_t& event : event_)
      if (int32_t error = check_cuda(cudaEventCreate(&event), "creating an event")) return error;
    return check_cuda(cudaStreamCreate(&stream_), "creating a stream");
  }

  int blocks() const { return blocks_; }

  // Best of several runs, in seconds.
  template <class Work>
  int32_t time(const Work& work, double* seconds) {
    *seconds = INFINITY;
    for (int run = 0; run < 5; ++run) {
      if (int32_t error = check_cuda(cudaMemsetAsync(base_, 0, bytes_, stream_), "clearing")) return error;
      if (int32_t error = check_cuda(cudaEventRecord(event_[0], stream_), "recording")) return error;
      if (int32_t error = check_cuda(work(), "launching")) return error;
      if (int32_t error = check_cuda(cudaEventRecord(event_[1], stream_), "recording")) return error;
      if (int32_t error = check_cuda(cudaEventSynchronize(event_[1]), "running")) return error;
      float milliseconds = 0;
      if (int32_t error = check_cuda(cudaEventElapsedTime(&milliseconds, event_[0], event_[1]), "timing")) return error;
      *seconds = std::min(*seconds, milliseconds * 1e-3);
    }
    return DEQ_OK;
  }

  cudaError_t launch(const Measurement& measurement, int steps) {
    const bool is_clustered = measurement.launch == Measurement::kClustered;
    void* arguments[] = {&memory_, &steps};
    const auto* kernel = reinterpret_cast<const void*>(measurement.kernel);
    if (measurement.launch == Measurement::kCooperative)
      return cudaLaunchCooperativeKernel(kernel, blocks_, kThreads, arguments, 0, stream_);
    cudaLaunchConfig_t config{};
    config.gridDim = is_clustered ? kCluster : blocks_;
    config.blockDim = kThreads;
    config.stream = stream_;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = is_clustered;
    return cudaLaunchKernelExC(&config, kernel, arguments);
  }

  // Time of one kernel of a chain in a captured graph.
  int32_t time_chain(double* seconds) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t chain = nullptr;
    if (int32_t error = check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing")) return error;
    for (int i = 0; i < kSteps; ++i) nothing<<<1, kWarp, 0, stream_>>>(memory_);
    int32_t error = check_cuda(cudaGetLastError(), "launching");
    if (const int32_t end = check_cuda(cudaStreamEndCapture(stream_, &graph), "capturing")) error = end;
    if (!error) error = check_cuda(cudaGraphInstantiate(&chain, graph, 0), "instantiating");
    if (!error) error = time([&] { return cudaGraphLaunch(chain, stream_); }, seconds);
    *seconds /= kSteps;
    if (chain) cudaGraphExecDestroy(chain);
    if (graph) cudaGraphDestroy(graph);
    return error;
  }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
  int blocks_ = 0;
  Memory memory_{};
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_[2] = {};
};

int32_t measure(const char* name, int32_t device, double* result) {
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  Bench bench;
  if (int32_t error = bench.open(device)) return error;
  if (strcmp(name, "graph_chain") == 0) return bench.time_chain(result);
  const auto* found = std::find_if(std::begin(kMeasurements), std::end(kMeasurements),
                                   [&](const Measurement& measurement) { return strcmp(measurement.name, name) == 0; });
  if (found == std::end(kMeasurements)) return failed(DEQ_BAD_ARGUMENT, "there is no measurement called %s", name);
  if (found->launch == Measurement::kClustered) {
    int clusters = 0;
    if (int32_t error = check_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "asking for clusters"))
      return error;
    if (!clusters) return failed(DEQ_NOT_SUPPORTED, "the device has no clusters");
  }
  // What a launch costs falls out of the difference.
  double few = 0, many = 0;
  if (int32_t error = bench.time([&] { return bench.launch(*found, kSteps / 10); }, &few)) return error;
  if (int32_t error = bench.time([&] { return bench.launch(*found, kSteps); }, &many)) return error;
  const double step = (many - few) / (kSteps - kSteps / 10);
  *result = found->amount == 0 ? step : found->amount * (found->all_blocks ? bench.blocks() : 1) / step;
  return DEQ_OK;
}

}  // namespace
}  // namespace deq

int32_t deq_cuda_measure(const char* name, int32_t device, double* result) {
  if (!name || !result) return deq::failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  return deq::measure(name, device, result);
}
