// Increments and weights in int8, multiplied four at a time (AVX-512 VNNI): 4 x the float32 rate.
#define DEQ_VECTOR_BYTES 64
#define DEQ_TILE_ROWS 8
#include <immintrin.h>

#include "delta.h"
#include "vec.h"

namespace {

struct Increment {
  static constexpr DeqPrecision kPrecision = DEQ_INT8_INCREMENTS;
  static constexpr int kTerms = 4, kBytes = 1;
  using V = VecMath<float>::V;
  using Sum = __m512i;

  // The instruction multiplies unsigned by signed: increments are stored with 128 added, and every sum starts at what that adds
  // too much, the output's offset.
  DEQ_INLINE Sum start(const int32_t* offsets) { return _mm512_loadu_si512(offsets); }
  DEQ_INLINE Sum dot(Sum sum, uint32_t word, Sum weights) {
    // Not the intrinsic: around it GCC 12 copies every sum at every step.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(static_cast<int>(word))), "v"(weights));
    return sum;
  }
  DEQ_INLINE V added(V y, Sum sum, V scale, const float* weight_scales) {
    return y + static_cast<V>(_mm512_cvtepi32_ps(sum)) * (scale * VecMath<float>::load(weight_scales));
  }

  DEQ_INLINE V maximum(V a, V b) { return static_cast<V>(_mm512_max_ps(a, b)); }
  DEQ_INLINE float lane_max(V v) { return _mm512_reduce_max_ps(v); }

  struct Quantiser {
    // Adding it rounds to an integer, whose low byte with 128 added are the low bits of the sum.
    static constexpr float kRound = 12582912.0f + 128.0f;
    V scale, inverse;
    explicit Quantiser(const deq::DeltaRow& row)
        : scale(VecMath<float>::set(0.0) + row.next_scale), inverse(VecMath<float>::set(0.0) + row.next_inverse) {}
    // Stores the integers nearest to change / scale, at most 127 in size; returns what they stand for.
    V store(V change, char* at) const {
      const __m512 limit = _mm512_set1_ps(127.0f), round = _mm512_set1_ps(kRound);
      const __m512 cut = _mm512_max_ps(_mm512_min_ps(change * inverse, limit), -limit), shifted = cut + round;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
      return static_cast<V>(shifted - round) * scale;
    }
  };

  // One scale for every output: its largest weight becomes 127, and 127 of the rest are half a unit of that.
  struct Weights {
    V scale, inverse;
    explicit Weights(V largest) {
      // Where 1 / scale would overflow the row is taken as zero: anchors add what it is.
      const auto normal = largest > VecMath<float>::set(1e-30);
      scale = VecMath<float>::select(normal, largest * VecMath<float>::set(1.0 / 127), V{});
      inverse = VecMath<float>::select(normal, VecMath<float>::set(127.0) / largest, V{});
    }
    Weights rest() const {
      Weights finer = *this;
      finer.scale *= VecMath<float>::set(1.0 / 254);
      finer.inverse *= VecMath<float>::set(254.0);
      return finer;
    }
    // Stores the words of these elements and leaves in them what rounding left out.
    void take(V (&terms)[4], uint32_t* at, Sum* offset) const {
      Sum word = _mm512_setzero_si512(), sum = word;
      for (int t = 0; t < 4; ++t) {
        const Sum q = _mm512_cvtps_epi32(terms[t] * inverse);
        terms[t] -= static_cast<V>(_mm512_cvtepi32_ps(q)) * scale;
        sum = _mm512_add_epi32(sum, q);
        word = _mm512_or_si512(word, _mm512_sllv_epi32(_mm512_and_si512(q, _mm512_set1_epi32(255)), _mm512_set1_epi32(8 * t)));
      }
      _mm512_storeu_si512(at, word);
      *offset = _mm512_sub_epi32(*offset, _mm512_slli_epi32(sum, 7));
    }
  };
};

}  // namespace

#include "delta_impl.h"

namespace deq {
const DeltaKernels* avx512vnni_delta_kernels() { return table(); }
}  // namespace deq
