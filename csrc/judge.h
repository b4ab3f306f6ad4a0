// When is a sample done? The rule of deq/reference.py (iterate), once for host and device.
#pragma once
#include <math.h>
#include <stdint.h>

#include "activations.h"
#include "kernels.h"

namespace deq {

constexpr int64_t kSlowAfter = 12;
constexpr double kSlowContraction = 0.8;
// A sample leaves at tol^1.1, or at tol where it contracts slowly. A batch that stops together takes every sample past tol, most
// of them far: leaving at tol itself would make the worst error up to 3.2 x that of such a loop (m = 64, B = 256, 12 seeds;
// median 2.0 at m = 333, B = 7), and leaving at tol / 3 the error of dW, a sum over samples, up to 4.1 x (float64, 16 seeds).
// How far grows with the iterations, hence the power. With it the worst sample stays below 1.2 x, dW at a median of 1.3 x; the
// price is one evaluation in ten.
constexpr double kMarginPower = 0.1;
constexpr int64_t kPatience = 128, kPatienceAtFloor = 32;
constexpr double kFloorEps = 1000.0;

// What is common to all samples of a call.
struct Rule {
  double tol, tol2;  // tol, and its square
  double leave2;     // square of the residual at which a sample leaves
  double eps;        // machine epsilon of the precision computed in
  int64_t max_iter;
  int64_t patience;
  int32_t criterion;
};

DEQ_HD Rule make_rule(double tol, int64_t max_iter, int32_t criterion, int64_t width, bool is_double) {
  const double leave = tol < 1 ? pow(tol, 1 + kMarginPower) : tol;
  Rule rule{tol,      tol * tol, leave * leave, is_double ? 2.220446049250313e-16 : 1.1920928955078125e-07,
            max_iter, kPatience, criterion};
  if (width > rule.patience) rule.patience = width;
  return rule;
}

// One sample's history, in squared norms: the common path of the test has no division and no square root.
struct Record {
  double step2[2];                // |f(y) - y|^2 of the last two evaluations
  double best_step2, best_size2;  // |f(y) - y|^2 and |f(y)|^2 at the smallest residual so far
  double limit2;                  // |f(y)|^2 above which nothing of the injection is left
  int64_t iteration, best_at;

  DEQ_HD double residual() const { return best_step2 > 0 ? sqrt(best_step2 / best_size2) : 0.0; }
};

enum class Verdict : uint8_t {
  kConverged = DEQ_CONVERGED,
  kMaxIter = DEQ_MAX_ITER,
  kStalled = DEQ_STALLED,
  kDiverged = DEQ_DIVERGED,
  kContinue = 255,
};

DEQ_HD Record new_record() { return Record{{INFINITY, INFINITY}, INFINITY, 1.0, INFINITY, 0, 0}; }

DEQ_HD bool is_slow_step(double step2, double previous2) { return step2 > kSlowContraction * kSlowContraction * previous2; }

// Judges the evaluation of f at y from |f(y) - y|^2, |f(y)|^2 and, at the first one, |y|^2.
DEQ_HD Verdict judge(const Rule& rule, Record& s, double step2, double size2, double start2) {
  ++s.iteration;
  if (!(step2 < INFINITY) || !(size2 < INFINITY)) return Verdict::kDiverged;
  if (s.iteration == 1) s.limit2 = (size2 > start2 ? size2 : start2) / (rule.eps * rule.eps * rule.eps * rule.eps);
  const double previous2 = s.step2[0], before2 = s.step2[1];
  s.step2[1] = previous2;
  s.step2[0] = step2;
  bool done = step2 <= rule.tol2 * size2 &&
              (step2 <= rule.leave2 * size2 || is_slow_step(step2, previous2) || s.iteration >= rule.max_iter);
  if (rule.criterion == DEQ_ERROR_ESTIMATE && step2 > 0) {
    double q2 = s.iteration > 2 ? step2 / previous2 : INFINITY;
    if (s.iteration > 2 && previous2 / before2 > q2) q2 = previous2 / before2;
    const double q = sqrt(q2);
    done = q < 1 && sqrt(step2 / size2) * q <= rule.tol * (1 - q);
  }
  if (done || !(step2 * s.best_size2 >= s.best_step2 * size2)) {  // the first is the best so far, even where f(y) = 0
    s.best_step2 = step2;
    s.best_size2 = size2;
    s.best_at = s.iteration;
  }
  if (done) return Verdict::kConverged;
  if (size2 > s.limit2) return Verdict::kDiverged;
  const int64_t waited = s.iteration - s.best_at;
  if (waited >= kPatienceAtFloor) {
    const bool at_floor = s.best_step2 <= kFloorEps * rule.eps * kFloorEps * rule.eps * s.best_size2;
    if (at_floor || waited >= rule.patience) return Verdict::kStalled;
  }
  return s.iteration >= rule.max_iter ? Verdict::kMaxIter : Verdict::kContinue;
}

// The common case of judge(): closer than ever, at speed, and not yet there. Otherwise false, and nothing has changed.
DEQ_HD bool progresses(const Rule& rule, Record& s, double step2, double size2) {
  const bool common = rule.criterion == DEQ_RESIDUAL && s.iteration > 0 && s.iteration + 1 < rule.max_iter &&
                      step2 > rule.tol2 * size2 && size2 <= s.limit2 && !is_slow_step(step2, s.step2[0]) &&
                      step2 * s.best_size2 < s.best_step2 * size2;
  if (!common) return false;
  s.best_at = ++s.iteration;
  s.step2[1] = s.step2[0];
  s.best_step2 = s.step2[0] = step2;
  s.best_size2 = size2;
  return true;
}

// Has the sample been contracting slowly for two evaluations?
DEQ_HD bool is_slow(const Record& s, double before2) {
  return s.iteration >= kSlowAfter && is_slow_step(s.step2[0], s.step2[1]) && is_slow_step(s.step2[1], before2);
}

}  // namespace deq
