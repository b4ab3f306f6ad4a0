// The inner loops of int8 increments for AVX-512 VNNI with 32-byte vectors, which go with the AVX2 kernels where those are
// chosen.
#define DEQ_VECTOR_BYTES 32
#define DEQ_TILE_ROWS 6
#define DEQ_VPDPBUSD "vpdpbusd"
#include "delta_int8.h"

namespace deq {
const DeltaKernels* avx512vnni256_delta_kernels() { return table(); }
}  // namespace deq
