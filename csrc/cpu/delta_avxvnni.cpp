// The inner loops of int8 increments for AVX-VNNI: CPUs with AVX2 and these products, but without AVX-512.
#define DEQ_VECTOR_BYTES 32
#define DEQ_TILE_ROWS 6
#define DEQ_VPDPBUSD "%{vex%} vpdpbusd"
#include "delta_int8.h"

namespace deq {
const DeltaKernels* avxvnni_delta_kernels() { return table(); }
}  // namespace deq
