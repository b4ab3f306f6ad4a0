// The inner loops for the compiler's baseline target (SSE2 on x86-64, NEON on AArch64).
#define DEQ_VECTOR_BYTES 16
#define DEQ_TILE_ROWS 4
static constexpr const char* kName = "portable";
#include "kernels_impl.h"
#include "structured_kernels_impl.h"

namespace deq {

template <>
const Kernels<float>* portable_kernels<float>() {
  return table<float>();
}
template <>
const Kernels<double>* portable_kernels<double>() {
  return table<double>();
}

template <>
const StructuredKernels<float>* portable_structured<float>() {
  return structured_table<float>();
}
template <>
const StructuredKernels<double>* portable_structured<double>() {
  return structured_table<double>();
}

}  // namespace deq
