// Increments and weights in int8, multiplied four at a time by vpdpbusd: 4 x the float32 rate of the same vectors. The including
// file defines DEQ_VECTOR_BYTES, DEQ_TILE_ROWS and DEQ_VPDPBUSD, the mnemonic in the encoding of its instruction set.
#pragma once
#include <immintrin.h>

#include "delta.h"
#include "vec.h"

namespace {

struct Increment {
  static constexpr DeqPrecision kPrecision = DEQ_INT8_INCREMENTS;
  static constexpr int kTerms = 4, kBytes = 1;
  using M = VecMath<float>;
  using V = M::V;
  using Sum = M::I;
  typedef uint16_t Halves __attribute__((vector_size(DEQ_VECTOR_BYTES)));
  // Adding it to a number of at most 127 in size rounds that to an integer, and puts 128 more into the low byte of the sum.
  static constexpr float kRound = 12582912.0f + 128.0f;

  // The instruction multiplies unsigned by signed: increments are stored with 128 added, and every sum starts at what that adds
  // too much, the output's offset.
  DEQ_INLINE Sum start(const int32_t* offsets) {
    Sum sum;
    memcpy(&sum, offsets, sizeof sum);
    return sum;
  }
  DEQ_INLINE Sum difference(const int32_t* a, const int32_t* b) { return start(a) - start(b); }
  DEQ_INLINE Sum offset_of(Sum sum) { return -sum; }
  // A sum in units of 2^shift, now in units of 1 and with `start` added. Units that grow cost less than one of them a sum, where
  // a sum has thousands.
  DEQ_INLINE Sum carried(Sum sum, int shift, Sum start) { return (shift >= 0 ? sum << shift : sum >> -shift) + start; }
  DEQ_INLINE Sum dot(Sum sum, uint32_t word, Sum weights) {
    // Not the intrinsic: around it GCC 12 copies every sum at every step.
    asm(DEQ_VPDPBUSD " %2, %1, %0" : "+v"(sum) : "v"(static_cast<int32_t>(word) - Sum{}), "v"(weights));
    return sum;
  }
  DEQ_INLINE V added(V y, Sum sum, V scale, const float* weight_scales) {
    return y + __builtin_convertvector(sum, V) * (scale * M::load(weight_scales));
  }

#if DEQ_VECTOR_BYTES == 64
  DEQ_INLINE V maximum(V a, V b) { return static_cast<V>(_mm512_max_ps(a, b)); }
  // max(largest, |change|), and a number cut to 127 in size: one instruction each for two.
  DEQ_INLINE V larger(V largest, V change) { return static_cast<V>(_mm512_range_ps(largest, change, 0b1011)); }
  DEQ_INLINE V cut(V x) { return static_cast<V>(_mm512_range_ps(x, M::set(127.0), 0b0010)); }
  DEQ_INLINE float lane_max(V v) { return _mm512_reduce_max_ps(v); }
  // Stores the low bytes of the lanes.
  DEQ_INLINE void store_bytes(V lanes, char* at) {
    const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(lanes));
    memcpy(at, &bytes, sizeof bytes);
  }
#else
  DEQ_INLINE V maximum(V a, V b) { return static_cast<V>(_mm256_max_ps(a, b)); }
  DEQ_INLINE V larger(V largest, V change) { return maximum(largest, M::abs(change)); }
  DEQ_INLINE V cut(V x) {
    const V most = M::set(127.0);
    return maximum(static_cast<V>(_mm256_min_ps(x, most)), -most);
  }
  DEQ_INLINE float lane_max(V v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  DEQ_INLINE void store_bytes(V lanes, char* at) {
    const __m256i low = _mm256_and_si256(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(words, words));
  }
#endif

  struct Quantiser {
    V scale, inverse;
    explicit Quantiser(const deq::DeltaRow& row) : scale(M::set(0.0) + row.next_scale), inverse(M::set(0.0) + row.next_inverse) {}
    // Stores the integers nearest to change / scale, at most 127 in size; returns what they stand for.
    V store(V change, char* at) const {
      const V shifted = cut(change * inverse) + M::set(kRound);
      store_bytes(shifted, at);
      return (shifted - M::set(kRound)) * scale;
    }
  };

  // Integers of 16 bits, with one scale for every output: its largest weight becomes 127 * 256. The first plane is the high byte,
  // rounded, the second the low one.
  struct Weights {
    // Of a weight, what its integer in some planes is away from it: half a unit of the last one, and for the roundings of the
    // unit and its inverse, three or four of 2^-24, less than a hundredth of one where the integer is 127 * 256; or all of a
    // weight in a row that is taken as zero.
    static constexpr double kMostUnits = 0.51, kLeast = 1e-30;
    V scale[2], inverse;
    DEQ_INLINE Weights of(V largest) {
      // Where 1 / scale would overflow the row is taken as zero: anchors add what it is.
      const auto normal = largest > M::set(kLeast);
      return {{M::select(normal, largest * M::set(1.0 / 127), V{}), M::select(normal, largest * M::set(1.0 / (127 * 256)), V{})},
              M::select(normal, M::set(127.0 * 256) / largest, V{})};
    }
    // The words of these elements in both planes; adds 128 times each to the sums.
    inline __attribute__((always_inline)) void split(const V (&terms)[kTerms], V (&planes)[2], Sum (&sums)[2]) const {
      // The low halves are the integers plus 128: the high byte is rounded, and the low one has its sign turned.
      Sum q[kTerms];
      for (int t = 0; t < kTerms; ++t) q[t] = reinterpret_cast<Sum>(terms[t] * inverse + M::set(kRound));
      // Halves of 16 bits: the even terms, the odd terms.
      const Halves even = reinterpret_cast<Halves>((q[0] & 0xFFFF) | q[2] << 16);
      const Halves odd = reinterpret_cast<Halves>((q[1] & 0xFFFF) | q[3] << 16);
      const Halves low_bytes = ((even & 0xFF) | odd << 8) ^ 0x8080, high_bytes = even >> 8 | (odd & 0xFF00);
      const Sum words[2] = {reinterpret_cast<Sum>(high_bytes), reinterpret_cast<Sum>(low_bytes)};
      for (int i = 0; i < 2; ++i) {
        planes[i] = reinterpret_cast<V>(words[i]);
        sums[i] = dot(sums[i], 0x80808080u, words[i]);
      }
    }
  };
};

}  // namespace

#include "delta_impl.h"
