// The GPU's solving kernels, run on the host by every thread (emulator.h), against the C interface's own promises.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/block_solve.h"
#include "cuda/grid_solve.h"
#include "emulator.h"

using namespace deq;

namespace {

// Owns the memory of one problem; rows of c and z are three elements apart, so that strides matter.
struct Case {
  int64_t B, m;
  std::vector<float> W, c, z, mask, start, residual, scratch;
  std::vector<int32_t> iterations;
  std::vector<uint8_t> status;
  std::vector<Note> notes;
  DeqReport report{-1, -1, -1, -1};
  Call call{};

  Case(int64_t B, int64_t m, int32_t activation = kRelu, float scale = 0.45f) : B(B), m(m) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    W.resize(m * m), c.resize(B * (m + 3)), z.assign(B * (m + 3), -77.0f);
    for (float& w : W) w = scale * normal(random) / std::sqrt(static_cast<float>(m));
    for (float& x : c) x = normal(random);
    residual.resize(B), iterations.resize(B), status.assign(B, 99), notes.resize(B);
    call.batch = B, call.width = m, call.W = W.data(), call.row_stride = m, call.matrix_stride = m * m;
    call.injection = {c.data(), {0, m + 3, 1}};
    call.out = {z.data(), {0, m + 3, 1}};
    call.activation = activation;
    call.reliable = {make_rule(1e-5, 500, DEQ_RESIDUAL, m, false), kBfloat16Pollution, INFINITY, false};
    call.iterations = iterations.data(), call.residual = residual.data(), call.status = status.data();
    call.report = &report, call.notes = notes.data();
  }

  template <int RT, int HELD>
  void solve_in_blocks(int blocks, unsigned seed = 1) {
    scratch.assign(blocks * block_scratch(m), NAN);
    call.scratch = scratch.data();
    prepare();
    const BlockLayout at = block_layout(m, RT, HELD);
    Emulator::launch(blocks, 1, (at.warps + 1) * kWarp, at.bytes, seed,
                     [&](char* shared) { BlockSolve<Emulator, RT, HELD>(call, shared).run(); });
  }

  template <int RT, int BT, int HELD>
  void solve_in_grid(unsigned seed = 1) {
    const GridScratch memory = grid_scratch(m, RT, BT);
    scratch.assign(memory.floats, NAN);
    std::fill(scratch.begin() + memory.flags, scratch.end(), 0.0f);
    call.scratch = scratch.data();
    prepare();
    const GridLayout at = grid_layout(m, RT, BT, HELD);
    Emulator::launch(at.blocks, 1, kGridThreads, at.bytes, seed,
                     [&](char* shared) { GridSolve<Emulator, RT, BT, HELD>(call, shared).run(); });
  }

  void prepare() {
    Emulator::launch(static_cast<int>(B), 1, kWarp, 0, 1, [&](char*) { prepare_sample<Emulator>(call, 0, Emulator::block()); });
  }

  double value(double x) const {
    double y = 0;
    with_activation<ScalarMath<double>>(call.activation, [&](auto a) { y = decltype(a)::value(x); });
    return y;
  }

  // ||f(z) - z|| / ||f(z)|| in double.
  double residual_of(int64_t b) const {
    double step = 0, size = 0;
    for (int64_t i = 0; i < m; ++i) {
      double f = c[b * (m + 3) + i];
      for (int64_t j = 0; j < m; ++j) f += static_cast<double>(W[i * m + j]) * z[b * (m + 3) + j];
      f = call.mask.data ? f * mask[b * m + i] : value(f);
      step += (f - z[b * (m + 3) + i]) * (f - z[b * (m + 3) + i]), size += f * f;
    }
    return size > 0 ? std::sqrt(step / size) : std::sqrt(step);
  }

  void check_solved() {
    CHECK(report.bad_weight == -1 && report.bad_injection == -1 && report.bad_start == -1);
    for (int64_t b = 0; b < B; ++b) {
      CHECK(status[b] == DEQ_CONVERGED);
      CHECK(iterations[b] >= 1 && iterations[b] < 100);
      CHECK(residual[b] <= 1e-5f);
      CHECK(residual_of(b) <= 1e-5);
      for (int64_t i = m; i < m + 3; ++i) CHECK(z[b * (m + 3) + i] == -77.0f);
    }
  }
};

void blocks() {
  for (int64_t m : {1, 16, 17, 50})
    for (int64_t B : {1, 5, 20}) {
      Case one(B, m), many(B, m), wide(B, m);
      one.solve_in_blocks<1, 0>(1);
      one.check_solved();
      many.solve_in_blocks<1, 0>(3, 2);  // in other blocks and another order: the same bits
      CHECK(one.z == many.z && one.residual == many.residual && one.iterations == many.iterations);
      wide.solve_in_blocks<2, 0>(2, 3);
      wide.check_solved();
      if (m < 33) continue;
      Case held(B, m);
      held.solve_in_blocks<2, 2>(2, 3);
      CHECK(wide.z == held.z && wide.iterations == held.iterations);
    }
}

void grids() {
  for (int64_t m : {1, 17, 40})
    for (int64_t B : {1, 5, 20}) {
      Case one(B, m), again(B, m), many(B, m);
      one.solve_in_grid<1, 1, 0>();
      one.check_solved();
      again.solve_in_grid<1, 1, 0>(2);
      CHECK(one.z == again.z && one.residual == again.residual && one.iterations == again.iterations);
      many.solve_in_grid<1, 4, 0>(3);
      CHECK(one.z == many.z && one.residual == many.residual && one.iterations == many.iterations);
    }
  Case two(9, 250), held(9, 250);
  two.solve_in_grid<2, 1, 0>();
  two.check_solved();
  held.solve_in_grid<2, 1, 1>(2);
  held.check_solved();
  CHECK(two.z == held.z && two.iterations == held.iterations);
}

}  // namespace

int main() {
  blocks();
  grids();
  return check_result();
}
