// Which inner loops of the delta iteration this CPU has, and W in their precision.
#include <utility>

#include "delta.h"
#include "kernels.h"

namespace deq {
namespace {

// New weights whose columns are contiguous (those of the adjoint, as a rule) are used as they lie from this width on, for so many
// samples of one matrix at most. Training, Zen 4, against packing them, one and two threads: 1.3 and 1.45 x as fast at 1024 x
// 4, 1.05 at 1024 x 16, 1.0 and 1.1 at 512 x 8, the same at 256 x 1 and, where the anchors take as much longer, at 2048 x 16.
constexpr int64_t kInPlaceFrom = 256, kInPlaceBatch = 16;
// Known weights are too where W and its packed form would drive each other out of the caches: a read of W for its content brings
// it there. Training, Zen 5, one and two threads, W as it was: 1.05 to 1.15 and 1.1 to 1.2 x at 1024 x 1 to 12, 1.1 and 1.15 at
// 1536 x 1 to 8, 1.0 at 640 x 4 and 1792 x 8; but 0.98 at 512 x 8 and 1024 x 16, 0.92 at 2048 x 16 and 2304 x 4.
constexpr int64_t kStaysFrom = 640, kStaysTo = 1792, kStaysBatch = 12;

}  // namespace

const DeltaKernels* delta_kernels(int32_t precision) {
  const int lanes = kernels<float>().lanes;
  const bool int8 = precision == DEQ_INT8_INCREMENTS, bfloat16 = precision == DEQ_BFLOAT16_INCREMENTS;
#ifdef DEQ_HAVE_AVX512VNNI
  if (int8 && lanes == 16 && __builtin_cpu_supports("avx512vnni")) return avx512vnni_delta_kernels();
#endif
#ifdef DEQ_HAVE_AVX512VNNI256
  if (int8 && lanes == 8 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
    return avx512vnni256_delta_kernels();
#endif
#ifdef DEQ_HAVE_AVXVNNI
  if (int8 && lanes == 8 && __builtin_cpu_supports("avxvnni")) return avxvnni_delta_kernels();
#endif
#ifdef DEQ_HAVE_AVX512BF16
  if (bfloat16 && lanes == 16 && __builtin_cpu_supports("avx512bf16")) return avx512bf16_delta_kernels();
#endif
  (void)lanes, (void)int8, (void)bfloat16;
  return nullptr;
}

Weights delta_weights(const DeqProblem& p, const DeltaKernels& low, int threads) {
  const int64_t m = p.width;
  Derived planes{p.precision, 2 * low.plane_bytes(m),
                 [&](const void* packed, char* to, int64_t first, int64_t last) {
                   low.pack(static_cast<const float*>(packed), m, to, first, last);
                 },
                 nullptr, m >= kStaysFrom && m <= kStaysTo && p.batch <= kStaysBatch};
  if (m >= kInPlaceFrom && p.batch <= kInPlaceBatch)
    planes.straight = [&](const void* w, int64_t stride, char* to, int64_t first, int64_t last) {
      return low.pack_columns(static_cast<const float*>(w), stride, m, to, first, last);
    };
  return packed_weights<float>(p, threads, &planes);
}

}  // namespace deq

int32_t deq_cpu_has_precision(int32_t precision) { return precision == DEQ_NATIVE || deq::delta_kernels(precision) ? 1 : 0; }
