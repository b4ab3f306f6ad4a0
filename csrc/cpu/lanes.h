// The lane engine's inner loops: one sample a lane of the vector.
//
// A row of m elements is a column here: element j of all samples of a group is one vector, at j x lanes. Products broadcast the
// weights, and whatever is summed over a sample (its residual, Anderson's scalar products) is summed without a sum over lanes.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "../anderson.h"

namespace deq {

constexpr int kMostLanes = 16;

// x = W z + c for the group; W as `pack` of the row engine leaves it.
template <class T>
struct LaneProduct {
  const T *packed, *z, *c;
  T* x;
  int64_t width;
};

// out = act(x), or d x with a mask, or with `reflected` 2 act(x) - x or 2 d x - x; x may be out unless it is reflected.
template <class T>
struct LaneMap {
  const T *x, *z, *d;
  T* out;
  int64_t width;
  int32_t activation;
  bool reflected;
  T *step2, *size2;  // |out - z|^2 and |out|^2 of every lane
  const T* live;     // in the lanes where this is 0 out is z
};

// Product and map at once for relu or a mask, without the elements that are zero in every lane: many in a batch whose samples lie
// in order, none in one of random order.
template <class T>
struct LaneSweep {
  const T *w, *z, *c, *d;  // w[k m + j] = W[j][k]; d null: out = relu(W z + c)
  T* out;
  int64_t width;
  uint64_t nonzero;  // at least the elements of z, or with d those of d, that are not zero; with d the others are zero in out too
  const T* live;     // in the lanes where this is 0 out is z
  uint32_t kept;     // the lanes whose elements are of interest
  T *step2, *size2;  // |out - z|^2 and |out|^2 of every lane
};

// What progresses() of judge.h needs to know of every lane's Record.
template <class T>
struct alignas(64) LaneRecords {
  T step2[kMostLanes], before2[kMostLanes], best_step2[kMostLanes], best_size2[kMostLanes], limit2[kMostLanes];
  T first2[kMostLanes];   // |y|^2 of a start; after its evaluation, until when step2 is infinite, the larger of it and |f(y)|^2
  T slowest[kMostLanes];  // growth of step2 above which the sample is looked at
  T left[kMostLanes];     // evaluations until it is
};

// The windows of Anderson's method: pairs f(y) and f(y) - y in rings of `depth`, the same position for every lane.
template <class T>
struct LaneWindows {
  T *f[kMaxDepth], *g[kMaxDepth];  // by ring position
  alignas(64) T gram[kMaxDepth][kMaxDepth][kMostLanes];
  alignas(64) T weights[kMaxDepth][kMostLanes];
  alignas(64) T factor[kMostLanes];  // powers of two that the f(y) - y are multiplied by
  alignas(64) T held[kMostLanes];    // pairs of every lane that count, newest first; 0: the lane is not accelerated
};

// What look() found of the live lanes, a bit for each.
struct LaneNews {
  uint32_t converged, other;  // other: judge() has to decide
};

// Lane i takes what lane from[i] held, where that is not negative.
template <class T>
using LaneMove = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>[kMostLanes];

template <class T>
struct LaneKernels {
  int lanes;
  void (*product)(const LaneProduct<T>&);
  void (*map)(const LaneMap<T>&);
  uint64_t (*sweep)(const LaneSweep<T>&);  // returns `nonzero` of out, or of d
  // judge() of judge.h for every live lane at once where it is plain: progress, at speed, also at the first evaluation, which
  // sets limit2 to reach2 x first2; or convergence.
  LaneNews (*look)(LaneRecords<T>&, const T* live, const T* step2, const T* size2, T tol2, T leave2, T reach2);
  // Bits of the elements that are not zero in every lane.
  uint64_t (*nonzero)(const T* column, int64_t width);
  // Any strides become columns, column[j][i] = from[i * sample_stride + j * stride] for `count` samples; columns become the rows
  // of all lanes.
  void (*columns)(const T* from, int64_t sample_stride, int64_t stride, int64_t count, int64_t width, T* column);
  void (*rows)(const T* column, int64_t width, T* rows, int64_t stride);
  // Largest magnitude of every lane, infinity if an element is not finite.
  void (*reach)(const T* column, int64_t width, T* largest);
  void (*scale)(T* column, const T* factors, int64_t width);
  void (*move)(const T* column, const LaneMove<T>& from, int64_t width, T* to);
  // Takes the newest pair into ring position order[0], with its row of Gram's matrix; order[i] is the i-th newest of `count`.
  void (*take)(LaneWindows<T>&, const int* order, int count, const T* f, const T* y, int64_t width);
  // f = sum_i weights[i] f_i with anderson_weights() of every accelerated lane.
  void (*mix)(LaneWindows<T>&, const int* order, int count, T regulariser, T* f, int64_t width);
};

}  // namespace deq
