// When is a sample done? The rule of deq/reference.py (iterate), once for host and device.
#pragma once
#include <math.h>
#include <stdint.h>

#include "activations.h"
#include "kernels.h"

namespace deq {

constexpr int64_t kSlowAfter = 12;
constexpr double kSlowContraction = 0.8;
constexpr int64_t kPatience = 128, kPatienceAtFloor = 32;
constexpr double kFloorEps = 1000.0;

// What is common to all samples of a call.
struct Rule {
  double tol2;       // tol squared
  double tol;
  double eps;        // machine epsilon of the precision computed in
  int64_t max_iter;
  int64_t patience;
  int32_t criterion;
};

DEQ_HD Rule make_rule(double tol, int64_t max_iter, int32_t criterion, int64_t width, bool is_double) {
  Rule rule{tol * tol, tol, is_double ? 2.220446049250313e-16 : 1.1920928955078125e-07, max_iter, kPatience, criterion};
  if (width > rule.patience) rule.patience = width;
  return rule;
}

// One sample's history, in squared norms: the test on the way costs one division and no square root.
struct Record {
  double step2[2];   // |f(y) - y|^2 of the last two evaluations
  double best;       // smallest (|f(y) - y| / |f(y)|)^2 so far
  double limit2;     // |f(y)|^2 above which nothing of the injection is left
  int64_t iteration, best_at;
};

enum class Verdict : uint8_t {
  kConverged = DEQ_CONVERGED,
  kMaxIter = DEQ_MAX_ITER,
  kStalled = DEQ_STALLED,
  kDiverged = DEQ_DIVERGED,
  kContinue = 255,
};

DEQ_HD Record new_record() { return Record{{INFINITY, INFINITY}, INFINITY, INFINITY, 0, 0}; }

// Judges the evaluation of f at y from |f(y) - y|^2, |f(y)|^2 and, at the first one, |y|^2.
DEQ_HD Verdict judge(const Rule& rule, Record& s, double step2, double size2, double start2) {
  ++s.iteration;
  if (!(step2 < INFINITY) || !(size2 < INFINITY)) return Verdict::kDiverged;
  if (s.iteration == 1) s.limit2 = (size2 > start2 ? size2 : start2) / (rule.eps * rule.eps * rule.eps * rule.eps);
  const double r2 = step2 > 0 ? step2 / size2 : 0.0;
  const double previous2 = s.step2[0], before2 = s.step2[1];
  s.step2[1] = previous2;
  s.step2[0] = step2;
  if (r2 < s.best) {
    s.best = r2;
    s.best_at = s.iteration;
  }
  bool done = r2 <= rule.tol2;
  if (rule.criterion == DEQ_ERROR_ESTIMATE && r2 > 0) {
    double q2 = s.iteration > 2 ? step2 / previous2 : INFINITY;
    if (s.iteration > 2 && previous2 / before2 > q2) q2 = previous2 / before2;
    const double q = sqrt(q2);
    done = q < 1 && sqrt(r2) * q <= rule.tol * (1 - q);
  }
  if (done) {
    s.best = r2;
    s.best_at = s.iteration;
    return Verdict::kConverged;
  }
  if (size2 > s.limit2) return Verdict::kDiverged;
  const int64_t patience = s.best <= kFloorEps * rule.eps * kFloorEps * rule.eps ? kPatienceAtFloor : rule.patience;
  if (s.iteration - s.best_at >= patience) return Verdict::kStalled;
  return s.iteration >= rule.max_iter ? Verdict::kMaxIter : Verdict::kContinue;
}

// Has the sample been contracting slowly for two evaluations?
DEQ_HD bool is_slow(const Record& s, double before2) {
  constexpr double kSlow2 = kSlowContraction * kSlowContraction;
  return s.iteration >= kSlowAfter && s.step2[0] > kSlow2 * s.step2[1] && s.step2[1] > kSlow2 * before2;
}

}  // namespace deq
