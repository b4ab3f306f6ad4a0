// The inner loops for AVX2 and FMA: 16 registers, 6 samples x 16 floats a tile.
#define DEQ_VECTOR_BYTES 32
#define DEQ_TILE_ROWS 6
static constexpr const char* kName = "avx2";
#include "kernels_impl.h"
#include "triangular_impl.h"

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
const TriangularKernels<float>* avx2_triangular<float>() {
  return triangular_table<float>();
}
template <>
const TriangularKernels<double>* avx2_triangular<double>() {
  return triangular_table<double>();
}

}  // namespace deq
