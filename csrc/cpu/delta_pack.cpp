// Which inner loops of the delta iteration this CPU has, and W in their precision.
#include <utility>

#include "delta.h"
#include "kernels.h"

namespace deq {
namespace {

// Where weights are used as they lie, for so many samples of one matrix at most; no answer shows it.
struct InPlace {
  int64_t from, batch;                                  // new ones: from this width on
  int64_t stays_from, stays_to, stays_few, stays_many;  // and known ones: widths, samples
};

// Columns contiguous (the adjoint's, as a rule). New ones against packing them, training, Zen 4, one and two threads: 1.3
// and 1.45 x as fast at 1024 x 4, 1.05 at 1024 x 16, 1.0 and 1.1 at 512 x 8, the same at 256 x 1 and, where the anchors take as
// much longer, at 2048 x 16. Known ones where W and its packed form would drive each other out of the caches, and a read of W for
// its content brings it there. Training, Zen 5, W as it was: 1.05 to 1.15 and 1.1 to 1.2 x at 1024 x 1 to 12, 1.1 and 1.15 at
// 1536 x 1 to 8, 1.0 at 640 x 4 and 1792 x 8; but 0.98 at 512 x 8 and 1024 x 16, 0.92 at 2048 x 16 and 2304 x 4.
constexpr InPlace kColumns{256, 16, 640, 1792, 1, 12};
// Rows contiguous. New ones, forward and the backward pass that finds W in the cache, Zen 5, one thread: 1.2 and 1.1 x at 2048 x
// 16 and 1024 x 4, 1.3 and 1.3 at 2048 x 4, 1.2 and 1.1 at 768 x 4, 1.15 and 1.05 at 2048 x 32, 1.05 and 1.0 at 640 x 4; 0.92
// and 1.0 at 512 x 8. Known ones, forward: 1.1 to 1.6 x at 1664 to 2304 x 4; but 0.7 at 1024 x 4, 0.8 to 0.95 with one
// sample, 1.0 with 16.
constexpr InPlace kRows{640, 32, 1664, 2304, 2, 8};

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
  const bool rows = p.W.stride[2] == 1;
  const InPlace& limits = rows ? kRows : kColumns;
  Derived planes{p.precision, 2 * low.plane_bytes(m),
                 [&](const void* packed, char* to, int64_t first, int64_t last) {
                   low.pack(static_cast<const float*>(packed), m, to, first, last);
                 },
                 nullptr,
                 m >= limits.stays_from && m <= limits.stays_to && p.batch >= limits.stays_few && p.batch <= limits.stays_many};
  if (m >= limits.from && p.batch <= limits.batch && (!rows || p.batch <= low.most_spread))
    planes.straight = [&](const void* w, int64_t row_stride, int64_t column_stride, char* to, int64_t first, int64_t last) {
      const float* from = static_cast<const float*>(w);
      return column_stride == 1 ? low.pack_rows(from, row_stride, m, to, first, last)
                                : low.pack_columns(from, column_stride, m, to, first, last);
    };
  return packed_weights<float>(p, threads, &planes);
}

}  // namespace deq

int32_t deq_cpu_has_precision(int32_t precision) { return precision == DEQ_NATIVE || deq::delta_kernels(precision) ? 1 : 0; }
