// Increments and weights in bfloat16, multiplied two at a time (AVX-512 BF16): twice the float32 rate.
#define DEQ_VECTOR_BYTES 64
#define DEQ_TILE_ROWS 8
#include <immintrin.h>

#include "delta.h"
#include "vec.h"

namespace {

struct Increment {
  static constexpr DeqPrecision kPrecision = DEQ_BFLOAT16_INCREMENTS;
  static constexpr int kTerms = 2, kBytes = 2;
  using V = VecMath<float>::V;
  using Sum = __m512;

  DEQ_INLINE Sum start(const int32_t*) { return _mm512_setzero_ps(); }
  DEQ_INLINE Sum difference(const int32_t*, const int32_t*) { return _mm512_setzero_ps(); }
  DEQ_INLINE Sum carried(Sum sum, int, Sum) { return sum; }  // the elements carry their own exponents
  DEQ_INLINE Sum offset_of(Sum) { return _mm512_setzero_ps(); }
  DEQ_INLINE Sum dot(Sum sum, uint32_t word, Sum weights) {
    // Not the intrinsic: around it GCC 12 copies every sum at every step.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(static_cast<int>(word))), "v"(weights));
    return sum;
  }
  DEQ_INLINE V added(V y, Sum sum, V, const float*) { return y + static_cast<V>(sum); }

  // Rounded to nearest even, 16 bits a lane.
  DEQ_INLINE __m256i rounded(V x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(static_cast<__m512>(x))); }
  DEQ_INLINE __m512i widened(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

  DEQ_INLINE V maximum(V a, V b) { return static_cast<V>(_mm512_max_ps(a, b)); }
  DEQ_INLINE V larger(V largest, V change) { return maximum(largest, VecMath<float>::abs(change)); }
  DEQ_INLINE float lane_max(V v) { return _mm512_reduce_max_ps(v); }

  // The elements carry their own exponents: no scale.
  struct Quantiser {
    explicit Quantiser(const deq::DeltaRow&) {}
    V store(V change, char* at) const {
      const __m256i q = rounded(change);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), q);
      return reinterpret_cast<V>(widened(q));
    }
  };
  struct Weights {
    static constexpr double kMostUnits = INFINITY, kLeast = 0;  // no scale tells it
    V scale[2];
    DEQ_INLINE Weights of(V) { return {{VecMath<float>::set(1.0), VecMath<float>::set(1.0)}}; }
    // The words of these elements, and of what rounding left out of them.
    inline __attribute__((always_inline)) void split(const V (&terms)[2], V (&planes)[2], Sum (&)[2]) const {
      const __m256i first = rounded(terms[0]), second = rounded(terms[1]);
      planes[0] = words(first, second);
      planes[1] = words(rounded(terms[0] - reinterpret_cast<V>(widened(first))),
                        rounded(terms[1] - reinterpret_cast<V>(widened(second))));
    }
    DEQ_INLINE V words(__m256i first, __m256i second) {
      return reinterpret_cast<V>(_mm512_or_si512(_mm512_cvtepu16_epi32(first), widened(second)));
    }
  };
};

}  // namespace

#include "delta_impl.h"

namespace deq {
const DeltaKernels* avx512bf16_delta_kernels() { return table(); }
}  // namespace deq
