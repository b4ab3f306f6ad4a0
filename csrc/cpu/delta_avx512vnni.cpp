// The inner loops of int8 increments for AVX-512 VNNI.
#define DEQ_VECTOR_BYTES 64
#define DEQ_TILE_ROWS 8
#define DEQ_VPDPBUSD "vpdpbusd"
#include "delta_int8.h"

namespace deq {
const DeltaKernels* avx512vnni_delta_kernels() { return table(); }
}  // namespace deq
