// W z + c in float32 straight from a W whose rows are contiguous, for one instruction set.
//
// Every lane is a sum of its own, of one row and one sample, in the order of the packed W (kernels_impl.h): the result is the
// same to the last bit. Few samples share a vector with several rows.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "ahead.h"
#include "delta.h"
#include "kernels.h"
#include "pack_impl.h"
#include "vec.h"

namespace {

using deq::Affine;

// kLanes / S rows of W times S samples in a vector: lane = S row + sample. For S < kLanes, where quarters of vectors are four
// floats.
template <int S>
struct Lanes {
  using M = VecMath<float>;
  using V = M::V;
  static constexpr int kRows = kLanes<float> / S, kBlock = 16;

  // Of S samples at one k, for every row.
  DEQ_INLINE V samples(const float* z) {
#if DEQ_VECTOR_BYTES == 64
    if constexpr (S == 8) return static_cast<V>(_mm512_broadcast_f32x8(_mm256_loadu_ps(z)));
    return static_cast<V>(_mm512_broadcast_f32x4(_mm_loadu_ps(z)));
#else
    return static_cast<V>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(z)));
#endif
  }

  // kBlock elements of every row, those from `count` on zero: [four of them][four times S lanes, of a row each]. A line of the L1
  // cache is read at once: the lines of many rows may share one of its sets, which holds eight, or twelve.
  struct Block {
    V quarter[4];
    inline __attribute__((always_inline)) void load(const float* const* rows, int64_t k, int64_t count) {
#if DEQ_VECTOR_BYTES == 64
      V row[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) row[r] = count == kBlock ? M::load(rows[r] + k) : load_first<float>(rows[r] + k, count);
      if constexpr (S == 8) {
        const __m512 a = static_cast<__m512>(row[0]), b = static_cast<__m512>(row[1]);
        quarter[0] = static_cast<V>(_mm512_shuffle_f32x4(a, b, 0x00));
        quarter[1] = static_cast<V>(_mm512_shuffle_f32x4(a, b, 0x55));
        quarter[2] = static_cast<V>(_mm512_shuffle_f32x4(a, b, 0xAA));
        quarter[3] = static_cast<V>(_mm512_shuffle_f32x4(a, b, 0xFF));
      } else {
        const __m512 a = static_cast<__m512>(row[0]), b = static_cast<__m512>(row[1]), c = static_cast<__m512>(row[2]),
                     d = static_cast<__m512>(row[3]);
        const __m512 ab01 = _mm512_shuffle_f32x4(a, b, 0x44), ab23 = _mm512_shuffle_f32x4(a, b, 0xEE),
                     cd01 = _mm512_shuffle_f32x4(c, d, 0x44), cd23 = _mm512_shuffle_f32x4(c, d, 0xEE);
        quarter[0] = static_cast<V>(_mm512_shuffle_f32x4(ab01, cd01, 0x88));
        quarter[1] = static_cast<V>(_mm512_shuffle_f32x4(ab01, cd01, 0xDD));
        quarter[2] = static_cast<V>(_mm512_shuffle_f32x4(ab23, cd23, 0x88));
        quarter[3] = static_cast<V>(_mm512_shuffle_f32x4(ab23, cd23, 0xDD));
      }
#else
      alignas(16) float first[2 * kBlock] = {};
      const float* row[2] = {rows[0] + k, rows[1] + k};
      if (count < kBlock)
        for (int r = 0; r < 2; ++r) row[r] = static_cast<const float*>(memcpy(first + r * kBlock, row[r], count * sizeof(float)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        quarter[i] = static_cast<V>(
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[0] + 4 * i)), _mm_loadu_ps(row[1] + 4 * i), 1));
#endif
    }
    template <int i>
    inline __attribute__((always_inline)) V at(int q) const {
#if DEQ_VECTOR_BYTES == 64
      return static_cast<V>(_mm512_permute_ps(static_cast<__m512>(quarter[q]), i * 0x55));
#else
      return static_cast<V>(_mm256_permute_ps(static_cast<__m256>(quarter[q]), i * 0x55));
#endif
    }
  };
};

// A tile: S samples share a vector, R vectors of rows, NV vectors of samples.
template <int kS, int kR, int kNV>
struct Shape {
  static constexpr int S = kS, R = kR, NV = kNV;
};

// acc += the products of the values [k0, k1) of k, several rows in a vector.
template <int S, int R>
DEQ_INLINE void add_shared(typename Simd<float>::V (&acc)[R][1], const float* const* w, const float* z, int64_t k0, int64_t k1,
                           Ahead<float>& ahead) {
  using Of = Lanes<S>;
  // Vectors of rows together. Of four GCC 12 keeps some in memory and is faster all the same: 1.05 to 1.1 x for 8 samples, 1.0 to
  // 1.02 for 4 (Zen 4).
  constexpr int P = DEQ_VECTOR_BYTES == 64 ? 4 : 2;
  auto block = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r += P) {
      typename Of::Block rows[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) rows[p].load(w + (r + p) * Of::kRows, k, count);
      auto add = [&](int q, auto i) __attribute__((always_inline)) {
        if (4 * q + i() >= count) return;
        const auto x = Of::samples(z + (k + 4 * q + i()) * S);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[r + p][0] += rows[p].template at<i()>(q) * x;
      };
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        add(q, std::integral_constant<int, 0>{});
        add(q, std::integral_constant<int, 1>{});
        add(q, std::integral_constant<int, 2>{});
        add(q, std::integral_constant<int, 3>{});
      }
    }
  };
  int64_t k = k0;
  for (; k + Of::kBlock <= k1; k += Of::kBlock) {
#pragma GCC unroll 8
    for (int i = 0; i < R * Of::kRows; i += 4) ahead.template ask<4>();
    block(k, Of::kBlock);
  }
  if (k < k1) block(k, k1 - k);
}

// The same of one row in a vector.
template <int R, int NV>
DEQ_INLINE void add_single(typename Simd<float>::V (&acc)[R][NV], const float* const (&w)[R], const float* z, int64_t k0,
                           int64_t k1, Ahead<float>& ahead) {
  using M = VecMath<float>;
  constexpr int64_t L = kLanes<float>;
  constexpr int kTogether = 4, kLines = R * kTogether * static_cast<int>(sizeof(float)) / 64;
  auto add = [&](int64_t k) __attribute__((always_inline)) {
    M::V b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = M::load(z + (k * NV + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const M::V x = w[r][k] - M::V{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
    }
  };
  int64_t k = k0;
  for (; k + kTogether <= k1; k += kTogether) {
    ahead.template ask<kLines>();
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) add(k + i);
  }
  for (; k < k1; ++k) add(k);
}

// R vectors of rows times NV vectors of samples: sums[row][sample].
template <int S, int R, int NV, int kRows>
DEQ_INLINE void rows_times_samples(const Affine& a, const float* const (&w)[kRows], Ahead<float>& ahead, float* sums) {
  using M = VecMath<float>;
  constexpr int64_t L = kLanes<float>, kChunk = deq::kSumChunk;
  for (int64_t k0 = 0, k1; k0 < a.width; k0 = k1) {
    k1 = a.width < k0 + kChunk ? a.width : k0 + kChunk;
    M::V acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = M::V{};
    if constexpr (S == L)
      add_single<R, NV>(acc, w, a.lanes, k0, k1, ahead);
    else
      add_shared<S, R>(acc, w, a.lanes, k0, k1, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* at = sums + (r * NV + v) * L;
        M::store(at, k0 > 0 ? M::load(at) + acc[r][v] : acc[r][v]);
      }
  }
}

template <int S, int R, int NV>
__attribute__((noinline)) void affine_rows(const Affine& a, int n) {
  using M = VecMath<float>;
  constexpr int64_t L = kLanes<float>, kRows = R * L / S, kGroup = kRows < L ? L : kRows;
  static_assert(kGroup % kRows == 0 && (NV == 1 || S == L), "a vector of results is made of whole tiles");
  alignas(DEQ_VECTOR_BYTES) float sums[kGroup * NV * S], turned[S * L];
  const int64_t end = a.to < a.width ? a.to : a.width;
  for (int64_t from = a.from; from < end; from += kGroup) {
    for (int64_t j = from; j < from + kGroup && j < end; j += kRows) {
      const float* w[kRows];
      for (int64_t r = 0; r < kRows; ++r) w[r] = a.w + (j + r < a.width ? j + r : a.width - 1) * a.stride;
      const int64_t left = end - (j + kRows);
      Ahead<float> ahead(a.w + (j + kRows) * a.stride, a.width, a.stride, left < 0 ? 0 : left < kRows ? left : kRows);
      rows_times_samples<S, R, NV, kRows>(a, w, ahead, sums + (j - from) * NV * S);
    }
    if (end - from < kGroup) memset(sums + (end - from) * NV * S, 0, (kGroup - (end - from)) * NV * S * sizeof(float));
    for (int64_t at = 0; at < kGroup && from + at < a.to; at += L)
      for (int64_t first = 0; first < NV * S; first += S) {
        for (int64_t i = 0; i < L; i += S)
          Square<float, S * 4>::transpose(sums + (at + i) * NV * S + first, NV * S, turned + i, L);
        for (int64_t s = 0; s < S && first + s < n; ++s)
          M::store(a.out[first + s] + from + at, M::load(turned + s * L) + M::load(a.c[first + s] + from + at));
      }
  }
}

// Element k of all samples side by side, zero for those from n on: lanes[k][sample].
template <int S, int NV>
void spread_to(const float* const* z, int n, int64_t padded, float* lanes) {
  alignas(DEQ_VECTOR_BYTES) float square[S * S];
  for (int64_t first = 0; first < NV * S; first += S) {
    memset(square, 0, sizeof square);
    for (int64_t k = 0; k < padded; k += S) {
      for (int64_t s = 0; s < S && first + s < n; ++s) memcpy(square + s * S, z[first + s] + k, S * sizeof(float));
      Square<float, S * 4>::transpose(square, S, lanes + k * NV * S + first, NV * S);
    }
  }
}

// Calls f with the tile for n samples.
template <class F>
DEQ_INLINE void with_shape(int n, F&& f) {
#if DEQ_VECTOR_BYTES == 64
  if (n <= 4) return f(Shape<4, 4, 1>{});
  if (n <= 8) return f(Shape<8, 8, 1>{});
  if (n <= 16) return f(Shape<16, 8, 1>{});
  f(Shape<16, 8, 2>{});
#else
  if (n <= 4) return f(Shape<4, 4, 1>{});
  if (n <= 8) return f(Shape<8, 8, 1>{});
  f(Shape<8, 4, 2>{});
#endif
}

constexpr int kMostSpread = 2 * kLanes<float>;

void spread(const float* const* z, int n, int64_t padded, float* lanes) {
  with_shape(n, [&](auto shape) { spread_to<shape.S, shape.NV>(z, n, padded, lanes); });
}

}  // namespace
