// Chooses the instruction set: the best that this CPU and this build have, or the one asked for by name.
#include <string.h>

#include <atomic>
#include <vector>

#include "../kernels.h"
#include "cache.h"
#include "guarded.h"
#include "kernels.h"
#include "structured_kernels.h"

namespace deq {
namespace {

enum Isa { kPortable, kAvx2, kAvx512 };

bool usable(Isa isa) {
  switch (isa) {
    case kAvx512:
#ifdef DEQ_HAVE_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
    case kAvx2:
#ifdef DEQ_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
    default:
      return true;
  }
}

Isa best() { return usable(kAvx512) ? kAvx512 : usable(kAvx2) ? kAvx2 : kPortable; }

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

template <class T>
const Kernels<T>* table_of(Isa isa) {
#ifdef DEQ_HAVE_AVX512
  if (isa == kAvx512) return avx512_kernels<T>();
#endif
#ifdef DEQ_HAVE_AVX2
  if (isa == kAvx2) return avx2_kernels<T>();
#endif
  (void)isa;
  return portable_kernels<T>();
}

template <class T>
const StructuredKernels<T>* structured_table_of(Isa isa) {
#ifdef DEQ_HAVE_AVX512
  if (isa == kAvx512) return avx512_structured<T>();
#endif
#ifdef DEQ_HAVE_AVX2
  if (isa == kAvx2) return avx2_structured<T>();
#endif
  (void)isa;
  return portable_structured<T>();
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *table_of<float>(chosen());
}
template <>
const Kernels<double>& kernels<double>() {
  return *table_of<double>(chosen());
}
template <>
const StructuredKernels<float>& structured_kernels<float>() {
  return *structured_table_of<float>(chosen());
}
template <>
const StructuredKernels<double>& structured_kernels<double>() {
  return *structured_table_of<double>(chosen());
}

}  // namespace deq

const char* deq_cpu_isa(void) { return deq::kernels<float>().name; }

int32_t deq_cpu_set_isa(const char* name) {
  deq::Isa isa = deq::best();
  if (name && strcmp(name, "auto") != 0) {
    if (strcmp(name, "avx512") == 0) {
      isa = deq::kAvx512;
    } else if (strcmp(name, "avx2") == 0) {
      isa = deq::kAvx2;
    } else if (strcmp(name, "portable") == 0) {
      isa = deq::kPortable;
    } else {
      return DEQ_BAD_ARGUMENT;
    }
  }
  if (!deq::usable(isa)) return DEQ_BAD_ARGUMENT;
  deq::chosen() = isa;
  return DEQ_OK;
}

int32_t deq_cpu_fingerprint(const DeqView* view, const int64_t size[3], int32_t type, int32_t threads, uint64_t fingerprint[2]) {
  if (!view || !size || !fingerprint || type < DEQ_FLOAT32 || type > DEQ_FLOAT16) return DEQ_BAD_ARGUMENT;
  const int64_t sizes[3] = {size[0], size[1], size[2]};
  return deq::guarded([&]() -> int32_t {
    uint64_t result[2];
    if (!deq::fingerprint(*view, sizes, type == DEQ_FLOAT64 ? 8 : type == DEQ_FLOAT32 ? 4 : 2, threads < 1 ? 1 : threads, result))
      return DEQ_BAD_ARGUMENT;
    fingerprint[0] = result[0], fingerprint[1] = result[1];
    return DEQ_OK;
  });
}

int32_t deq_cpu_invert(void* matrix, int64_t stride, int64_t n, int32_t type) {
  if (!matrix || n < 0 || stride < n || type < DEQ_FLOAT32 || type > DEQ_FLOAT64) return DEQ_BAD_ARGUMENT;
  return deq::guarded([&]() -> int32_t {
    std::vector<double> work(n * n);
    if (type == DEQ_FLOAT64)
      deq::kernels<double>().invert(static_cast<double*>(matrix), stride, n, work.data());
    else
      deq::kernels<float>().invert(static_cast<float*>(matrix), stride, n, work.data());
    return DEQ_OK;
  });
}

int64_t deq_cpu_clear_cache(void) { return deq::clear_cache(); }
int64_t deq_cpu_cache_bytes(void) { return deq::cache_bytes(); }
