// Launches of Substitute.
#include "launch.h"
#include "substitute.h"

namespace deq {
namespace {

constexpr int kPackThreads = 256;

__global__ void __launch_bounds__(kPackThreads) pack_triangle(const __grid_constant__ Substitution call) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * (kPackThreads / kWarp) + threadIdx.x / kWarp, i = blockIdx.y;
  if (j <= i) pack_triangle_tile<Device>(call, i, j);
}

template <int BT>
__global__ void __launch_bounds__(Substitute<Device, BT>::kWarps* kWarp, 1)
    substitute(const __grid_constant__ Substitution call) {
  __shared__ __align__(16) char shared[substitute_layout(BT).bytes];
  Substitute<Device, BT>(call, shared).run();
}

// Eights of samples of a block: one while that gives every multiprocessor no more than one block, for each takes as long as the
// chain through all outputs; then four, which share what is read of W.
int columns_of(int64_t batch, int processors) { return batch > static_cast<int64_t>(processors) * kTileSamples ? 4 : 1; }

int64_t blocks_of(int64_t batch, int columns) { return (batch + columns * kTileSamples - 1) / (columns * kTileSamples); }

int64_t floats_of(int64_t batch, int64_t width, int columns) {
  return triangle_floats(width) + blocks_of(batch, columns) * solved_floats(width, columns);
}

bool is_well_formed(const DeqCudaSubstitution& p) {
  return p.batch >= 0 && p.width >= 1 && p.activation >= 0 && p.activation < kActivations && p.W.data && p.injection.data &&
         p.out.data && p.residual && (p.out.stride[2] == 1 || p.width == 1) && tiles_of(p.width) <= 65535;
}

}  // namespace
}  // namespace deq

int64_t deq_cuda_substitute_bytes(int64_t batch, int64_t width) {
  using namespace deq;
  if (batch < 0 || width < 1) return 0;
  const int64_t narrow = floats_of(batch, width, 1), wide = floats_of(batch, width, 4);  // whichever a device takes
  return (narrow > wide ? narrow : wide) * static_cast<int64_t>(sizeof(float));
}

int32_t deq_cuda_substitute(const DeqCudaSubstitution* p, void* scratch, int64_t bytes, int32_t device, void* stream) {
  using namespace deq;
  if (!p || !is_well_formed(*p)) return failed(DEQ_BAD_ARGUMENT, "an argument is out of range");
  if (p->batch == 0) return DEQ_OK;
  const int64_t needed = deq_cuda_substitute_bytes(p->batch, p->width);
  if (bytes < needed) return too_little(bytes, needed);
  Limits limits{};
  if (int32_t error = find_limits(device, &limits)) return error;
  const DeviceScope scope(device);
  if (int32_t error = check_cuda(scope.error(), "choosing the device")) return error;
  Substitution call{};
  call.batch = p->batch, call.width = p->width;
  call.W = static_cast<const float*>(p->W.data);
  call.row_stride = p->W.stride[1], call.column_stride = p->W.stride[2];
  call.injection = p->injection, call.mask = p->mask, call.out = p->out;
  call.activation = p->mask.data ? static_cast<int32_t>(kIdentity) : p->activation;
  call.strict = p->strict, call.reversed = p->upper;
  call.residual = p->residual;
  call.packed = static_cast<float*>(scratch);
  call.solved = call.packed + triangle_floats(p->width);
  const auto queue = static_cast<cudaStream_t>(stream);
  constexpr unsigned kTiles = kPackThreads / kWarp;
  const unsigned tiles = static_cast<unsigned>(tiles_of(p->width));
  pack_triangle<<<dim3((tiles + kTiles - 1) / kTiles, tiles), kPackThreads, 0, queue>>>(call);
  if (int32_t error = check_cuda(cudaGetLastError(), "the launch of pack_triangle")) return error;
  const int columns = columns_of(p->batch, limits.processors);
  const auto kernel = columns == 1 ? substitute<1> : substitute<4>;
  kernel<<<static_cast<unsigned>(blocks_of(p->batch, columns)), (columns + kAhead) * kWarp, 0, queue>>>(call);
  return check_cuda(cudaGetLastError(), "the launch of a substitution");
}
