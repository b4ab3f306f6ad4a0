// Which inner loops of the delta iteration this CPU has, and W in their precision.
#include <utility>

#include "delta.h"
#include "kernels.h"

namespace deq {

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

DeltaWeights delta_weights(const DeqProblem& p, const DeltaKernels& low, int threads) {
  Derived planes{p.precision, 2 * low.plane_bytes(p.width),
                 [&](const void* packed, char* to, int64_t first, int64_t last) {
                   low.pack(static_cast<const float*>(packed), p.width, to, first, last);
                 },
                 nullptr};
  std::shared_ptr<const Packed> packed = packed_weights<float>(p, threads, &planes);
  return {std::move(packed), std::move(planes.made)};
}

}  // namespace deq

int32_t deq_cpu_has_precision(int32_t precision) { return precision == DEQ_NATIVE || deq::delta_kernels(precision) ? 1 : 0; }
