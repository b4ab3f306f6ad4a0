// The lane engine's inner loops: one sample a lane of the vector.
//
// A row of m elements is a column here: element j of all samples of a group is one vector, at j x lanes. Products broadcast the
// weights, and whatever is summed over a sample (its residual, Anderson's scalar products) is summed without a sum over lanes.
#pragma once
#include <stdint.h>

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
  alignas(64) T held[kMostLanes];  // pairs of every lane that count, newest first; 0: the lane is not accelerated
};

template <class T>
struct LaneKernels {
  int lanes;
  void (*product)(const LaneProduct<T>&);
  void (*map)(const LaneMap<T>&);
  // progresses() of judge.h for every lane at once, also at the first evaluation, which sets limit2 to reach2 x first2: a bit for
  // every lane for which it is false.
  uint32_t (*look)(LaneRecords<T>&, const T* step2, const T* size2, T tol2, T reach2);
  // Takes the newest pair into ring position order[0], with its row of Gram's matrix; order[i] is the i-th newest of `count`.
  void (*take)(LaneWindows<T>&, const int* order, int count, const T* f, const T* y, int64_t width);
  // out[j] = factor x element j of a lane of `column`; false if one is not finite.
  bool (*leave)(const T* column, int lane, T factor, int64_t width, T* out);
  // f = sum_i weights[i] f_i with anderson_weights() of every accelerated lane.
  void (*mix)(LaneWindows<T>&, const int* order, int count, T regulariser, T* f, int64_t width);
};

}  // namespace deq
