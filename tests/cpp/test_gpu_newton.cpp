// The GPU's Newton rescue, run on the host by every thread (emulator.h): systems, samples that no iteration solves, and what it
// must leave alone.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/newton.h"
#include "emulator.h"

using namespace deq;

namespace {

void systems() {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (int64_t m : {1, 2, 15, 16, 17, 33, 50})
    for (bool needs_pivots : {false, true}) {
      const int64_t stride = jacobian_stride(m);
      std::vector<double> A(m * stride, NAN), b(m), x(m), a(m * m);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j) {
          a[i * m + j] = normal(random) + (i == j && !needs_pivots ? 2.0 * m : 0.0);
          if (needs_pivots && m > 1 && i == j && i % 3 == 0) a[i * m + j] = 0;
          A[i * stride + j] = a[i * m + j];
        }
      for (double& value : b) value = normal(random);
      x = b;
      bool solved = false;
      LuExchange exchange;
      Emulator::launch(1, 1, 64, 0, 5, [&](char*) {
        Lu<Emulator> lu(A.data(), m, stride, exchange);
        const bool result = lu.solve(x.data());
        if (Emulator::thread() == 0) solved = result;
      });
      CHECK(solved);
      double error = 0, size = 0;
      for (int64_t i = 0; i < m; ++i) {
        double sum = -b[i];
        for (int64_t j = 0; j < m; ++j) sum += a[i * m + j] * x[j], size = std::fmax(size, std::fabs(a[i * m + j] * x[j]));
        error = std::fmax(error, std::fabs(sum));
      }
      CHECK(error <= 1e-14 * m * size);
    }
  for (double value : {0.0, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {  // no system to solve
    std::vector<double> A(20 * 21, 0.0), b(20, 1.0);
    for (int64_t i = 0; i < 20; ++i) A[i * 21 + i] = i == 17 ? value : 1.0;
    bool solved = true;
    LuExchange exchange;
    Emulator::launch(1, 1, 64, 0, 5, [&](char*) {
      Lu<Emulator> lu(A.data(), 20, 21, exchange);
      const bool result = lu.solve(b.data());
      if (Emulator::thread() == 0) solved = result;
    });
    CHECK(!solved);
  }
}

// A problem as a solve leaves it: z, residual and status of every sample are what `fail` says.
struct Case {
  int64_t B, m;
  std::vector<float> W, c, z, mask, residual;
  std::vector<int32_t> iterations;
  std::vector<uint8_t> status;
  DeqReport report{-1, -1, -1, -1};
  Rescue rescue{};

  Case(int64_t B, int64_t m, int32_t activation, float scale, bool is_stack = false) : B(B), m(m) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const int64_t S = is_stack ? 2 : 1;
    W.resize(S * m * m), c.resize(S * B * (m + 3)), z.assign(S * B * (m + 3), 0.0f);
    for (float& w : W) w = scale * normal(random) / std::sqrt(static_cast<float>(m));
    for (float& x : c) x = normal(random);
    residual.assign(S * B, 1.0f), iterations.assign(S * B, 40), status.assign(S * B, DEQ_STALLED);
    Call& call = rescue.call;
    call.batch = B, call.width = m, call.W = W.data(), call.row_stride = m, call.matrix_stride = m * m;
    call.injection = {c.data(), {B * (m + 3), m + 3, 1}}, call.out = {z.data(), {B * (m + 3), m + 3, 1}};
    call.activation = activation;
    call.iterations = iterations.data(), call.residual = residual.data(), call.status = status.data(), call.report = &report;
    rescue.weights = S, rescue.tol = 1e-5, rescue.max_iter = 1000;
  }

  void run(int blocks, bool is_shared = false, unsigned seed = 1) {
    std::vector<double> jacobians(is_shared ? 0 : blocks * m * jacobian_stride(m), NAN);
    rescue.jacobians = is_shared ? nullptr : jacobians.data();
    const int64_t bytes = newton_vector_bytes(m) + (is_shared ? jacobian_bytes(m) : 0);
    Emulator::launch(blocks, 1, 64, bytes, seed, [&](char* shared) { NewtonRescue<Emulator>(rescue, shared).run(); });
  }

  double f(int64_t index, int64_t i) const {
    const float* w = W.data() + index / B * m * m + i * m;
    double x = c[index * (m + 3) + i], y = 0;
    for (int64_t j = 0; j < m; ++j) x += static_cast<double>(w[j]) * z[index * (m + 3) + j];
    if (rescue.call.mask.data) return x * mask[index * m + i];
    with_activation<ScalarMath<double>>(rescue.call.activation, [&](auto a) { y = decltype(a)::value(x); });
    return y;
  }
  double residual_of(int64_t index) const {
    double step = 0, size = 0;
    for (int64_t i = 0; i < m; ++i) step += std::pow(f(index, i) - z[index * (m + 3) + i], 2), size += std::pow(f(index, i), 2);
    return std::sqrt(step / size);
  }
};

// Equilibria that repel the plain iteration.
void stuck_samples() {
  for (int32_t activation : {kTanh, kRelu, kSilu}) {
    Case k(3, 40, activation, activation == kTanh ? 1.6f : 0.9f);
    k.run(2);
    int solved = 0;
    for (int64_t b = 0; b < k.B; ++b) {
      CHECK(k.iterations[b] > 40 && k.iterations[b] <= 40 + kNewtonSteps);
      CHECK(k.residual[b] < 1.0f);
      if (k.status[b] != DEQ_CONVERGED) continue;
      ++solved;
      CHECK(k.residual[b] <= 1e-5f && k.residual_of(b) <= 2e-5);
    }
    CHECK(solved >= 2);
    std::printf("activation %d: %d of 3 solved\n", activation, solved);
  }
}

// z = gelu(0.97 z + c), whose curve nearly touches the diagonal near 0.7, far from its only crossing.
void narrow_places() {
  Case k(24, 1, kGelu, 1.0f);
  k.W[0] = 0.97f;
  for (int64_t b = 0; b < k.B; ++b) k.c[b * 4] = 0.192f + 0.002f * b, k.z[b * 4] = 0.7f;
  k.run(2);
  for (int64_t b = 0; b < k.B; ++b) CHECK(k.status[b] == DEQ_CONVERGED && k.z[b * 4] > 6 && k.residual_of(b) <= 2e-5);
}

void nothing_else_is_touched() {
  Case good(4, 20, kTanh, 0.5f);
  good.status = {DEQ_CONVERGED, DEQ_STALLED, DEQ_NONFINITE, DEQ_MAX_ITER};
  good.iterations = {5, 6, 0, 1000};  // the last has no evaluation left
  good.rescue.call.status = good.status.data(), good.rescue.call.iterations = good.iterations.data();
  std::fill(good.z.begin(), good.z.end(), -77.0f);
  good.run(1);
  for (int64_t b : {0, 2, 3}) {
    CHECK(good.iterations[b] == (b == 0 ? 5 : b == 2 ? 0 : 1000) && good.residual[b] == 1.0f);
    for (int64_t i = 0; i < 23; ++i) CHECK(good.z[b * 23 + i] == -77.0f);
  }
  CHECK(good.status[1] == DEQ_CONVERGED && good.iterations[1] > 6 && good.residual_of(1) <= 2e-5);
  for (int64_t i = 20; i < 23; ++i) CHECK(good.z[23 + i] == -77.0f);
  // One whose residual cannot be bettered keeps it.
  Case best(1, 20, kTanh, 0.5f);
  best.residual[0] = 1e-12f;
  best.run(1);
  CHECK(best.residual[0] == 1e-12f && best.status[0] == DEQ_STALLED);
  for (int64_t i = 0; i < 20; ++i) CHECK(best.z[i] == 0.0f);
}

// Whatever the number of blocks and wherever the Jacobian lies: the same bits. Two weights.
void one_answer() {
  Case one(3, 17, kTanh, 1.4f, true), many(3, 17, kTanh, 1.4f, true), shared(3, 17, kTanh, 1.4f, true);
  one.run(1);
  many.run(4, false, 3);
  shared.run(2, true, 5);
  CHECK(one.z == many.z && one.z == shared.z && one.iterations == many.iterations && one.residual == shared.residual);
  for (int64_t index = 0; index < 6; ++index)
    if (one.status[index] == DEQ_CONVERGED) CHECK(one.residual_of(index) <= 2e-5);
}

void adjoints() {
  for (bool is_value : {false, true}) {
    Case k(3, 33, kTanh, 1.7f);
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    k.mask.resize(3 * 33);
    for (float& d : k.mask) d = uniform(random);
    k.rescue.call.mask = {k.mask.data(), {3 * 33, 33, 1}};
    k.rescue.call.mask_is_value = is_value;
    k.run(2);
    if (is_value)
      for (float& d : k.mask) d = derivative_of_value<ScalarMath<float>>(kTanh, d);
    for (int64_t b = 0; b < 3; ++b) {
      CHECK(k.status[b] == DEQ_CONVERGED && k.iterations[b] == 41 && k.residual_of(b) <= 2e-5);
    }
  }
  Case singular(1, 20, kIdentity, 0.0f);  // I - D A = 0: nothing solves it, and what was there stays
  singular.mask.assign(20, 1.0f);
  singular.rescue.call.mask = {singular.mask.data(), {20, 20, 1}};
  for (int64_t i = 0; i < 20; ++i) singular.W[i * 20 + i] = 1.0f;
  singular.run(1);
  CHECK(singular.status[0] == DEQ_STALLED && singular.residual[0] == 1.0f);
  for (int64_t i = 0; i < 20; ++i) CHECK(singular.z[i] == 0.0f);
}

// An equation without equilibrium, and one whose numbers leave the range: an honest status and finite numbers.
void failures() {
  Case none(1, 10, kSoftplus, 0.0f);  // z = softplus(z + c) > z + c
  for (int64_t i = 0; i < 10; ++i) none.W[i * 10 + i] = 1.0f, none.c[i] = 1.0f;
  none.run(1);
  CHECK(none.status[0] == DEQ_STALLED);
  Case huge(1, 10, kIdentity, 0.5f);
  for (float& x : huge.c) x = 3e38f;
  huge.run(1);
  for (Case* k : {&none, &huge})
    for (int64_t i = 0; i < 10; ++i) CHECK(std::isfinite(k->z[i]));
}

void limits() {
  constexpr int64_t kHopper = 227 << 10;
  CHECK(jacobian_is_shared(160, kHopper) && !jacobian_is_shared(170, kHopper));
  CHECK(rescued_by_a_block(1024) >= 1 && rescued_by_a_block(1100) == 0 && newton_vector_bytes(1077) <= kHopper);
}

}  // namespace

int main() {
  systems();
  stuck_samples();
  narrow_places();
  nothing_else_is_touched();
  one_answer();
  adjoints();
  failures();
  limits();
  return check_result();
}
