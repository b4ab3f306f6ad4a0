// What the solving kernels of both regimes share: their arguments, the decisions for a slot, and its elements.
#pragma once
#include "../kernels.h"
#include "../reliable.h"
#include "../scalar_math.h"
#include "fragments.h"

namespace deq {

constexpr float kLargest = 3.4028234663852886e38f;
constexpr int kSlots = kTileSamples;  // samples solved together by a team of warps, one a column of the product

// Rounding W and increments to bfloat16 leaves about this share of the increments in y (csrc/cpu/delta.cpp measured it).
constexpr double kBfloat16Pollution = 2e-3;

// What was found out about a sample before its solve.
struct Note {
  double start2;    // |z0|^2, scaled
  float scale;      // the sample is multiplied by this power of two; 0: refused, its input is not finite
  int32_t is_wide;  // squares may leave the range of float32: its sums are formed in double
};

// Arguments of the kernels, float32 throughout. Rows of W are contiguous.
struct Call {
  int64_t batch, width;
  const float* W;
  int64_t row_stride, matrix_stride;
  DeqView injection, start, mask, out;  // data null where there is none
  int32_t activation, mask_is_value;
  Reliable reliable;
  int32_t* iterations;
  float* residual;
  uint8_t* status;
  DeqReport* report;
  Note* notes;     // (S, B)
  float* scratch;  // block_scratch floats for every block, or grid_scratch for all
  int64_t first_weight;
};

DEQ_HD float* row_of(const DeqView& view, int64_t weight, int64_t sample) {
  return static_cast<float*>(view.data) + weight * view.stride[0] + sample * view.stride[1];
}

// What the threads that own a slot's elements do next.
struct Action {
  enum Kind : int32_t { kIdle, kStep, kAnchor, kLoad };
  int64_t save;  // the sample whose last anchor is its best so far: write it out; or -1
  int64_t load;  // with kLoad: the sample that moves in
  int32_t kind;
  int32_t saves_first;  // the best iterate is the value at zero
  float limit;          // a larger |f| is out of range once its scale is taken back
};

// One slot's sample and how it is doing.
struct SlotControl {
  Progress progress;
  int64_t sample = -1;  // none
  float limit = 0;
  bool is_exact;  // the evaluation under way is an anchor

  DEQ_HD Action begin(const Call& call, int64_t weight, int64_t next) {
    sample = next;
    is_exact = true;
    progress = new_progress();
    const float scale = next < 0 ? 0 : call.notes[weight * call.batch + next].scale;
    limit = kLargest * (scale < 1 ? scale : 1);
    return Action{-1, next, next < 0 ? Action::kIdle : Action::kLoad, 0, limit};
  }

  // Judges the evaluation just made. `next()` gives the sample that moves in when this one is done, or -1; `tells`: of the
  // blocks that decide the same, this one says how the sample ended.
  template <class NextSample>
  DEQ_HD Action decide(const Call& call, int64_t weight, double step2, double size2, bool tells, const NextSample& next) {
    if (sample < 0) return Action{-1, -1, Action::kIdle, 0, 0};
    if (!is_exact) {
      is_exact = after_step(call.reliable, progress, step2, size2) != Next::kStep;
      return Action{-1, -1, is_exact ? Action::kAnchor : Action::kStep, 0, limit};
    }
    const int64_t index = weight * call.batch + sample;
    bool is_best;
    const Verdict verdict = judge_anchor(call.reliable, progress, step2, size2, call.notes[index].start2, &is_best);
    const int64_t save = is_best ? sample : -1;
    if (verdict == Verdict::kContinue) {
      is_exact = anchors_again(call.reliable, progress);
      return Action{save, -1, is_exact ? Action::kAnchor : Action::kStep, 0, limit};
    }
    const bool nothing_saved = progress.record.best_at == 0;  // not even the first evaluation was finite
    if (tells) {
      call.iterations[index] = static_cast<int32_t>(progress.record.iteration);
      call.residual[index] = static_cast<float>(progress.record.residual());
      call.status[index] = static_cast<uint8_t>(verdict);
    }
    const int64_t finished = sample;
    Action action = begin(call, weight, next());
    action.save = nothing_saved ? finished : save;
    action.saves_first = nothing_saved;
    return action;
  }
};

// The first sample that is solved of `sample`, `sample` + stride, ..., or -1.
DEQ_HD int64_t first_solved(const Call& call, int64_t weight, int64_t sample, int64_t stride) {
  while (sample < call.batch && call.notes[weight * call.batch + sample].scale == 0) sample += stride;
  return sample < call.batch ? sample : -1;
}

// f at y: value(y), or with a mask d y.
template <int E>
DEQ_GPU void evaluate(const Call& call, const float (&y)[E], const float (&d)[E], float (&f)[E]) {
  if (call.mask.data) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) f[e] = d[e] * y[e];
    return;
  }
  with_activation<ScalarMath<float>>(
      call.activation, [&](auto activation) { DEQ_UNROLL for (int e = 0; e < E; ++e) f[e] = decltype(activation)::value(y[e]); });
}

// y (slot, row) = W x for R rows of W and N slots, by one warp: float32 throughout. Every sum runs over the same lanes in the
// same order whatever R and N are. `x` and `y` hold `width` floats a slot, of which the N from `first_slot` on are looked at.
template <class Gpu, int R, int N>
DEQ_GPU void exact_rows(const float* W, int64_t row_stride, int64_t width, int64_t first_row, const float* x, float* y,
                        int first_slot) {
  const int lane = Gpu::thread() % kWarp;
  float sum[R * N];
  DEQ_UNROLL for (int i = 0; i < R * N; ++i) sum[i] = 0;
  const float* w[R];
  DEQ_UNROLL for (int r = 0; r < R; ++r) w[r] = W + (first_row + r < width ? first_row + r : width - 1) * row_stride;
#ifdef __CUDACC__
#pragma unroll 2
#endif
  for (int64_t k = lane; k < width; k += kWarp) {
    float value[N];
    DEQ_UNROLL for (int n = 0; n < N; ++n) value[n] = x[(first_slot + n) * width + k];
    DEQ_UNROLL for (int r = 0; r < R; ++r) {
      const float weight = w[r][k];
      DEQ_UNROLL for (int n = 0; n < N; ++n) sum[r * N + n] = fmaf(weight, value[n], sum[r * N + n]);
    }
  }
  // Every step adds lanes that differ in one bit; while there are several sums, the lanes also share them out.
  int count = R * N, mask = kWarp / 2;
  DEQ_UNROLL for (int step = 0; step < 5; ++step, mask /= 2) {
    const bool upper = lane & mask;
    if (count == 1) {
      sum[0] += Gpu::shuffle_xor(sum[0], mask);
      continue;
    }
    count /= 2;
    DEQ_UNROLL for (int i = 0; i < R * N / 2; ++i) {
      if (i >= count) break;
      const float kept = upper ? sum[count + i] : sum[i], sent = upper ? sum[i] : sum[count + i];
      sum[i] = kept + Gpu::shuffle_xor(sent, mask);
    }
  }
  const int index = lane * (R * N) / kWarp;
  if (lane % (kWarp / (R * N)) == 0) {
    const int64_t row = first_row + index / N;
    if (row < width) y[(first_slot + index % N) * width + row] = sum[0];
  }
}

// What `prepare` writes: notes, and for samples that are not solved their status, residual and output. One warp a sample.
template <class Gpu>
DEQ_GPU void prepare_sample(const Call& call, int64_t weight, int64_t sample) {
  const int lane = Gpu::thread() % kWarp;
  const int64_t index = weight * call.batch + sample;
  const float *c = row_of(call.injection, weight, sample), *start = row_of(call.start, weight, sample);
  float reach[2] = {0, 0};
  for (int64_t k = lane; k < call.width; k += kWarp) {
    const float a = fabsf(c[k * call.injection.stride[2]]);
    reach[0] = a <= reach[0] ? reach[0] : a;  // keeps a NaN: no comparison with it is true
    if (reach[0] != reach[0]) reach[0] = INFINITY;
    if (!call.start.data) continue;
    const float b = fabsf(start[k * call.start.stride[2]]);
    reach[1] = b <= reach[1] ? reach[1] : b;
    if (reach[1] != reach[1]) reach[1] = INFINITY;
  }
  for (int mask = kWarp / 2; mask; mask /= 2) DEQ_UNROLL for (int i = 0; i < 2; ++i) {
      const float other = Gpu::shuffle_xor(reach[i], mask);
      reach[i] = other > reach[i] ? other : reach[i];
    }
  Note note{0, 1, 0};
  const float largest = reach[0] > reach[1] ? reach[0] : reach[1];
  // Near 1 the squares are in range as they are.
  constexpr float kNear = 1 << 20;
  if (largest > 0 && (largest > kNear || largest < 1 / kNear)) {
    // Linear in the injection up to a positive factor: rescaling by a power of two changes no bit of the path.
    if (call.mask.data || is_homogeneous(call.activation)) {
      const int exponent = -ilogbf(largest);
      note.scale = ldexpf(1, exponent > 126 ? 126 : exponent < -126 ? -126 : exponent);
    } else {
      note.is_wide = 1;
    }
  }
  if (!(largest < INFINITY)) {
    note.scale = 0;
    const float value = call.mask.data ? NAN : 0.0f;  // NaN in, NaN out for the adjoint: a loss scaler looks for it
    for (int64_t k = lane; k < call.width; k += kWarp) row_of(call.out, weight, sample)[k] = value;
  } else if (call.start.data) {
    for (int64_t k = lane; k < call.width; k += kWarp) {
      const double v = static_cast<double>(start[k * call.start.stride[2]]) * note.scale;
      note.start2 += v * v;
    }
    for (int mask = kWarp / 2; mask; mask /= 2) note.start2 += Gpu::shuffle_xor(note.start2, mask);
  }
  if (lane != 0) return;
  call.notes[index] = note;
  if (note.scale == 0) {
    call.iterations[index] = 0;
    call.residual[index] = INFINITY;
    call.status[index] = DEQ_NONFINITE;
    if (!(reach[0] < INFINITY)) Gpu::keep_least(&call.report->bad_injection, index + 1);
    if (!(reach[1] < INFINITY)) Gpu::keep_least(&call.report->bad_start, index + 1);
  }
}

}  // namespace deq
