// The rule that ends a sample, and Anderson's weights: host copies of what every backend uses.
#include <initializer_list>

#include "anderson.h"
#include "check.h"
#include "judge.h"

using deq::judge;
using deq::Record;
using deq::Rule;
using deq::Verdict;

namespace {

Rule rule(double tol, int64_t max_iter = 1000, int32_t criterion = DEQ_RESIDUAL, int64_t width = 10) {
  return deq::make_rule(tol, max_iter, criterion, width, true);
}

// Judges residuals q^k of a contraction around a point of size 1; returns evaluations until a verdict.
int64_t contraction(const Rule& r, double q, Verdict expected) {
  Record record = deq::new_record();
  double step = 1;
  for (;;) {
    const Verdict verdict = judge(r, record, step * step, 1.0, 1.0);
    if (verdict != Verdict::kContinue) {
      CHECK(verdict == expected);
      CHECK(verdict != Verdict::kConverged || record.residual() <= r.tol);
      return record.iteration;
    }
    step *= q;
  }
}

void converged() {
  CHECK(contraction(rule(1e-6), 0.5, Verdict::kConverged) == 23);                             // 2^-22 is the first below 1e-6^1.1
  CHECK(contraction(rule(1e-6), 0.9, Verdict::kConverged) == 133);                            // slow: leaves at tol itself
  CHECK(contraction(rule(1e-6, 1000, DEQ_ERROR_ESTIMATE), 0.99, Verdict::kMaxIter) == 1000);  // error is 99 steps
  Record zero = deq::new_record();
  CHECK(judge(rule(1e-6), zero, 0.0, 0.0, 0.0) == Verdict::kConverged);
  CHECK(zero.residual() == 0.0 && zero.iteration == 1);
}

void failures() {
  CHECK(contraction(rule(1e-6, 7), 0.5, Verdict::kMaxIter) == 7);
  CHECK(contraction(rule(1e-6), 1.0, Verdict::kStalled) == 1 + deq::kPatience);
  CHECK(contraction(rule(1e-6, 10000, DEQ_RESIDUAL, 500), 1.0, Verdict::kStalled) == 501);
  Record record = deq::new_record();
  CHECK(judge(rule(1e-6), record, 1.0, 1.0, 0.0) == Verdict::kContinue);
  CHECK(judge(rule(1e-6), record, 1e70, 1e70, 0.0) == Verdict::kDiverged);
  CHECK(judge(rule(1e-6), record, INFINITY, 1.0, 0.0) == Verdict::kDiverged);
  CHECK(judge(rule(1e-6), record, NAN, NAN, 0.0) == Verdict::kDiverged);
  CHECK(record.best_at == 1 && record.residual() == 1.0);
}

// progresses() must decide and change exactly as judge() wherever it says true.
void common_case_agrees() {
  int taken = 0;
  for (double q : {0.1, 0.5, 0.79, 0.81, 0.999, 1.5}) {
    const Rule r = rule(1e-8, 60);
    Record a = deq::new_record(), b = a;
    double step2 = 1;
    for (int k = 0; k < 80; ++k, step2 *= q * q) {
      const Verdict verdict = judge(r, a, step2, 1.0, 1.0);
      if (deq::progresses(r, b, step2, 1.0)) {
        ++taken;
        CHECK(verdict == Verdict::kContinue);
      } else {
        CHECK(judge(r, b, step2, 1.0, 1.0) == verdict);
      }
      CHECK(a.iteration == b.iteration && a.best_at == b.best_at && a.best_step2 == b.best_step2);
      CHECK(a.step2[0] == b.step2[0] && a.step2[1] == b.step2[1] && a.best_size2 == b.best_size2);
      if (verdict != Verdict::kContinue) break;
    }
  }
  CHECK(taken > 30);
}

void weights() {
  using deq::anderson_weights;
  using deq::kMaxDepth;
  double gram[kMaxDepth][kMaxDepth] = {{4.0, 0.0}, {0.0, 1.0}}, a[kMaxDepth];
  // Orthogonal residuals of norms 2 and 1: weights in the ratio 1 : 4.
  CHECK(anderson_weights(gram, 2, 1e-15, a) && fabs(a[0] - 0.2) < 1e-12 && fabs(a[1] - 0.8) < 1e-12);
  for (double scale : {1e-200, 1e-30, 1e30, 1e200}) {  // relative regularisation: the scale of the residuals is nothing
    double scaled[kMaxDepth][kMaxDepth] = {{4 * scale, 0.0}, {0.0, scale}}, b[kMaxDepth];
    CHECK(anderson_weights(scaled, 2, 1e-7, b) && fabs(b[0] - 0.2) < 1e-6);
  }
  double dead[kMaxDepth][kMaxDepth] = {{0.0, 0.0}, {0.0, 1.0}};
  CHECK(!anderson_weights(dead, 2, 1e-7, a));
  double parallel[kMaxDepth][kMaxDepth] = {{1.0, 1.0}, {1.0, 1.0}};
  CHECK(!anderson_weights(parallel, 2, 0.0, a));
  double same[kMaxDepth][kMaxDepth] = {{1.0, 1.0}, {1.0, 1.0}};
  CHECK(anderson_weights(same, 2, 1e-7, a) && fabs(a[0] - 0.5) < 1e-6);  // the regulariser shares them evenly
  double wild[kMaxDepth][kMaxDepth] = {{1.0, 1.0000001}, {1.0000001, 1.0000002000001}};
  CHECK(!anderson_weights(wild, 2, 0.0, a));
  double poisoned[kMaxDepth][kMaxDepth] = {{NAN, 0.0}, {0.0, 1.0}};
  CHECK(!anderson_weights(poisoned, 2, 1e-7, a));
}

}  // namespace

int main() {
  converged();
  failures();
  common_case_agrees();
  weights();
  return check_result();
}
