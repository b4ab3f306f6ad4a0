// What one instruction set offers: the inner loops, as a table of function pointers. The driver (solve.cpp) is compiled for the
// baseline and calls through it, so that no code outside kernels_<isa>.cpp needs the instruction set.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "lanes.h"

namespace deq {

constexpr int kHashLanes = 64;
// Sums over k are cut into chunks: the rounding error of a long sum grows with the chunk, not with m.
constexpr int64_t kSumChunk = 512;
constexpr int64_t kSkipWidth = 128;  // most columns that skip_step takes at once
// The widest W for which skip_step finds the zeros itself. A forward solve of 256 samples, Zen 5: 1.06 times as fast at m = 64,
// 1.01 at 128, 0.99 at 192 and 256.
constexpr int64_t kFindWidth = 128;

// One application of the map to n rows: out = act(W z + c), or d * (W z + c), with the residual sums of every row; in the columns
// of one segment (segments.h).
// Rows are padded with zeros to a multiple of the vector width; W is packed by `pack`.
template <class T>
struct Step {
  const T* const* z;  // n row pointers
  T* const* out;      // n row pointers, distinct from z
  const T* const* c;  // n row pointers
  const T* const* d;  // n row pointers, or null: apply the activation
  T* const* sums;     // n pointers to 2 vectors of scratch a segment
  double* totals;     // n pairs: |out - z|^2 and |out|^2
  const T* packed;
  int64_t width;
  int32_t activation;
  int segment;
  int64_t from, to;              // columns of the segment
  uint64_t* nonzeros = nullptr;  // skip_step: n x ceil(width / 64) words of scratch
  T* total = nullptr;            // skip_step: n x kSkipWidth elements of scratch
  T* const* pre = nullptr;       // n row pointers: keep x = W z + c there and put 2 act(x) - x, or 2 d x - x, into out
  int64_t* found = nullptr;      // skip_step: marks the nonzero elements itself and adds their number here; null: they are marked
};

// out = factor left right, or with `adds` added to it: left (rows, inner) and right (inner, columns) in any strides, rows of out
// contiguous.
template <class T>
struct Product {
  const T* left;
  int64_t left_row, left_inner;
  const T* right;
  int64_t right_row, right_column;
  T* out;
  int64_t out_stride;
  int64_t rows, inner, columns;
  T factor;
  bool adds;
  bool is_large;  // the whole result is so large that what is written of it will not be read from a cache
  T* scratch;     // product_scratch(rows) elements
};

template <class T>
struct Kernels {
  const char* name;
  int lanes;  // elements a vector
  int panel;  // columns of a packed panel (two vectors); the last panel may be one vector wide
  int rows;   // rows of the largest register tile

  // dst = src, zero from n to `padded`; returns the largest magnitude, infinity if any element is not finite.
  T (*copy_in)(const T* src, int64_t n, int64_t padded, T* dst);
  // x *= factor.
  void (*scale)(T* x, T factor, int64_t padded);
  // dst = factor * src; false if any result is not finite.
  bool (*copy_out)(const T* src, T factor, int64_t n, T* dst);
  // packed[panel][k][column] <- W[column * row_stride + k * column_stride] for panels [first, last); false if any element is
  // not finite.
  bool (*pack)(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, T* packed, int64_t first, int64_t last);
  void (*step)(const Step<T>&, int n);
  // After every segment's step: the totals of `segments` segments.
  void (*add_up)(const Step<T>&, int n, int segments);
  // The same step bit for bit, for relu or a mask, without the products with zeros: find_nonzeros marks the elements of z that
  // count and returns their number, skip_step does the rest, or both.
  int64_t (*find_nonzeros)(const Step<T>&, int n);
  void (*skip_step)(const Step<T>&, int n);
  // out = act'(W z + c) in columns [from, to); ignores d, sums and totals.
  void (*derivative)(const Step<T>&, int n);
  // A padded row of act(x) becomes act'(x), where the activation allows it.
  void (*derivative_of_value)(int32_t activation, T* x, int64_t m);
  // The map at z = 0: out = act(c) or d * c; returns |out|^2.
  double (*first)(int32_t activation, const T* c, const T* d, T* out, int64_t m);
  // Anderson: f_row = f, g_row = f - y; dots[i] = <g, rows[i]>; out = sum_i weights[i] rows[i].
  void (*residual)(const T* f, const T* y, T* f_row, T* g_row, int64_t padded);
  void (*dots)(const T* g, const T* const* rows, int count, int64_t padded, double* dots);
  void (*mix)(const T* const* rows, const T* weights, int count, int64_t padded, T* out);
  void (*product)(const Product<T>&);
  int64_t (*product_scratch)(int64_t rows);
  // Inverts the n x n matrix in place, without pivoting; `work` holds n * n numbers.
  void (*invert)(T* matrix, int64_t stride, int64_t n, double* work);
  // Hash lanes of the weight cache: absorbs blocks of kHashLanes words.
  void (*absorb)(uint64_t* lanes, const void* data, int64_t blocks);
  double (*peak_flops)(int64_t repeats);  // runs FMAs on registers only; returns their flops
  const LaneKernels<T>* (*lane)();        // the lane engine's
};

// Elements of one packed matrix of width m.
template <class T>
int64_t packed_elements(const Kernels<T>& k, int64_t m) {
  return (m + k.lanes - 1) / k.lanes * k.lanes * m;
}

constexpr int kMaxTile = 64;
// Half of a 1 MB L2 for the rows of a tile; the rest for the panels of W that stream through.
constexpr int64_t kTileBytes = 512 << 10;
// Rows start this many bytes apart modulo 4096, so that the rows of a tile do not share cache sets.
constexpr int64_t kRowSkew = 64;

// The samples that the row engine takes together at most, of `rows` rows of `stride` elements each.
template <class T>
int64_t tile_size(const Kernels<T>& k, int64_t rows, int64_t stride) {
  const int64_t fit = kTileBytes / (rows * stride * static_cast<int64_t>(sizeof(T)));
  return std::min<int64_t>(kMaxTile, std::max<int64_t>(2 * k.rows, fit / k.rows * k.rows));
}

// Compiled-in tables; null where the build or the CPU lacks the instruction set.
template <class T>
const Kernels<T>* portable_kernels();
template <class T>
const Kernels<T>* avx2_kernels();
template <class T>
const Kernels<T>* avx512_kernels();

// The table in use.
template <class T>
const Kernels<T>& kernels();

}  // namespace deq
