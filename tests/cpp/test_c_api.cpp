// The C interface (csrc/kernels.h) without torch and Python: solves, adjoints, strides, reports and refusals, on every
// instruction set of this machine.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels.h"

namespace {

constexpr int kIdentity = 0, kRelu = 1, kGelu = 4;

// Owns the memory of one problem. W is stored transposed, one injection serves all samples of a weight if `shared`, and
// output rows are three elements apart, so that every stride matters.
template <class T>
struct Case {
  int64_t S, B, m;
  std::vector<T> W, c, z, residual;
  std::vector<int32_t> iterations;
  std::vector<uint8_t> status;
  DeqReport report{-1, -1, -1, -1};
  DeqProblem p{};

  Case(int64_t S, int64_t B, int64_t m, bool shared = false) : S(S), B(B), m(m) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    W.resize(S * m * m), c.resize(S * (shared ? 1 : B) * m), z.assign(S * B * (m + 3), T(-77));
    for (T& w : W) w = static_cast<T>(0.35 * normal(random) / std::sqrt(static_cast<double>(m)));
    for (T& x : c) x = static_cast<T>(normal(random));
    residual.resize(S * B), iterations.resize(S * B), status.assign(S * B, 99);
    p.weights = S, p.batch = B, p.width = m;
    p.type = sizeof(T) == 8 ? DEQ_FLOAT64 : DEQ_FLOAT32;
    p.activation = kRelu;
    p.W = {W.data(), {m * m, 1, m}};
    p.injection = {c.data(), {shared ? m : B * m, shared ? 0 : m, 1}};
    p.out = {z.data(), {B * (m + 3), m + 3, 1}};
    p.iterations = iterations.data(), p.residual = residual.data(), p.status = status.data(), p.report = &report;
    p.acceleration = DEQ_PLAIN, p.depth = 5, p.criterion = DEQ_RESIDUAL;
    p.max_iter = 500, p.tol = sizeof(T) == 8 ? 1e-10 : 1e-5, p.threads = 2;
  }

  T weight(int64_t s, int64_t i, int64_t j) const { return W[s * m * m + i + j * m]; }
  T injection(int64_t s, int64_t b, int64_t i) const { return c[s * p.injection.stride[0] + b * p.injection.stride[1] + i]; }
  T* row(int64_t s, int64_t b) { return z.data() + s * B * (m + 3) + b * (m + 3); }

  // ||f(z) - z|| / ||f(z)|| of one sample in double, with f(z) = relu(W z + c).
  double residual_of(int64_t s, int64_t b) {
    double step = 0, size = 0;
    for (int64_t i = 0; i < m; ++i) {
      double f = injection(s, b, i);
      for (int64_t j = 0; j < m; ++j) f += static_cast<double>(weight(s, i, j)) * row(s, b)[j];
      f = std::max(f, 0.0);
      step += (f - row(s, b)[i]) * (f - row(s, b)[i]), size += f * f;
    }
    return size > 0 ? std::sqrt(step / size) : std::sqrt(step);
  }
};

template <class T>
void solves(int64_t S, int64_t B, int64_t m, bool shared, int acceleration) {
  Case<T> k(S, B, m, shared);
  k.p.acceleration = acceleration;
  CHECK(deq_cpu_solve(&k.p) == DEQ_OK);
  CHECK(k.report.failed == 0 && k.report.bad_weight == 0 && k.report.bad_injection == 0 && k.report.bad_start == 0);
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t b = 0; b < B; ++b) {
      CHECK(k.status[s * B + b] == DEQ_CONVERGED);
      CHECK(k.iterations[s * B + b] >= 1 && k.iterations[s * B + b] <= k.p.max_iter);
      CHECK(k.residual[s * B + b] <= k.p.tol);
      CHECK(k.residual_of(s, b) <= k.p.tol);                                // z is one evaluation better than the point judged
      for (int64_t i = m; i < m + 3; ++i) CHECK(k.row(s, b)[i] == T(-77));  // nothing written between rows
    }
  }
}

// u = d * (A u + g) with d = relu'(W z + c) taken from z itself must agree with the same mask given as a derivative.
template <class T>
void masks_agree(int64_t m) {
  Case<T> forward(1, 4, m), value(1, 4, m), derivative(1, 4, m);
  CHECK(deq_cpu_solve(&forward.p) == DEQ_OK);
  std::vector<T> d(4 * m);
  DeqProblem p = forward.p;
  p.start = forward.p.out, p.out = {d.data(), {4 * m, m, 1}};
  CHECK(deq_cpu_derivative(&p) == DEQ_OK);
  value.p.mask = forward.p.out, value.p.mask_is_value = 1;
  derivative.p.mask = {d.data(), {4 * m, m, 1}};
  CHECK(deq_cpu_solve(&value.p) == DEQ_OK);
  CHECK(deq_cpu_solve(&derivative.p) == DEQ_OK);
  CHECK(value.z == derivative.z);
  for (int64_t b = 0; b < 4; ++b)
    for (int64_t i = 0; i < m; ++i) CHECK(d[b * m + i] == (forward.row(0, b)[i] > 0 ? T(1) : T(0)));
}

void reports() {
  Case<float> late(2, 3, 17);
  late.p.max_iter = 2;
  CHECK(deq_cpu_solve(&late.p) == DEQ_OK);
  CHECK(late.report.failed == 6);
  for (uint8_t status : late.status) CHECK(status == DEQ_MAX_ITER);

  Case<float> weight(2, 3, 17);
  weight.W[17 * 17 + 5] = std::numeric_limits<float>::quiet_NaN();  // stored transposed: row 5, column 0 of matrix 1
  CHECK(deq_cpu_solve(&weight.p) == DEQ_OK);
  CHECK(weight.report.bad_weight == 1 + 17 * 17 + 5 * 17);

  Case<float> injection(2, 3, 17);
  injection.c[4 * 17 + 2] = std::numeric_limits<float>::infinity();
  CHECK(deq_cpu_solve(&injection.p) == DEQ_OK);
  CHECK(injection.report.bad_injection == 1 + 4);
}

// A sweep whose second stage overflows: its third leaves NaN in all of its columns, and in those behind the last, which the
// products of the anchor after it must leave out. That is no product of W, and read behind its end.
void overflows() {
  constexpr int64_t m = 97, first = 32, second = 64;  // where the stages start
  if (!deq_cpu_has_precision(DEQ_BFLOAT16_INCREMENTS)) return;
  Case<float> k(1, 1, m);
  std::fill(k.W.begin(), k.W.end(), 0.0f);
  std::fill(k.c.begin(), k.c.end(), 0.0f);
  k.W[0] = k.W[first] = 0x1p45f;  // stored transposed: column 0
  k.c[0] = 1;
  k.p.precision = DEQ_BFLOAT16_INCREMENTS;
  CHECK(deq_cpu_solve(&k.p) == DEQ_OK);
  CHECK(k.status[0] == DEQ_DIVERGED);
  for (int64_t i = 0; i < m; ++i) CHECK(std::isfinite(k.row(0, 0)[i]));
  DeqWork work;
  deq_cpu_last_work(&work);
  CHECK(work.native_rows == 1 && work.native_products == (2 + m - second) * m);
}

void refusals() {
  CHECK(deq_cpu_solve(nullptr) == DEQ_BAD_ARGUMENT);
  CHECK(deq_cpu_derivative(nullptr) == DEQ_BAD_ARGUMENT);
  auto refused = [](auto change) {
    Case<float> k(1, 2, 3);
    change(k.p);
    return deq_cpu_solve(&k.p) == DEQ_BAD_ARGUMENT;
  };
  CHECK(refused([](DeqProblem& p) { p.width = 0; }));
  CHECK(refused([](DeqProblem& p) { p.batch = -1; }));
  CHECK(refused([](DeqProblem& p) { p.type = 4; }));
  CHECK(refused([](DeqProblem& p) { p.activation = 99; }));
  CHECK(refused([](DeqProblem& p) { p.activation = -1; }));
  CHECK(refused([](DeqProblem& p) { p.max_iter = 0; }));
  CHECK(refused([](DeqProblem& p) { p.report = nullptr; }));
  CHECK(refused([](DeqProblem& p) { p.mask = p.injection, p.mask_is_value = 1, p.activation = kGelu; }));
  CHECK(!refused([](DeqProblem& p) { p.activation = kIdentity; }));
  auto refused_derivative = [](auto change) {
    Case<float> k(1, 2, 3), z(1, 2, 3);
    k.p.start = z.p.out;
    change(k.p);
    return deq_cpu_derivative(&k.p) == DEQ_BAD_ARGUMENT;
  };
  CHECK(refused_derivative([](DeqProblem& p) { p.width = 0; }));
  CHECK(refused_derivative([](DeqProblem& p) { p.batch = -1; }));
  CHECK(refused_derivative([](DeqProblem& p) { p.type = 4; }));
  CHECK(refused_derivative([](DeqProblem& p) { p.activation = 99; }));
  CHECK(!refused_derivative([](DeqProblem& p) { p.report = nullptr, p.max_iter = 0; }));  // which it does not use
  CHECK(deq_cpu_set_isa("sse9") == DEQ_BAD_ARGUMENT);
}

void cache() {
  deq_cpu_clear_cache();
  CHECK(deq_cpu_cache_bytes() == 0);
  Case<float> k(1, 2, 33);
  CHECK(deq_cpu_solve(&k.p) == DEQ_OK);
  const int64_t held = deq_cpu_cache_bytes();
  CHECK(held >= 33 * 33 * 4);
  CHECK(deq_cpu_clear_cache() == held);
  CHECK(deq_cpu_cache_bytes() == 0);
}

}  // namespace

int main() {
  refusals();
  int tables = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (deq_cpu_set_isa(isa) != DEQ_OK) {
      std::printf("%s: not in this CPU or build\n", isa);
      continue;
    }
    ++tables;
    CHECK(std::strcmp(deq_cpu_isa(), isa) == 0);
    for (int64_t m : {1, 17, 64})
      for (int64_t B : {1, 5, 70})
        for (int acceleration : {DEQ_PLAIN, DEQ_ANDERSON}) {
          solves<float>(2, B, m, false, acceleration);
          solves<double>(1, B, m, true, acceleration);
        }
    masks_agree<float>(33);
    masks_agree<double>(33);
    reports();
    overflows();
    cache();
    CHECK(deq_cpu_peak_gflops(DEQ_FLOAT32, 0.01) > 0.1);
    CHECK(deq_cpu_kernel_gflops(DEQ_FLOAT64, 8, 64, 0.01) > 0.01);
  }
  CHECK(tables >= 1);
  CHECK(deq_cpu_set_isa("auto") == DEQ_OK);
  return check_result();
}
