// The step for rows that are half zeros, as relu leaves them: products with a zero are skipped, one row at a time.
//
// A block of W (64 values of k x up to four panels: 32 KB) stays in the L1 cache while all rows pass over it; within a row the
// bits of its nonzero elements are walked, one broadcast and one multiply-add with a memory operand a vector. Adding a product
// with zero changes no sum, and the order of k is that of the dense tiles: the result is the same to the last bit.
#pragma once
#include <unistd.h>

#include <algorithm>

#include "../kernels.h"
#include "kernels.h"
#include "vec.h"

namespace {

constexpr int64_t kWord = 64;         // values of k in one word of bits
constexpr int kSkipPanels = 4;        // most of a block; two accumulators a panel
constexpr int kFewSums = 4;           // accumulators of a row that wait for each other: then two rows at once
constexpr int64_t kFetchWidth = 400;  // W of 640 KB in float32
static_assert(deq::kSumChunk % kWord == 0, "a chunk of the sum ends with a word");

// Panels of a block. Four keep two multipliers busy while sums wait for each other, but their block fills an L1 cache of 32 KB:
// only where more is known to be there. Whole solves by four and by three, Zen 5 (48 KB): 1.02 to 1.05 at m = 128 to 1024.
inline int most_panels() {
  if (DEQ_VECTOR_BYTES < 64) return kSkipPanels;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const bool fits = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
  return fits ? kSkipPanels : 3;
#else
  return 3;
#endif
}

inline int64_t words(int64_t m) { return (m + kWord - 1) / kWord; }

// The bits of word w of a row of `width` elements. What lies behind them does not count: it is zero, but not where an increment
// of the delta engine overflowed, and W has no line for it.
template <class T>
DEQ_INLINE uint64_t nonzero_bits(const T* z, int64_t w, int64_t width) {
  uint64_t bits = 0;
  const int64_t first = w * kWord, count = width - first < kWord ? width - first : kWord;
  for (int64_t k = 0; k < count; k += kLanes<T>) bits |= nonzero_lanes<T>(VecMath<T>::load(z + first + k)) << k;
  return bits & ~uint64_t{0} >> (kWord - count);
}

// Fills the bits of every row; returns how many are set.
template <class T>
int64_t find_nonzeros(const Step<T>& s, int n) {
  const int64_t count = words(s.width);
  int64_t set = 0;
  for (int r = 0; r < n; ++r)
    for (int64_t w = 0; w < count; ++w) {
      s.nonzeros[r * count + w] = nonzero_bits(s.z[r], w, s.width);
      set += __builtin_popcountll(s.nonzeros[r * count + w]);
    }
  return set;
}

// Rows x NP panels of NV vectors from column j, word `w` of k. Sums of earlier words wait in `out`, those of earlier chunks in
// `total`; the last word finishes the row. FIND: the bits are found here, those of a row while the one before is multiplied,
// which waits for its sums and leaves the time for it.
template <class T, int NV, int NP, bool FIND>
__attribute__((noinline)) void skip_block(const Step<T>& s, int n, int64_t j, int64_t w) {
  using M = VecMath<T>;
  using V = typename M::V;
  constexpr int N = NV * NP, L = kLanes<T>;
  static_assert(N * L <= deq::kSkipWidth);
  const int64_t count = words(s.width), k0 = w * kWord, panel = NV * L * s.width;
  const bool fresh = k0 % deq::kSumChunk == 0, last = w + 1 == count, ends = last || (k0 + kWord) % deq::kSumChunk == 0;
  const bool has_total = k0 >= deq::kSumChunk;
  const T* block = s.packed + j * s.width + k0 * (NV * L);
  // W beyond the L2 cache: the gaps between nonzero rows defeat the hardware's prefetcher, so every row fetches its share of
  // the next block.
  const T* next = last ? s.packed + (j + N * L) * s.width : block + kWord * NV * L;
  const int64_t run = kWord * NV * L / n + 1;
  const bool fetches = s.width > kFetchWidth && (!last || j + N * L < s.to);
  [[maybe_unused]] uint64_t coming = FIND ? nonzero_bits(s.z[0], w, s.width) : 0;
  // Loads a row's sums; returns the bits of its nonzero elements.
  auto begin = [&](int r, V(&acc)[N]) {
    if (fetches)
      for (int p = 0; p < NP; ++p)
        for (int64_t i = r * run; i < (r + 1) * run; i += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(next + p * panel + i, 0, 2);
    uint64_t bits = FIND ? coming : s.nonzeros[r * count + w];
    if constexpr (FIND) {
      s.nonzeros[r * count + w] = bits;
      *s.found += __builtin_popcountll(bits);
      if (r + 1 < n) coming = nonzero_bits(s.z[r + 1], w, s.width);
    }
    const T* out = s.out[r] + j;
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) acc[v] = fresh ? V{} : M::load(out + v * L);
    return bits;
  };
  // Adds the product with the first nonzero element.
  auto add = [&](const T* z, uint64_t& bits, V(&acc)[N]) {
    const int64_t k = __builtin_ctzll(bits);
    bits &= bits - 1;
    const V a = z[k] - V{};
    const T* b = block + k * (NV * L);
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[p * NV + v] += a * M::load(b + p * panel + v * L);
  };
  auto end = [&](int r, V(&acc)[N]) {
    T *out = s.out[r] + j, *total = s.total + r * deq::kSkipWidth;
    if (ends && has_total) {
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) acc[v] = M::load(total + v * L) + acc[v];
    }
    if (!last) {
      T* to = ends ? total : out;
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) M::store(to + v * L, acc[v]);
      return;
    }
    T* sums = sums_of(s, r);
    const T *c = s.c[r] + j, *y = s.z[r] + j, *d = s.d ? s.d[r] + j : nullptr;
    V step2{}, size2{};
    if (j > s.from) step2 = M::load(sums), size2 = M::load(sums + L);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      const V x = acc[v] + M::load(c + v * L), f = d ? M::load(d + v * L) * x : deq::Relu<M>::value(x);
      const V diff = f - M::load(y + v * L);
      M::store(out + v * L, f);
      step2 += diff * diff;
      size2 += f * f;
    }
    M::store(sums, step2);
    M::store(sums + L, size2);
  };
  int r = 0;
  if constexpr (N <= kFewSums) {  // Zen 5, whole solves: 1.05 x at m = 64, 1.13 at 80
    for (; r + 2 <= n; r += 2) {
      V one[N], two[N];
      uint64_t bits_one = begin(r, one), bits_two = begin(r + 1, two);
      const T *z_one = s.z[r] + k0, *z_two = s.z[r + 1] + k0;
      const int both = std::min(__builtin_popcountll(bits_one), __builtin_popcountll(bits_two));
#pragma GCC unroll 4
      for (int i = 0; i < both; ++i) add(z_one, bits_one, one), add(z_two, bits_two, two);
#pragma GCC unroll 4
      while (bits_one) add(z_one, bits_one, one);
#pragma GCC unroll 4
      while (bits_two) add(z_two, bits_two, two);
      end(r, one);
      end(r + 1, two);
    }
  }
  for (; r < n; ++r) {
    V acc[N];
    uint64_t bits = begin(r, acc);
    const T* z = s.z[r] + k0;
#pragma GCC unroll 4
    while (bits) add(z, bits, acc);
    end(r, acc);
  }
}

template <class T, int NV, int NP>
DEQ_INLINE void skip_panels(int panels, const Step<T>& s, int n, int64_t j) {
  if constexpr (NP > 0) {
    if (panels < NP) return skip_panels<T, NV, NP - 1>(panels, s, n, j);
    for (int64_t w = 0; w < words(s.width); ++w)
      if (s.found && j == s.from)
        skip_block<T, NV, NP, true>(s, n, j, w);
      else
        skip_block<T, NV, NP, false>(s, n, j, w);
  }
}

// step() for relu or a mask, after find_nonzeros() on the same rows or with `found`.
template <class T>
void skip_step(const Step<T>& s, int n) {
  const int64_t L = kLanes<T>, panels = (s.to - s.from) / (2 * L);
  const int64_t most = most_panels(), groups = (panels + most - 1) / most;
  int64_t j = s.from;
  for (int64_t g = 0; g < groups; ++g) {  // even groups: 6 panels are 3 + 3, not 4 + 2
    const int size = static_cast<int>(panels * (g + 1) / groups - panels * g / groups);
    skip_panels<T, 2, kSkipPanels>(size, s, n, j);
    j += size * 2 * L;
  }
  if (j < s.to) skip_panels<T, 1, 1>(1, s, n, j);
}

}  // namespace
