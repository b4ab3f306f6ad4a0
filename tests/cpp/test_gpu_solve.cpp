// The GPU's solving kernels, run on the host by every thread (emulator.h), against the C interface's own promises.
// One file however long: every case runs the same problems through the same harness below.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/capacity.h"
#include "cuda/pack.h"
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
    call.acceleration = DEQ_PLAIN, call.depth = kWindow;
    call.iterations = iterations.data(), call.residual = residual.data(), call.status = status.data();
    call.report = &report, call.notes = notes.data();
  }

  template <int RT, int HELD>
  void solve_in_blocks(int blocks, unsigned seed = 1, int cluster = 1) {
    scratch.assign(blocks * block_scratch(m), NAN);
    call.scratch = scratch.data();
    const BlockLayout at = block_layout(m, RT, HELD);
    call.exchanges = seed % 2;
    Emulator::launch(
        blocks, 1, (at.warps + 1) * kWarp, at.bytes + (call.exchanges ? at.exchange : 0), seed,
        [&](char* shared) { BlockSolve<Emulator, RT, HELD>(call, shared).run(); }, cluster);
  }

  // As many weights as given, from call.first_weight on, in so many groups each.
  template <int RT, int BT, int HELD>
  void solve_in_grid(unsigned seed = 1, int groups = 1, int weights = 1) {
    const GridScratch memory = grid_scratch(m, RT, BT);
    const int rows = groups * weights;
    scratch.assign(rows * (memory.flags + memory.floats), NAN);
    std::fill_n(scratch.begin(), rows * memory.flags, 0.0f);
    call.scratch = scratch.data();
    call.groups = groups;
    const GridLayout at = grid_layout(m, RT, BT, HELD);
    Emulator::launch(at.blocks, rows, kGridThreads, at.bytes, seed,
                     [&](char* shared) { GridSolve<Emulator, RT, BT, HELD>(call, shared).run(); });
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

// Anchors read W by 128 inputs at a time, whether its rows lie at multiples of 16 bytes or not.
void widths() {
  for (int64_t m : {128, 132, 150}) {
    Case block(3, m), grid(3, m), held(3, m);
    block.solve_in_blocks<2, 0>(2);
    block.check_solved();
    grid.solve_in_grid<1, 1, 0>();
    grid.check_solved();
    held.solve_in_blocks<2, 2>(2, 3);
    CHECK(block.z == held.z);
  }
}

// A weight of any strides, row by row.
void packing() {
  for (int64_t m : {1, 32, 45}) {
    const int64_t S = 2, tiles = (m + kPackTile - 1) / kPackTile;
    std::vector<float> from(S * m * m), to(S * m * m, NAN);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
    for (const DeqView view : {DeqView{from.data(), {m * m, 1, m}}, DeqView{from.data(), {1, 2, 2 * m}}}) {
      Emulator::launch(static_cast<int>(tiles * tiles), S, kPackThreads, kPackFloats * sizeof(float), 1,
                       [&](char* shared) { pack_tile<Emulator>(view, to.data(), m, reinterpret_cast<float*>(shared)); });
      bool same = true;
      for (int64_t s = 0; s < S; ++s)
        for (int64_t i = 0; i < m * m; ++i)
          same = same && to[s * m * m + i] == from[s * view.stride[0] + i / m * view.stride[1] + i % m * view.stride[2]];
      CHECK(same);
    }
  }
}

// Blocks of a cluster share out the reading of W: the same bits, and the same report of what is not finite in it.
void clusters() {
  for (int64_t m : {1, 50}) {
    Case alone(12, m), pairs(12, m), all(12, m);
    alone.solve_in_blocks<2, 0>(4);
    pairs.solve_in_blocks<2, 0>(4, 2, 2);
    all.solve_in_blocks<2, 0>(8, 3, 8);  // more blocks than samples find no slot: theirs is done at once
    CHECK(alone.z == pairs.z && alone.z == all.z && alone.iterations == all.iterations);
    all.check_solved();
  }
  Case held(9, 70), shared(9, 70);
  held.solve_in_blocks<2, 2>(2);
  shared.solve_in_blocks<2, 2>(4, 4, 4);
  CHECK(held.z == shared.z);
  Case bad(3, 40);
  bad.W[5 * 40 + 27] = NAN, bad.W[5 * 40 + 39] = INFINITY;
  bad.solve_in_blocks<1, 0>(2, 1, 2);
  CHECK(bad.report.bad_weight == 1 + 5 * 40 + 27);
  for (int64_t batch : {1, 63, 64, 1024, 1056, 5000})
    for (int64_t m : {16, 256}) {
      const int64_t blocks = block_count(m, batch, 132);
      CHECK(blocks >= 1 && blocks <= 132 && blocks <= batch);
      if (m == 16) CHECK(!shares_weight(m, blocks));
    }
  CHECK(block_count(256, 1024, 132) == 128 && shares_weight(256, 128) && block_count(256, 5000, 132) == 132);
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
      for (int groups : {2, 3}) {  // samples of which a group has several, or none
        Case apart(B, m);
        apart.solve_in_grid<1, 1, 0>(2, groups);
        CHECK(one.z == apart.z && one.residual == apart.residual && one.iterations == apart.iterations);
      }
    }
  for (int64_t m : {17, 40, 150})
    for (int64_t B : {1, 40}) {
      Case one(B, m), two(B, m), four(B, m);
      one.solve_in_grid<1, 1, 0>();
      one.check_solved();
      two.solve_in_grid<2, 4, 0>(2);
      four.solve_in_grid<4, 4, 0>(3, 2);
      for (const Case* k : {&two, &four}) CHECK(one.z == k->z && one.residual == k->residual && one.iterations == k->iterations);
    }
  Case two(9, 250), held(9, 250);
  two.solve_in_grid<2, 1, 0>();
  two.check_solved();
  held.solve_in_grid<2, 1, 1>(2);
  held.check_solved();
  CHECK(two.z == held.z && two.iterations == held.iterations);
}

// Several weights at once, each by groups of its own, give what each gives alone.
void stacks() {
  constexpr int64_t S = 3, B = 5, m = 40;
  std::vector<Case> alone;
  alone.reserve(S);  // a case must not move: its call points into it
  Case all(S * B, m);
  all.W.clear(), all.c.clear();
  for (int64_t s = 0; s < S; ++s) {
    Case& one = alone.emplace_back(B, m);
    for (float& w : one.W) w *= static_cast<float>(s + 1) / S;
    for (float& x : one.c) x += static_cast<float>(s);
    all.W.insert(all.W.end(), one.W.begin(), one.W.end());
    all.c.insert(all.c.end(), one.c.begin(), one.c.end());
    one.solve_in_grid<1, 1, 0>();
    one.check_solved();
  }
  all.call.batch = B, all.call.W = all.W.data();
  all.call.injection = {all.c.data(), {B * (m + 3), m + 3, 1}};
  all.call.out = {all.z.data(), {B * (m + 3), m + 3, 1}};
  for (int groups : {1, 2}) {
    std::fill(all.z.begin(), all.z.end(), -77.0f);
    all.call.first_weight = 0;
    all.solve_in_grid<2, 4, 0>(3, groups, 2);
    all.call.first_weight = 2;  // the one that is left
    all.solve_in_grid<2, 4, 0>(3, groups);
    for (int64_t s = 0; s < S; ++s) {
      CHECK(std::equal(alone[s].z.begin(), alone[s].z.end(), all.z.begin() + s * B * (m + 3)));
      CHECK(std::equal(alone[s].iterations.begin(), alone[s].iterations.end(), all.iterations.begin() + s * B));
    }
  }
  all.W[2 * m * m + 5 * m + 7] = NAN;
  all.solve_in_grid<2, 4, 0>(3, 2);
  CHECK(all.report.bad_weight == 1 + (2 * m + 5) * m + 7);
}

// A nilpotent W and an injection that bfloat16 holds exactly: every step is exact, so that no anchor has anything to correct and
// the path is that of the plain iteration.
void exact_steps() {
  constexpr int64_t m = 70, B = 5;
  auto make = [] {
    Case k(B, m, kIdentity);
    std::mt19937 random(3);
    std::fill(k.W.begin(), k.W.end(), 0.0f);
    for (int64_t i = 16; i < m; ++i)
      for (int n = 0; n < 2; ++n) k.W[i * m + random() % (i - 15)] = random() % 2 ? 0.5f : -0.5f;
    for (float& x : k.c) x = static_cast<float>(static_cast<int>(random() % 3) - 1);
    return k;
  };
  Case reference = make();
  std::vector<int32_t> evaluations(B);
  for (int64_t b = 0; b < B; ++b) {
    std::vector<float> z(m, 0.0f), f(m);
    for (bool moves = true; moves; ++evaluations[b]) {
      for (int64_t i = 0; i < m; ++i) {
        f[i] = reference.c[b * (m + 3) + i];
        for (int64_t j = 0; j < m; ++j) f[i] += reference.W[i * m + j] * z[j];
      }
      moves = f != z;
      z = f;
    }
    std::copy(z.begin(), z.end(), &reference.z[b * (m + 3)]);
  }
  Case blocks = make(), tall = make(), held = make(), grid = make(), wide = make(), high = make(), held_grid = make();
  blocks.solve_in_blocks<1, 0>(2);
  tall.solve_in_blocks<2, 0>(1);
  held.solve_in_blocks<2, 3>(1);
  grid.solve_in_grid<1, 1, 0>();
  wide.solve_in_grid<1, 4, 0>();
  high.solve_in_grid<4, 4, 0>(1, 2);
  held_grid.solve_in_grid<2, 1, 0>();
  for (Case* k : {&blocks, &tall, &held, &grid, &wide, &high, &held_grid}) {
    CHECK(k->z == reference.z);
    for (int64_t b = 0; b < B; ++b) CHECK(k->iterations[b] == evaluations[b] + 1);  // one more confirms it
  }
}

// The smallest kernel of either regime.
void solve_each(Case& in_blocks, Case& in_grid) {
  in_blocks.solve_in_blocks<1, 0>(2);
  in_grid.solve_in_grid<1, 1, 0>();
}

void activations() {
  for (int32_t activation = 0; activation < kActivations; ++activation) {
    Case blocks(9, 20, activation), grid(9, 20, activation);
    solve_each(blocks, grid);
    blocks.check_solved();
    grid.check_solved();
    if (!has_of_value(activation)) continue;
    // u = d (A u + g) with d taken from the equilibrium's value must agree with the same d given.
    Case value(9, 20, activation), given(9, 20, activation), exchanged(9, 20, activation);
    value.mask.resize(9 * 20), given.mask.resize(9 * 20);
    for (int64_t i = 0; i < 9 * 20; ++i) {
      value.mask[i] = blocks.z[i / 20 * 23 + i % 20];
      given.mask[i] = derivative_of_value<ScalarMath<float>>(activation, value.mask[i]);
    }
    exchanged.mask = given.mask;
    for (Case* k : {&value, &given, &exchanged}) k->call.mask = {k->mask.data(), {0, 20, 1}};
    value.call.mask_is_value = 1;
    value.solve_in_blocks<1, 0>(2);
    solve_each(given, exchanged);
    CHECK(value.z == given.z);
    given.check_solved();
    exchanged.check_solved();
  }
}

// Slow samples are accelerated in either way, and need fewer evaluations.
void acceleration() {
  for (int64_t m : {20, 65}) {
    Case plain(9, m, kTanh, 1.3f);
    plain.call.reliable.rule.max_iter = 2000;
    plain.solve_in_blocks<2, 0>(2);
    for (int32_t kind : {DEQ_ANDERSON, DEQ_ON_DEMAND}) {
      Case blocks(9, m, kTanh, 1.3f), again(9, m, kTanh, 1.3f), grid(9, m, kTanh, 1.3f), wide(9, m, kTanh, 1.3f),
          high(9, m, kTanh, 1.3f);
      for (Case* k : {&blocks, &again, &grid, &wide, &high}) k->call.acceleration = kind;
      blocks.solve_in_blocks<2, 0>(2);
      again.solve_in_blocks<2, 0>(1, 5);
      grid.solve_in_grid<1, 1, 0>();
      wide.solve_in_grid<1, 4, 0>(4);
      high.solve_in_grid<4, 4, 0>(4, 2);
      CHECK(blocks.z == again.z && blocks.iterations == again.iterations);
      CHECK(grid.z == wide.z && grid.iterations == wide.iterations && grid.z == high.z && grid.iterations == high.iterations);
      for (Case* k : {&blocks, &grid}) {
        k->check_solved();
        int64_t sum = 0, plain_sum = 0;
        for (int64_t b = 0; b < 9; ++b) sum += k->iterations[b], plain_sum += plain.iterations[b];
        std::printf("m %d: %d evaluations in all, plain %d\n", (int)m, (int)sum, (int)plain_sum);
        CHECK(sum < plain_sum);
      }
    }
  }
}

void starts() {
  Case cold(5, 33), warm_blocks(5, 33), warm_grid(5, 33);
  cold.solve_in_blocks<1, 0>(1);
  for (Case* k : {&warm_blocks, &warm_grid}) {
    k->start = cold.z;
    k->call.start = {k->start.data(), {0, 36, 1}};
  }
  solve_each(warm_blocks, warm_grid);
  for (Case* k : {&warm_blocks, &warm_grid}) {
    k->check_solved();
    for (int64_t b = 0; b < 5; ++b) CHECK(k->iterations[b] < cold.iterations[b] && k->iterations[b] <= 3);
  }
}

// c times a power of two: the same bits, times that power. Far from it too.
void scales() {
  for (int exponent : {-140, -60, 60, 120}) {
    Case one(3, 20), blocks(3, 20), grid(3, 20), reference(3, 20);
    solve_each(one, reference);
    for (Case* k : {&blocks, &grid})
      for (float& x : k->c) x = std::ldexp(x, exponent);
    solve_each(blocks, grid);
    for (int64_t i = 0; i < 3 * 23; ++i) {
      if (i % 23 >= 20) continue;
      if (exponent > -100)
        CHECK(blocks.z[i] == std::ldexp(one.z[i], exponent) && grid.z[i] == std::ldexp(reference.z[i], exponent));
      CHECK(std::fabs(blocks.z[i] - std::ldexp(one.z[i], exponent)) <= std::ldexp(1e-5f, exponent) + 1e-44f);
    }
    if (exponent > -100) CHECK(blocks.iterations == one.iterations && grid.iterations == reference.iterations);
  }
  for (float factor : {1e-30f, 1e25f}) {  // not homogeneous: sums in double
    Case blocks(3, 20, kElu), grid(3, 20, kElu);
    for (Case* k : {&blocks, &grid})
      for (float& x : k->c) x *= factor;
    solve_each(blocks, grid);
    blocks.check_solved();
    grid.check_solved();
  }
}

// Units that relu or a mask ends say nothing of the scale, whatever their injection: beside them the others' squares would leave
// the range, and any iterate would pass for converged.
void switched_off() {
  for (const bool masked : {false, true}) {
    Case block(4, 20), grid(4, 20);
    for (Case* k : {&block, &grid}) {
      k->mask.assign(4 * 20, 1.0f);
      for (int64_t i = 0; i < 4 * 20; i += 3) {
        k->c[i / 20 * 23 + i % 20] = masked ? 1e30f : -1e30f;
        k->mask[i] = 0;
      }
      if (masked) k->call.mask = {k->mask.data(), {0, 20, 1}};
    }
    block.solve_in_blocks<1, 0>(2);
    block.check_solved();
    grid.solve_in_grid<1, 1, 0>();
    grid.check_solved();
  }
  Case block(4, 20), grid(4, 20);  // so far from the others that no power of two takes them near 1
  for (Case* k : {&block, &grid}) {
    k->mask.assign(4 * 20, 1.0f);
    for (float& x : k->c) x *= 1e-25f;
    for (int64_t i = 0; i < 4 * 20; i += 3) k->c[i / 20 * 23 + i % 20] = 1e25f, k->mask[i] = 0;
    k->call.mask = {k->mask.data(), {0, 20, 1}};
  }
  solve_each(block, grid);
  block.check_solved();
  grid.check_solved();
}

// A start that is far larger than the equilibrium: squares of its last steps would leave the range below, and pass for none.
void far_starts() {
  for (float factor : {1e20f, 1e30f, 1e36f}) {
    Case block(3, 20), grid(3, 20);
    for (Case* k : {&block, &grid}) {
      k->start.resize(3 * 20);
      for (int64_t i = 0; i < 3 * 20; ++i) k->start[i] = factor * k->c[i / 20 * 23 + i % 20];
      k->call.start = {k->start.data(), {0, 20, 1}};
    }
    solve_each(block, grid);
    block.check_solved();
    grid.check_solved();
  }
  Case nothing(3, 20);  // of which zero is the equilibrium
  nothing.start = nothing.c;
  std::fill(nothing.c.begin(), nothing.c.end(), 0.0f);
  nothing.call.start = {nothing.start.data(), {0, 23, 1}};
  Case least(3, 20);  // of which no scale is large enough
  least.c.assign(least.c.size(), 1e-45f);
  least.start.assign(least.c.size(), 1e-25f);
  least.call.start = {least.start.data(), {0, 23, 1}};
  least.solve_in_blocks<1, 0>(2);
  for (int64_t b = 0; b < 3; ++b) CHECK(least.status[b] != DEQ_NONFINITE && std::fabs(least.z[b * 23]) < 1e-25f);
  nothing.solve_in_blocks<1, 0>(2);
  for (int64_t b = 0; b < 3; ++b) CHECK(nothing.status[b] == DEQ_CONVERGED && std::fabs(nothing.z[b * 23]) < 1e-15f);
}

// A sample that fails says so, returns something finite, and leaves its batch mates alone.
void failures() {
  Case good_blocks(9, 20), good_grid(9, 20), blocks(9, 20), grid(9, 20);
  solve_each(good_blocks, good_grid);
  for (Case* k : {&blocks, &grid}) k->c[2 * 23 + 5] = NAN, k->c[7 * 23] = INFINITY;
  solve_each(blocks, grid);
  for (auto [bad, good] : {std::pair{&blocks, &good_blocks}, std::pair{&grid, &good_grid}}) {
    CHECK(bad->report.bad_injection == 1 + 2 && bad->report.bad_weight == -1);
    for (int64_t b = 0; b < 9; ++b) {
      CHECK(bad->status[b] == (b == 2 || b == 7 ? DEQ_NONFINITE : DEQ_CONVERGED));
      if (b != 2 && b != 7) CHECK(std::equal(&bad->z[b * 23], &bad->z[b * 23 + 20], &good->z[b * 23]));
    }
  }
  for (float scale : {2.2f, 40.0f}) {  // no contraction, and away it goes
    Case blocks(5, 20, kRelu, scale), grid(5, 20, kRelu, scale);
    for (Case* k : {&blocks, &grid}) k->call.reliable.rule.max_iter = 300;
    solve_each(blocks, grid);
    for (Case* k : {&blocks, &grid})
      for (int64_t b = 0; b < 5; ++b) {
        CHECK(k->status[b] == DEQ_DIVERGED || k->status[b] == DEQ_STALLED || k->status[b] == DEQ_MAX_ITER);
        CHECK(k->residual[b] > 1e-5f);
        for (int64_t i = 0; i < 20; ++i) CHECK(std::isfinite(k->z[b * 23 + i]));
      }
  }
  for (int64_t most : {1, 2, 3}) {
    Case late(5, 20), grid(5, 20);
    late.call.reliable.rule.max_iter = grid.call.reliable.rule.max_iter = most;
    solve_each(late, grid);
    for (Case* k : {&late, &grid})
      for (int64_t b = 0; b < 5; ++b) CHECK(k->status[b] == DEQ_MAX_ITER && k->iterations[b] == most);
  }
  Case weight(3, 20), weight_grid(3, 20);
  weight.W[5 * 20 + 7] = weight_grid.W[5 * 20 + 7] = NAN;
  solve_each(weight, weight_grid);
  CHECK(weight.report.bad_weight == 1 + 5 * 20 + 7 && weight_grid.report.bad_weight == 1 + 5 * 20 + 7);
  Case huge(2, 20);  // the result does not fit float32
  for (float& x : huge.c) x = 3e38f;
  for (float& w : huge.W) w = 0.9f / 20;
  huge.solve_in_blocks<1, 0>(1);
  for (int64_t b = 0; b < 2; ++b) CHECK(huge.status[b] == DEQ_DIVERGED && std::isfinite(huge.z[b * 23]));
}

void capacities() {
  constexpr int64_t kHopper = 227 << 10, kAmpere = 163 << 10;
  for (int64_t shared : {kHopper, kAmpere})
    for (int64_t m = 1; m <= 8192; m += m < 600 ? 1 : 37) {
      const int block = block_kernel(m, shared);
      if (block >= 0) CHECK(block_layout(m, kBlockKernels[block].rows, kBlockKernels[block].held).bytes <= shared);
      CHECK((block >= 0) == (m <= (shared == kHopper ? 336 : 288)));
      for (int64_t batch : {1, 16, 32, 1000}) {
        const int grid = grid_kernel(m, 1, batch, 132, shared);
        if (shared == kHopper) CHECK((grid >= 0) == (m <= 4224));
        if (grid < 0) continue;
        const GridLayout at = grid_layout(m, kGridKernels[grid].rows, kGridKernels[grid].columns, kGridKernels[grid].held);
        const auto slots = [&](int kernel) {
          return possible_groups(kGridKernels[kernel], m, 132, shared) * kGridKernels[kernel].columns * kSlots;
        };
        CHECK(at.bytes <= shared && slots(grid) > 0);
        for (int i = 0; i < kGridKernelCount; ++i) CHECK(slots(i) <= slots(grid) || (slots(grid) >= batch && i > grid));
        const int64_t possible = 132 / at.blocks;
        for (int64_t weights : {1, 3, 7, 500}) {
          const GridShares shares = grid_shares(weights, batch, possible);
          const int64_t used = shares.groups * shares.weights;
          CHECK(shares.groups >= 1 && shares.groups <= batch && shares.weights >= 1 && shares.weights <= weights);
          CHECK(used <= possible && (shares.groups == batch || possible - used < shares.weights));
          const GridShares again = grid_shares(weights, batch, used);  // as a launch finds them in its plan
          CHECK(again.groups == shares.groups && again.weights == shares.weights);
        }
      }
    }
}

}  // namespace

int main() {
  blocks();
  widths();
  packing();
  clusters();
  grids();
  stacks();
  exact_steps();
  activations();
  acceleration();
  starts();
  far_starts();
  scales();
  switched_off();
  failures();
  capacities();
  return check_result();
}
