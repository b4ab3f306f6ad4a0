// What the solving kernels of both regimes share: their arguments, the decisions for a slot, and its elements.
#pragma once
#include "../anderson.h"
#include "../kernels.h"
#include "../reliable.h"
#include "../scalar_math.h"
#include "fragments.h"

namespace deq {

constexpr float kLargest = 3.4028234663852886e38f;
constexpr int kSlots = kTileSamples;  // samples solved together by a team of warps, one a column of the product

// Rounding W and increments to bfloat16 leaves about this share of the increments in y (csrc/cpu/delta.cpp measured it).
constexpr double kBfloat16Pollution = 2e-3;

constexpr int kWindow = 5;           // pairs of Anderson's window, at most
constexpr int kNorms = 2 + kWindow;  // of an evaluation: |f - x|^2, |f|^2, and the products of f - x with those of the window

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
  int32_t acceleration, depth;  // depth <= kWindow
  int32_t* iterations;
  float* residual;
  uint8_t* status;
  DeqReport* report;
  Note* notes;     // (S, B)
  float* scratch;  // block_scratch floats for every block, or grid_scratch for all
  int64_t first_weight;
  int32_t groups;     // of a weight, in GridSolve
  int32_t exchanges;  // whether a block's anchors have room in its shared memory (BlockLayout)
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
  // Anderson's window, positions of its ring; -1: none.
  int32_t complete;  // where x and y belong that the last evaluation led to
  int32_t mix;       // that many of the newest pairs are mixed into the next x and y; 0: none
  int32_t entry;     // where the residual of the next evaluation goes
  int32_t filled;    // one bit for every other position that holds a residual
};

DEQ_HD Action idle() { return Action{-1, -1, Action::kIdle, 0, 0, -1, 0, -1, 0}; }

// What the slots of a warp that judges are about to do, one bit a slot: a turn in which nobody comes, goes or is anchored neither
// looks at their actions nor passes the code for it. On an H200 a solve of 64 x 256 waits for instructions a fifth of its time.
struct alignas(16) Orders {
  enum : uint32_t { kActive = 1, kWide = 2, kAccelerated = 4, kSaves = 8, kMoves = 16 };
  uint32_t flags;    // of any slot; kMoves: a sample moves in, or none is left
  uint32_t anchors;  // whose y is formed anew from x
  uint32_t exact;    // whose evaluation is judged
  uint32_t idle;     // that have no sample

  DEQ_HD bool has(uint32_t flag) const { return flags & flag; }
  DEQ_HD void join(const Orders& other) {
    flags |= other.flags, anchors |= other.anchors, exact |= other.exact, idle |= other.idle;
  }
};

// A slot's share of what its threads and the one that decides exchange.
struct Mixture {
  double norms[kNorms];           // of the evaluation just made, where one thread adds them up for another
  double gram[kWindow][kWindow];  // by position in the ring
  float weights[kWindow];         // newest first
};

// One slot's sample and how it is doing.
struct SlotControl {
  Progress progress;
  int64_t sample = -1;  // none
  float limit = 0;
  bool is_exact = false;  // the evaluation under way is an anchor
  bool is_wide = false;   // as its note says
  bool is_accelerated = false;
  // Anderson: where the residual of the evaluation under way goes, the pairs held, and those whose y rests on the last anchor.
  int32_t entry = 0, window = 0, fresh = 0;

  DEQ_HD Action begin(const Call& call, int64_t weight, int64_t next) {
    sample = next;
    if (sample < 0) return idle();
    is_exact = true;
    progress = new_progress();
    is_accelerated = call.acceleration == DEQ_ANDERSON;
    entry = window = fresh = 0;
    const Note note = call.notes[weight * call.batch + sample];
    is_wide = note.is_wide;
    limit = kLargest * (note.scale < 1 ? note.scale : 1);
    return Action{-1, sample, Action::kLoad, 0, limit, -1, 0, is_accelerated ? 0 : -1, 0};
  }

  // Judges the evaluation just made: norms(i) is its i-th of kNorms. `next()` gives the sample that moves in when this one is
  // done, or -1; `tells`: of the blocks that decide the same, this one says how the sample ended.
  template <class Norms, class NextSample>
  DEQ_HD Action decide(const Call& call, int64_t weight, const Norms& norms, Mixture& mixture, bool tells,
                       const NextSample& next) {
    if (sample < 0) return idle();
    const int64_t index = weight * call.batch + sample;
    const double step2 = norms(0), size2 = norms(1);
    const bool was_exact = is_exact;
    Action action{-1, -1, Action::kStep, 0, limit, -1, 0, -1, 0};
    if (is_exact) {
      bool is_best;
      const Verdict verdict = judge_anchor(call.reliable, progress, step2, size2, call.notes[index].start2, &is_best);
      if (is_best) action.save = sample;
      if (verdict != Verdict::kContinue) {
        const bool nothing_saved = progress.record.best_at == 0;  // not even the first evaluation was finite
        const int64_t save = nothing_saved ? sample : action.save;
        if (tells) {
          call.iterations[index] = static_cast<int32_t>(progress.record.iteration);
          call.residual[index] = static_cast<float>(progress.record.residual());
          call.status[index] = static_cast<uint8_t>(verdict);
        }
        action = begin(call, weight, next());
        action.save = save;
        action.saves_first = nothing_saved;
        return action;
      }
      is_exact = anchors_again(call.reliable, progress);
    } else {
      is_exact = after_step(call.reliable, progress, step2, size2) != Next::kStep;
    }
    if (is_exact) action.kind = Action::kAnchor;
    if (is_accelerated) {
      accelerate(call, norms, mixture, was_exact, &action);
    } else if (call.acceleration == DEQ_ON_DEMAND) {
      const double least2 = lesser(progress.ratio2[0], progress.ratio2[1]);
      const bool is_slow = progress.record.iteration >= kSlowAfter && least2 > kSlowContraction * kSlowContraction;
      is_accelerated = is_slow || progress.native;
      if (is_accelerated) action.entry = 0;
    }
    return action;
  }

  // The residual just measured joins the window. A step goes on from products that rest on the last anchor; an anchor forms its
  // own, and may mix all.
  template <class Norms>
  DEQ_HD void accelerate(const Call& call, const Norms& norms, Mixture& mixture, bool was_exact, Action* action) {
    const int32_t depth = call.depth;
    window = window < depth ? window + 1 : depth;
    fresh = was_exact ? 1 : fresh < depth ? fresh + 1 : depth;
    DEQ_UNROLL for (int32_t i = 0; i < kWindow; ++i) {
      if (i >= window) break;
      const int32_t ring = (entry - i + depth) % depth;
      mixture.gram[entry][ring] = mixture.gram[ring][entry] = i == 0 ? norms(0) : norms(2 + ring);
    }
    const auto gram = [&](int i, int j) { return mixture.gram[(entry - i + depth) % depth][(entry - j + depth) % depth]; };
    double weights[kWindow];
    int32_t count = is_exact ? window : fresh;
    while (count > 1 && !anderson_weights<kWindow>(gram, count, 10 * call.reliable.rule.eps, weights)) --count;
    if (count > 1) {
      action->mix = count;
      DEQ_UNROLL for (int32_t i = 0; i < kWindow; ++i) if (i < count) mixture.weights[i] = static_cast<float>(weights[i]);
    }
    action->complete = entry;
    entry = (entry + 1) % depth;
    action->entry = entry;
    action->filled = ((1 << window) - 1) & ~(1 << entry);
  }
};

// The orders of a warp whose lanes below `slots` hold a slot each, the first of them number `first`.
template <class Gpu>
DEQ_GPU Orders orders_of(const Call& call, const SlotControl& slot, const Action& action, int slots, int first, bool was_idle) {
  const bool holds = Gpu::thread() % kWarp < slots, is_active = holds && slot.sample >= 0;
  const bool loads = holds && action.kind == Action::kLoad, is_idle = holds && action.kind == Action::kIdle;
  const auto any = [](bool value, uint32_t flag) { return Gpu::any(value) ? flag : 0u; };
  Orders orders;
  orders.flags = any(is_active, Orders::kActive) | any(is_active && slot.is_wide, Orders::kWide) |
                 any(is_active && slot.is_accelerated, Orders::kAccelerated) | any(holds && action.save >= 0, Orders::kSaves) |
                 any(loads || (is_idle && !was_idle), Orders::kMoves);
  const bool anchors = holds && action.kind == Action::kAnchor;
  orders.anchors = Gpu::ballot(anchors || (loads && call.start.data)) << first;
  orders.exact = Gpu::ballot(anchors || loads) << first;
  orders.idle = Gpu::ballot(is_idle) << first;
  return orders;
}

// The first sample that is solved of `sample`, `sample` + stride, ..., or -1.
DEQ_HD int64_t first_solved(const Call& call, int64_t weight, int64_t sample, int64_t stride) {
  while (sample < call.batch && call.notes[weight * call.batch + sample].scale == 0) sample += stride;
  return sample < call.batch ? sample : -1;
}

// numbers[e] = f(numbers[e]) for the elements of the set, in a loop that is not unrolled, by passing the numbers on: unrolled,
// nine activations wherever an element is evaluated made kernels of 180 to 270 KB, and a fifth of their time on an H200 was the
// wait for instructions. (Out of line, f would cost the registers that a call may not keep.)
template <int E, class Function>
DEQ_GPU void for_each_of(uint32_t set, float (&numbers)[E], const Function& f) {
  DEQ_ROLLED for (int i = 0; i < E; ++i, set >>= 1) {
    const float first = set & 1 ? f(numbers[0]) : numbers[0];
    DEQ_UNROLL for (int e = 0; e + 1 < E; ++e) numbers[e] = numbers[e + 1];
    numbers[E - 1] = first;
  }
}

// f at y: value(y), or with a mask d y. relu, which nearly everybody uses, is in line.
template <int E>
DEQ_GPU void evaluate(const Call& call, const float (&y)[E], const float (&d)[E], float (&f)[E]) {
  if (call.mask.data) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) f[e] = d[e] * y[e];
    return;
  }
  DEQ_UNROLL for (int e = 0; e < E; ++e) f[e] = y[e];
  if (call.activation == kRelu) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) f[e] = Relu<ScalarMath<float>>::value(f[e]);
    return;
  }
  for_each_of(~0u, f, [&](float y) {
    with_activation<ScalarMath<float>>(call.activation, [&](auto act) { y = decltype(act)::value(y); });
    return y;
  });
}

// act' of the elements of the set from the values that d holds.
template <int E>
DEQ_GPU void slopes_of(const Call& call, uint32_t set, float (&d)[E]) {
  if (call.activation == kRelu) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) if (set >> e & 1) d[e] = Relu<ScalarMath<float>>::of_value(d[e]);
    return;
  }
  for_each_of(set, d, [&](float y) { return derivative_of_value<ScalarMath<float>>(call.activation, y); });
}

// The largest magnitude of `width` numbers, number(k) each, by one warp; infinity if one of them is not finite.
template <class Gpu, class Number>
DEQ_GPU float reach_of(int64_t width, const Number& number) {
  float reach = 0;
  for (int64_t k = Gpu::thread() % kWarp; k < width; k += kWarp) {
    const float a = fabsf(number(k));
    reach = a <= reach ? reach : a;  // keeps a NaN: no comparison with it is true
    if (reach != reach) reach = INFINITY;
  }
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const float other = Gpu::shuffle_xor(reach, mask);
    reach = other > reach ? other : reach;
  }
  return reach;
}

template <class Gpu>
DEQ_GPU float reach_of(const float* row, int64_t stride, int64_t width) {
  return reach_of<Gpu>(width, [&](int64_t k) { return row[k * stride]; });
}

constexpr float kFar = static_cast<float>(1ull << 60);  // times that a start may be larger than what it leads to
constexpr float kMostScale = kFar * kFar * 64;          // 2^126
constexpr float kNear = 1 << 20;                        // that near 1 squares are in range as they are

// A power of two that takes `reach` near 1, or 1 if it is not far from there.
DEQ_HD float to_unit(float reach) {
  if (!(reach > 0) || (reach <= kNear && reach >= 1 / kNear)) return 1;
  const int exponent = -ilogbf(reach);
  return ldexpf(1, exponent > 126 ? 126 : exponent < -126 ? -126 : exponent);
}

// That scale, or a smaller one where it would take the injection out of range: the mask that ends it would make it NaN.
DEQ_HD float held_scale(float scale, float injection) {
  return injection * scale <= kLargest ? scale : ldexpf(1, 126 - ilogbf(injection));
}

// What is found out before a solve: a sample's note, and for one that is not solved its status, residual and output. By one warp.
template <class Gpu>
DEQ_GPU void prepare_sample(const Call& call, int64_t weight, int64_t sample) {
  const int lane = Gpu::thread() % kWarp;
  const int64_t index = weight * call.batch + sample;
  const float *c = row_of(call.injection, weight, sample), *start = row_of(call.start, weight, sample);
  const float reach[2] = {reach_of<Gpu>(c, call.injection.stride[2], call.width),
                          call.start.data ? reach_of<Gpu>(start, call.start.stride[2], call.width) : 0.0f};
  Note note{0, 1, 0};
  const float largest = reach[0] > reach[1] ? reach[0] : reach[1];
  if (call.mask.data || is_homogeneous(call.activation)) {
    // Linear in the injection up to a positive factor: a power of two changes no bit of the path. The scale is that of values:
    // where relu or a mask ends it, the injection may be of any size.
    const float* mask = row_of(call.mask, weight, sample);
    const float values = reach_of<Gpu>(call.width, [&](int64_t k) {
      const float x = c[k * call.injection.stride[2]];
      if (!call.mask.data) return call.activation == kRelu ? Relu<ScalarMath<float>>::value(x) : x;
      const float d = mask[k * call.mask.stride[2]];
      return x * (call.mask_is_value ? derivative_of_value<ScalarMath<float>>(call.activation, d) : d);
    });
    // Beside a start that is far larger the equilibrium itself must stay within the range of its increments.
    const float spare = values > 0 && reach[1] / kFar > values ? kFar : 1;
    const float unit = to_unit(values > reach[1] ? values : reach[1]),
                wanted = unit * spare < kMostScale ? unit * spare : kMostScale;
    note.scale = held_scale(wanted, reach[0]);
    // Squares of what comes of the injection may leave the range below, then and beside a start that is far larger.
    note.is_wide = note.scale != wanted || (values > 0 && reach[1] > kNear * values);
  } else if (largest > 0 && (largest > kNear || largest < 1 / kNear)) {
    note.is_wide = 1;
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

// The samples first, first + stride, ..., by one warp.
template <class Gpu>
DEQ_GPU void prepare_samples(const Call& call, int64_t weight, int64_t first, int64_t stride) {
  for (int64_t sample = first; sample < call.batch; sample += stride) prepare_sample<Gpu>(call, weight, sample);
}

}  // namespace deq
