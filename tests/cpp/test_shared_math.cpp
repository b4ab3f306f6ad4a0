// What host and device share, compiled by the C++ compiler and by nvcc's host pass (test_shared_math.cu).
#include <cmath>
#include <set>
#include <vector>

#include "check.h"
#include "cuda/fragments.h"
#include "reliable.h"
#include "scalar_math.h"
#include "scalar_root.h"

using namespace deq;

namespace {

template <class T>
void derivatives() {
  for (int32_t activation = 0; activation < kActivations; ++activation)
    for (double at : {-9.0, -1.3, -0.2, 0.4, 2.1, 8.0}) {
      const double h = 1e-5;
      double value[3], slope = 0;
      with_activation<ScalarMath<double>>(activation, [&](auto a) {
        using A = decltype(a);
        value[0] = A::value(at - h), value[1] = A::value(at), value[2] = A::value(at + h);
        slope = A::derivative(at);
      });
      CHECK(std::fabs(slope - (value[2] - value[0]) / (2 * h)) < 1e-9);
      T narrow = 0, narrow_slope = 0;
      with_activation<ScalarMath<T>>(activation, [&](auto a) {
        narrow = decltype(a)::value(static_cast<T>(at));
        narrow_slope = decltype(a)::derivative(static_cast<T>(at));
      });
      const double eps = sizeof(T) == 8 ? 2e-16 : 1.2e-7;
      CHECK(std::fabs(narrow - value[1]) <= 16 * eps * (1e-3 + std::fabs(value[1])));
      CHECK(std::fabs(narrow_slope - slope) <= 64 * eps);
      if (has_of_value(activation)) {
        const double error = std::fabs(derivative_of_value<ScalarMath<T>>(activation, narrow) - slope);
        CHECK(error <= 64 * eps);
      }
    }
}

// z and the condition of z in z = act(d z + x), by bisection in p = 1e-100 sinh(t): every size of p is near.
template <class A>
std::pair<double, double> exact_root(double d, double x) {
  double low = -400, high = 400, p = 0;
  for (int i = 0; i < 80; ++i) {
    const double t = (low + high) / 2;
    p = std::sinh(t) * 1e-100;
    (p - d * A::value(p) - x > 0 ? high : low) = t;
  }
  const double z = A::value(p), slope = A::derivative(p);
  return {z, slope * (std::fabs(d * z) + std::fabs(x)) / std::fabs(1 - d * slope)};
}

// Every size of d and x: off by the rounding that z, d and x themselves carry.
void roots() {
  std::vector<double> sizes;
  for (int k = -100; k <= 100; k += 10) sizes.push_back(std::ldexp(1.0, k)), sizes.push_back(-std::ldexp(1.0, k));
  for (int32_t activation = 0; activation < kActivations; ++activation)
    for (double d : sizes) {
      if (least_slope(activation, d) <= 0) continue;
      const ScalarEquation equation = scalar_equation(activation, static_cast<float>(d));
      for (double x : sizes) {
        std::pair<double, double> exact;
        with_activation<ScalarMath<double>>(activation, [&](auto a) { exact = exact_root<decltype(a)>(d, x); });
        const float given[2] = {static_cast<float>(x), 0.5f};
        float z[2];
        with_activation<ScalarMath<float>>(activation, [&](auto a) { scalar_roots<decltype(a), 2>(equation, given, z); });
        const double allowed = 4 * (1.1920929e-07 * (std::fabs(exact.first) + exact.second) + 1.1754944e-38);
        if (!CHECK(std::fabs(z[0] - exact.first) <= allowed))
          std::printf("activation %d, d %g, x %g: %g for %g\n", activation, d, x, z[0], exact.first);
      }
    }
}

// Every element of a tile has one lane and word, and products find their factors.
void fragments() {
  std::set<int> outputs, weights, increments;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int q = 0; q < 4; ++q) {
      outputs.insert(output_row(lane, q) * kTileSamples + output_sample(lane, q));
      for (int half = 0; half < 2; ++half) weights.insert(weight_row(lane, q) * kTileDepth + weight_column(lane, q) + half);
    }
  for (int k = 0; k < kTileDepth; ++k)
    for (int sample = 0; sample < kTileSamples; ++sample) increments.insert(increment_place(k, sample));
  CHECK(outputs.size() == kTileRows * kTileSamples && *outputs.rbegin() == kTileRows * kTileSamples - 1);
  CHECK(weights.size() == kTileRows * kTileDepth && *weights.rbegin() == kTileRows * kTileDepth - 1);
  CHECK(increments.size() == kTileDepth * kTileSamples && *increments.rbegin() == kTileDepth * kTileSamples - 1);
  CHECK(tiles_of(1) == 1 && tiles_of(16) == 1 && tiles_of(17) == 2);
}

// A contraction by q whose steps leave `pollution` of what they moved in y: evaluations and anchors until it has converged.
int64_t contraction(double q, double pollution, int* anchors) {
  const Reliable call{make_rule(1e-5, 1000, DEQ_RESIDUAL, 10, false), 2e-3, INFINITY, false};
  Progress s = new_progress();
  double step = 1, error = 0;
  bool is_exact = true;
  *anchors = 0;
  for (;;) {
    if (is_exact) {
      ++*anchors;
      step = std::fmax(step, error), error = 0;
      bool is_best;
      const Verdict verdict = judge_anchor(call, s, step * step, 1.0, 0.0, &is_best);
      if (verdict != Verdict::kContinue) {
        CHECK(verdict == Verdict::kConverged && s.record.residual() <= 1e-5);
        return s.record.iteration;
      }
      is_exact = anchors_again(call, s);
    } else {
      is_exact = after_step(call, s, step * step, 1.0) != Next::kStep;
    }
    error += pollution * step;
    step *= q;
  }
}

void reliable_updates() {
  int anchors;
  const int64_t clean = contraction(0.5, 0, &anchors);
  CHECK(clean >= 17 && clean <= 21 && anchors <= 4);
  const int64_t polluted = contraction(0.5, 1e-3, &anchors);
  CHECK(polluted >= clean && polluted <= clean + 8 && anchors >= 3 && anchors <= 6);
  CHECK(contraction(0.9, 1e-3, &anchors) < 160);
}

// The last evaluation of a sample at r = 3e-6, expected at 1e-6, six steps after an anchor.
void proven_steps() {
  Reliable call{make_rule(1e-5, 100, DEQ_RESIDUAL, 10, false), 1e-2, 1.0 / 256, false};
  Progress s = new_progress();
  s.ratio2[0] = s.ratio2[1] = 1.0 / 9;
  s.run = 6;
  s.record.iteration = 9;
  const double step2 = 9e-12, rounding = 7 * call.rule.eps;
  CHECK(may_be_proven(call, s, step2, 1.0, 0.99 * (9e-6 - rounding)));
  CHECK(!may_be_proven(call, s, step2, 1.0, 1.01 * (9e-6 - rounding)));
  CHECK(is_proven(call, s, step2, 1.0, 0.99 * (7e-6 - rounding)) && !is_proven(call, s, step2, 1.0, 1.01 * (7e-6 - rounding)));
  CHECK(may_be_proven(call, s, 1e12 * step2, 1e12, 1e6 * 8e-6));
  CHECK(!may_be_proven(call, s, step2, 1.0, NAN) && !may_be_proven(call, s, step2, 1.0, INFINITY));
  CHECK(!may_be_proven(call, s, 1e4 * step2, 1.0, 0.0));  // no anchor would pass
  Progress other = s;
  other.sweeps = true;  // x and y are not of one point
  CHECK(!may_be_proven(call, other, step2, 1.0, 0.0));
  other = s;
  other.record.iteration = 99;
  CHECK(!may_be_proven(call, other, step2, 1.0, 0.0));
  call.rule.criterion = DEQ_ERROR_ESTIMATE;
  CHECK(!may_be_proven(call, s, step2, 1.0, 0.0));
  call.rule = make_rule(5e-7, 100, DEQ_RESIDUAL, 10, false);  // rounding alone may exceed it
  CHECK(!is_proven(call, s, 0.0, 1.0, 0.0));
}

}  // namespace

int main() {
  derivatives<float>();
  derivatives<double>();
  roots();
  fragments();
  reliable_updates();
  proven_steps();
  return check_result();
}
