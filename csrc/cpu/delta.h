// Delta iterations with reliable updates: the parts that the driver (delta.cpp) and the inner loops share.
//
// A sample keeps y = W x + c in float32, where x is what its increments have added up to. A step multiplies one quantised
// increment, y += W_low Q(f(y) - x), x += Q(f(y) - x): what rounding left out of an increment is still in the next one, so only
// the rounding of W is left in y, and that is proportional to the increments. A float32 evaluation of y (an anchor) removes it;
// a correction, y += (W - W_low) Q(sum of increments), removes all but the square of it at the price of one step.
//
// A sample is judged at anchors, and instead of the last one at a corrected step if it passes with all that rounding may have
// left out counted in. What that is follows from the scales of W and from |d|_1 of the increments d since an anchor. For Gaussian
// weights and a tolerance of 1e-5 it is a relative 1.2e-6 (m = 512) to 4.5e-6 (m = 4096), and what y is wrong by 2e-7, as after
// any sum in float32. A solve has one anchor then where it had two: 1.07 to 1.09 x as fast at 2048 x 16 and 1024 x 4 (Zen 4, one
// thread), 1.03 to 1.05 at 512 x 64 and 1024 x 256, 1.0 at m = 128, where anchors leave out half of their products.
#pragma once
#include <math.h>
#include <stdint.h>

#include <memory>

#include "../kernels.h"
#include "cache.h"

namespace deq {

// One sample in the inner loops. Rows are padded with zeros to a multiple of the vector width.
struct DeltaRow {
  float* y;         // W x + c
  float* x;         // the sum of the increments
  const float* d;   // derivative of the adjoint problem, or null
  void* increment;  // of the step before
  void* next;       // written by the step, and read in the columns that it has written
  float* sums;      // 3 vectors of scratch a piece
  float scale;      // of the increment of the step before: element = scale * integer
  float next_scale,
      next_inverse;  // of the increment written; a larger element is cut off, and what was cut is in the next increment
  int shift;         // scale = 2^shift next_scale
  double step2, size2;
  float largest;  // |f(y) - x|^2, |f(y)|^2 and max |f(y) - x|, set by add_up and measure

  void set_next_scale(double scale_of_next) {
    next_scale = static_cast<float>(scale_of_next);
    next_inverse = next_scale > 1e-37f ? 1 / next_scale : 0;
  }
};

// What f is where the step applies it; other activations are applied by the driver.
enum class DeltaMap { kByRow, kRelu, kReflectedRelu, kMask, kReflectedMask };

// What a step multiplies of the increment of the step before, besides the new one in the columns before `fresh`: all of it, the
// rest, or, where there was no step before, nothing.
enum class Old : uint8_t { kAll, kRest, kNothing };

// A step in the columns [from, to), one piece of a step or of a stage of a sweep.
struct DeltaStep {
  DeltaRow* const* rows = nullptr;
  const void* weights = nullptr;  // a plane of a matrix packed by `pack`
  int64_t width = 0;
  DeltaMap map = DeltaMap::kByRow;
  Old old = Old::kAll;
  int stage = 0, piece = 0;
  int64_t fresh = 0;  // where the stage starts; 0 in a step that is no sweep
  int64_t from = 0, to = 0;
};

// out = W z + c for rows padded with zeros, in the columns [from, to) of out; W as the caller has it, its rows or its columns
// contiguous and `stride` apart.
struct Affine {
  const float* const* z;
  float* const* out;
  const float* const* c;
  float* const* total;  // scratch
  const float* lanes;   // z as `spread` leaves it, where the rows of W are contiguous; null where its columns are
  const float* w;
  int64_t stride, width;
  int64_t from, to;
};

// What rounding leaves out of W: |(W - W_low) d| <= low |d|_1, and |(W - W_low) d - correction of d| <= corrected |d|_1.
struct LeftOut {
  double low = INFINITY, corrected = INFINITY;
};

struct DeltaKernels {
  DeqPrecision precision;
  int lanes;  // of the float32 kernels that these work with
  int element_bytes;

  // A packed matrix is two planes of so many bytes: W_low, and what is left of W in the same precision. Made from W as the
  // float32 kernels have packed it, for panels [first, last).
  int64_t (*plane_bytes)(int64_t m);
  void (*pack)(const float* w, int64_t m, void* packed, int64_t first, int64_t last);
  // The same of a matrix as the caller has it, whose columns or rows are contiguous; false if one of its elements is not finite.
  bool (*pack_columns)(const float* w, int64_t stride, int64_t m, void* packed, int64_t first, int64_t last);
  bool (*pack_rows)(const float* w, int64_t stride, int64_t m, void* packed, int64_t first, int64_t last);
  // Of a packed matrix.
  LeftOut (*left_out)(const void* packed, int64_t m);
  // The affine map of n rows, with W in place.
  void (*affine)(const Affine&, int n);
  // z of n samples for it, the samples side by side: `padded` elements of each, and as many samples as fill whole vectors.
  void (*spread)(const float* const* z, int n, int64_t padded, float* lanes);
  int most_spread;  // samples
  // y += W_low increment for n rows and, unless the map is applied by row, settles them.
  void (*step)(const DeltaStep&, int n);
  // The next increment with x and the sums, in the columns of the piece; `state` holds f(y) there.
  void (*settle)(const DeltaStep&, DeltaRow&, const float* state);
  // After the last stage: sets step2, size2 and largest.
  void (*add_up)(DeltaRow&, int pieces);
  // The state is f(y), formed in passing, or where the map is applied by row as given.
  // Sets step2, size2 and largest.
  void (*measure)(DeltaRow&, DeltaMap, const float* state, int64_t padded);
  // |state - x|_1.
  double (*distance1)(const DeltaRow&, const float* state, int64_t padded);
  // x = 0 where relu(y) is: rounding has left there what an anchor would multiply, a tenth of all products for a Gaussian W, and
  // a third with slow modes.
  void (*drop_inactive)(DeltaRow&, int64_t padded);
  // next = Q(state - x), x += next; what x was goes to `before` if that is not null.
  void (*feed)(DeltaRow&, DeltaMap, const float* state, float* before, int64_t padded);
};

// Compiled-in tables.
const DeltaKernels* avx512vnni_delta_kernels();
const DeltaKernels* avx512vnni256_delta_kernels();
const DeltaKernels* avxvnni_delta_kernels();
const DeltaKernels* avx512bf16_delta_kernels();

// The inner loops for increments of this precision that go with the float32 kernels in use; null where the CPU or the build has
// none.
const DeltaKernels* delta_kernels(int32_t precision);

// W as the float32 kernels take it, which may be in place and not packed, and derived from it the planes of every matrix.
Weights delta_weights(const DeqProblem& problem, const DeltaKernels& low, int threads);

// Whether delta_solve serves the problem: else the row engine does.
bool delta_serves(const DeqProblem& problem);
int32_t delta_solve(const DeqProblem& problem);

}  // namespace deq
