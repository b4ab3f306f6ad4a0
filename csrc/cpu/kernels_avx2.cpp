// The inner loops for AVX2 and FMA: 16 registers, 6 samples x 16 floats a tile.
#define DEQ_VECTOR_BYTES 32
#define DEQ_TILE_ROWS 6
static constexpr const char* kName = "avx2";
#include "kernels_impl.h"
#include "structured_kernels_impl.h"

namespace deq {

template <>
const Kernels<float>* avx2_kernels<float>() {
  return table<float>();
}
template <>
const Kernels<double>* avx2_kernels<double>() {
  return table<double>();
}

template <>
const StructuredKernels<float>* avx2_structured<float>() {
  return structured_table<float>();
}
template <>
const StructuredKernels<double>* avx2_structured<double>() {
  return structured_table<double>();
}

}  // namespace deq
