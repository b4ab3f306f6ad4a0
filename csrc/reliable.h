// When to trust low precision: the decisions of delta iterations with reliable updates, one sample at a time, for host and
// device.
//
// A sample keeps y = W x + c, where x is what its rounded increments have added up to, and a step adds W_low Q(f(y) - x) to y.
// What the rounding of W leaves in y is proportional to the increments. An exact evaluation of y (an anchor) removes it, and
// only anchors are judged, and steps whose y a bound shows to be as good (is_proven). Every decision follows from the sample's
// own norms, so that its answer does not depend on its batch mates.
#pragma once
#include <math.h>

#include "judge.h"

namespace deq {

// An anchor is expected to pass if the residual to come is this share of the one to leave at.
constexpr double kSafety = 0.85;
// Steps, or sweeps, to come for which a sample is handed over: what accelerated float32 evaluations on the Cayley map cost
// instead. With 70 sweeps a trained W at 128 x 256 takes 1.5 times as long as with 80, with 100 an outlier at 0.95, 256 x
// 256, 1.1 times; one slow mode of 0.985 in a Gaussian W, 150 x 24, half as long with 80 as with 70, but 150 x 256 1.35 times.
constexpr double kMostSteps = 100, kMostSweeps = 80;
// The contraction from which sweeps gain more than they cost. Zen 4, forward: a Gaussian W that contracts by 0.4 is 10 % slower
// with sweeps from the start, spectral radius 1 1.24 x as fast at 256 x 256, trained ones 1.02 to 1.6 x at 128 x 256.
constexpr double kSweepFrom = 0.5;
constexpr int kMaxRun = 64;  // steps before an anchor is due in any case

enum class Next : uint8_t { kStep, kCorrectedStep, kAnchor };

// What is common to all samples of a call.
struct Reliable {
  Rule rule;
  double pollution;  // share of the increments that rounding W leaves in y: smaller increments than that gain nothing
  double rest;       // share of the pollution that a correction leaves; infinity where there are no corrections
  bool hands_over;   // the caller has better means for slow samples
};

// One sample between its anchors.
struct Progress {
  Record record;
  double norm;       // |f(x) - x| at the evaluation before
  double ratio2[2];  // of step2, over the last two evaluations
  double size;       // of the increments since the last anchor or correction, the sum of their norms
  double corrected;  // the same since the last anchor, up to the last correction
  int32_t run;       // steps since the last anchor
  bool native;       // gains nothing from steps: anchors only
  bool is_slow;      // contracts slowly or grows
  bool sweeps;       // its steps are sweeps from the next one on; the first after an anchor starts with nothing to multiply
};

DEQ_HD Progress new_progress() { return Progress{new_record(), INFINITY, {1, 1}, 0, 0, 0, false, false, false}; }

DEQ_HD double lesser(double a, double b) { return b < a ? b : a; }
DEQ_HD double greater(double a, double b) { return a < b ? b : a; }

// Judges an anchor; the norms are those of judge(). `is_best`: no earlier anchor had a smaller residual.
// kMaySweep: the caller has Gauss-Seidel sweeps for samples that contract slowly.
template <bool kMaySweep = false>
DEQ_HD Verdict judge_anchor(const Reliable& call, Progress& s, double step2, double size2, double start2, bool* is_best) {
  if (s.run > 0) {
    // The contraction is what the steps showed; against them the residual of an anchor holds what they had left in y.
    // Slow is what was slow twice, and an estimated error is that of the slower.
    s.record.step2[0] = step2 / lesser(s.ratio2[0], s.ratio2[1]);
    s.record.step2[1] = s.record.step2[0] / greater(s.ratio2[0], s.ratio2[1]);
  }
  Verdict verdict = judge(call.rule, s.record, step2, size2, start2);
  *is_best = s.record.best_at == s.record.iteration;
  s.native = s.native || (!*is_best && s.run > 0);
  if (verdict == Verdict::kContinue && call.hands_over && (s.native || s.is_slow)) verdict = Verdict::kMaxIter;
  if (verdict != Verdict::kContinue) return verdict;
  if (!*is_best && s.run > 0) s.record.best_at = s.record.iteration;  // what steps did not gain is not the sample's failure
  s.run = 0;
  s.norm = sqrt(step2);
  s.size = kMaySweep && s.sweeps ? 0 : s.norm;
  s.corrected = 0;
  return verdict;
}

// Whether the evaluation after an anchor that goes on is another one.
DEQ_HD bool anchors_again(const Reliable& call, const Progress& s) {
  return s.native || s.record.iteration + 1 >= call.rule.max_iter;
}

// Square of the residual at which a sample whose last contractions are known leaves.
DEQ_HD double leaves_at(const Reliable& call, const Progress& s) {
  const double q2 = lesser(s.ratio2[0], s.ratio2[1]);
  if (call.rule.criterion != DEQ_ERROR_ESTIMATE)
    return q2 > kSlowContraction * kSlowContraction ? call.rule.tol2 : call.rule.leave2;
  const double q = sqrt(greater(s.ratio2[0], s.ratio2[1])), r = q < 1 ? call.rule.tol * (1 - q) / q : 0;
  return r * r;
}

// Of the evaluation to come.
DEQ_HD double expected_step2(const Progress& s, double step2) { return step2 * lesser(s.ratio2[0], 1.0); }

DEQ_HD Next next_of(const Reliable& call, const Progress& s, double step2, double size2) {
  if (!(step2 < INFINITY) || !(size2 <= s.record.limit2)) return Next::kAnchor;
  if (s.run >= kMaxRun || s.record.iteration + 1 >= call.rule.max_iter) return Next::kAnchor;
  const double leave2 = leaves_at(call, s);
  if (expected_step2(s, step2) <= kSafety * kSafety * leave2 * size2) return Next::kAnchor;
  if (step2 > call.pollution * call.pollution * s.size * s.size) return Next::kStep;
  const double rest = call.pollution * call.rest * (s.corrected + s.size);
  return rest * rest <= leave2 * size2 ? Next::kCorrectedStep : Next::kAnchor;
}

// Whether a residual is within the tolerance whatever there is in y besides W x + c: `left_out` bounds the norm of what rounding
// left out of the products of the increments since the last anchor; a step rounds y and x once more each.
DEQ_HD bool is_proven(const Reliable& call, const Progress& s, double step2, double size2, double left_out) {
  return sqrt(step2) + left_out <= (call.rule.tol - (s.run + 1) * call.rule.eps) * sqrt(size2);
}

// Whether the anchor that is due may be a corrected step instead, because it is expected to leave no doubt.
DEQ_HD bool may_be_proven(const Reliable& call, const Progress& s, double step2, double size2, double left_out) {
  const double expected2 = expected_step2(s, step2);
  return call.rule.criterion == DEQ_RESIDUAL && !s.sweeps && s.record.iteration + 1 < call.rule.max_iter &&
         expected2 <= kSafety * kSafety * leaves_at(call, s) * size2 && is_proven(call, s, expected2, size2, left_out);
}

// Growing, or so slow that another means is cheaper than the steps to come.
template <bool kMaySweep>
DEQ_HD bool is_hopeless(const Reliable& call, const Progress& s, double step2, double size2) {
  const double least2 = lesser(s.ratio2[0], s.ratio2[1]);
  if (least2 >= 1) return s.run > 2;
  if (s.record.iteration < kSlowAfter || least2 <= kSlowContraction * kSlowContraction) return false;
  return log(call.rule.tol2 * size2 / step2) < (kMaySweep && s.sweeps ? kMostSweeps : kMostSteps) * log(least2);
}

// After a step: what the next evaluation is.
template <bool kMaySweep = false>
DEQ_HD Next after_step(const Reliable& call, Progress& s, double step2, double size2) {
  ++s.record.iteration;
  ++s.run;
  const double norm = sqrt(step2), ratio = greater(norm / s.norm, 1e-6);
  if (s.run > 1 || !kMaySweep || !s.sweeps) {  // else both norms are of a step from the same x
    s.ratio2[1] = s.ratio2[0];
    s.ratio2[0] = ratio * ratio;
  }
  s.norm = norm;
  s.size += norm;
  if (kMaySweep) s.sweeps = s.sweeps || lesser(s.ratio2[0], s.ratio2[1]) > kSweepFrom * kSweepFrom;
  s.is_slow = call.hands_over && is_hopeless<kMaySweep>(call, s, step2, size2);
  const Next next = s.is_slow ? Next::kAnchor : next_of(call, s, step2, size2);
  if (next == Next::kCorrectedStep) {
    s.corrected += s.size;
    s.size = norm;
  }
  return next;
}

}  // namespace deq
