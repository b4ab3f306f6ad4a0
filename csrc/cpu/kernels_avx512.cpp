// The inner loops for AVX-512 (F, DQ, BW, VL): 32 registers, 8 samples x 32 floats a tile.
#define DEQ_VECTOR_BYTES 64
#define DEQ_TILE_ROWS 8
static constexpr const char* kName = "avx512";
#include "kernels_impl.h"
#include "structured_kernels_impl.h"

namespace deq {

template <>
const Kernels<float>* avx512_kernels<float>() {
  return table<float>();
}
template <>
const Kernels<double>* avx512_kernels<double>() {
  return table<double>();
}

template <>
const StructuredKernels<float>* avx512_structured<float>() {
  return structured_table<float>();
}
template <>
const StructuredKernels<double>* avx512_structured<double>() {
  return structured_table<double>();
}

}  // namespace deq
