// Which inner loops of the delta iteration this CPU has, and W in their precision.
#include <algorithm>

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

std::shared_ptr<const Packed> delta_planes(const DeqProblem& p, const DeltaKernels& low, const Packed& packed, int threads) {
  const int64_t m = p.width, panels = (m + 2 * low.lanes - 1) / (2 * low.lanes), bytes = 2 * low.plane_bytes(m);
  return packed_form(packed, p.precision, p.weights, bytes, [&](char* to) {
    const int64_t groups = threads > 1 && m >= 256 ? std::min<int64_t>(panels, threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1 && groups * p.weights > 1)
    for (int64_t i = 0; i < p.weights * groups; ++i) {
      const int64_t s = i / groups, group = i % groups;
      low.pack(static_cast<const float*>(packed.data) + s * (packed.matrix_bytes / 4), m, to + s * bytes, panels * group / groups,
               panels * (group + 1) / groups);
    }
  });
}

}  // namespace deq

int32_t deq_cpu_has_precision(int32_t precision) { return precision == DEQ_NATIVE || deq::delta_kernels(precision) ? 1 : 0; }
