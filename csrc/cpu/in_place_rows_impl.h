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

// So many elements of a row are loaded together.
constexpr int kTogether = 4;

// kLanes / S rows of W times S samples in a vector: lane = S row + sample.
template <int S>
struct Lanes {
  using M = VecMath<float>;
  using V = M::V;
  static constexpr int kRows = kLanes<float> / S;

  // Of S samples at one k, for every row.
  DEQ_INLINE V samples(const float* z) {
    if constexpr (kRows == 1) {
      return M::load(z);
#if DEQ_VECTOR_BYTES == 64
    } else if constexpr (S == 8) {
      return static_cast<V>(_mm512_broadcast_f32x8(_mm256_loadu_ps(z)));
    } else {
      return static_cast<V>(_mm512_broadcast_f32x4(_mm_loadu_ps(z)));
#else
    } else {
      return static_cast<V>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(z)));
#endif
    }
  }

  // kTogether elements of every row, each for S lanes.
  struct Elements {
    V all;
    DEQ_INLINE Elements of(const float* const* rows, int64_t k) {
#if DEQ_VECTOR_BYTES == 64
      constexpr __mmask16 kOwn = (1u << S) - 1;
      __m512 all = _mm512_broadcast_f32x4(_mm_loadu_ps(rows[0] + k));
#pragma GCC unroll 4
      for (int r = 1; r < kRows; ++r)
        all = _mm512_mask_broadcast_f32x4(all, static_cast<__mmask16>(kOwn << r * S), _mm_loadu_ps(rows[r] + k));
      return {static_cast<V>(all)};
#else
      return {
          static_cast<V>(_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + k)), _mm_loadu_ps(rows[1] + k), 1))};
#endif
    }
    template <int i>
    DEQ_INLINE V at(const Elements& e) {
#if DEQ_VECTOR_BYTES == 64
      return static_cast<V>(_mm512_permute_ps(e.all, i * 0x55));
#else
      return static_cast<V>(_mm256_permute_ps(e.all, i * 0x55));
#endif
    }
  };

  // One element of every row.
  DEQ_INLINE V element(const float* const* rows, int64_t k) {
    if constexpr (kRows == 1) return rows[0][k] - V{};
    alignas(DEQ_VECTOR_BYTES) float lanes[kLanes<float>];
    for (int i = 0; i < kLanes<float>; ++i) lanes[i] = rows[i / S][k];
    return M::load(lanes);
  }
};

// A tile: S samples share a vector, R vectors of rows, NV vectors of samples.
template <int kS, int kR, int kNV>
struct Shape {
  static constexpr int S = kS, R = kR, NV = kNV;
};

// R vectors of rows times NV vectors of samples: sums[row][sample].
template <int S, int R, int NV>
DEQ_INLINE void rows_times_samples(const Affine& a, const float* const (&w)[R * Lanes<S>::kRows], Ahead<float>& ahead,
                                   float* sums) {
  using M = VecMath<float>;
  using V = M::V;
  using Of = Lanes<S>;
  constexpr int64_t L = kLanes<float>, kChunk = deq::kSumChunk;
  constexpr int kLines = R * Of::kRows * kTogether * static_cast<int>(sizeof(float)) / 64;
  const float* z = a.lanes;
  for (int64_t k0 = 0, k1; k0 < a.width; k0 = k1) {
    k1 = a.width < k0 + kChunk ? a.width : k0 + kChunk;
    V acc[R][NV], b[NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = V{};
    auto load = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = Of::samples(z + v * L);
      z += NV * S;
    };
    auto add = [&](int r, V x) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
    };
    int64_t k = k0;
    for (; k + kTogether <= k1; k += kTogether) {
      ahead.ask<kLines>();
      if constexpr (Of::kRows == 1) {
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          load();
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) add(r, w[r][k + i] - V{});
        }
      } else {
        typename Of::Elements elements[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) elements[r] = Of::Elements::of(w + r * Of::kRows, k);
        auto add_all = [&](auto i) __attribute__((always_inline)) {
          load();
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) add(r, Of::Elements::template at<i()>(elements[r]));
        };
        add_all(std::integral_constant<int, 0>{});
        add_all(std::integral_constant<int, 1>{});
        add_all(std::integral_constant<int, 2>{});
        add_all(std::integral_constant<int, 3>{});
      }
    }
    for (; k < k1; ++k) {
      load();
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) add(r, Of::element(w + r * Of::kRows, k));
    }
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
  constexpr int64_t L = kLanes<float>, kSide = S, kRows = R * Lanes<S>::kRows;
  static_assert(L % kRows == 0 && (NV == 1 || S == L), "a vector of results is made of whole tiles");
  alignas(DEQ_VECTOR_BYTES) float sums[L * NV * S], turned[S * L];
  const int64_t end = a.to < a.width ? a.to : a.width;
  for (int64_t from = a.from; from < end; from += L) {
    for (int64_t j = from; j < from + L && j < end; j += kRows) {
      const float* w[kRows];
      for (int64_t r = 0; r < kRows; ++r) w[r] = a.w + (j + r < a.width ? j + r : a.width - 1) * a.stride;
      const int64_t left = end - (j + kRows);
      Ahead<float> ahead(a.w + (j + kRows) * a.stride, a.width, a.stride, left < 0 ? 0 : left < kRows ? left : kRows);
      rows_times_samples<S, R, NV>(a, w, ahead, sums + (j - from) * NV * S);
    }
    if (end - from < L) memset(sums + (end - from) * NV * S, 0, (L - (end - from)) * NV * S * sizeof(float));
    for (int64_t first = 0; first < NV * S; first += S) {
      for (int64_t i = 0; i < L; i += kSide) Square<float, S * 4>::transpose(sums + i * NV * S + first, NV * S, turned + i, L);
      for (int64_t s = 0; s < S && first + s < n; ++s)
        M::store(a.out[first + s] + from, M::load(turned + s * L) + M::load(a.c[first + s] + from));
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
  if (n <= 8) return f(Shape<8, 4, 1>{});
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
