// The GPU's substitution for triangular weights, run on the host by every thread (emulator.h), against the same in double.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/substitute.h"
#include "emulator.h"

using namespace deq;

namespace {

// Rows of c, mask and z are three elements apart; above its diagonal W holds NaN, which nothing may read.
struct Case {
  int64_t B, m;
  std::vector<float> W, c, mask, z, residual, packed, solved;
  Substitution call{};

  Case(int64_t B, int64_t m, int32_t activation, bool strict = false, bool reversed = false, bool by_columns = false,
       float scale = 0.9f)
      : B(B), m(m) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(-0.7f, 0.7f);
    W.assign(m * m, NAN), c.resize(B * (m + 3)), z.assign(B * (m + 3), -77.0f), residual.assign(B, -1.0f);
    call.batch = B, call.width = m, call.W = W.data();
    call.row_stride = by_columns ? 1 : m, call.column_stride = by_columns ? m : 1;
    call.injection = {c.data(), {0, m + 3, 1}}, call.out = {z.data(), {0, m + 3, 1}};
    call.activation = activation, call.strict = strict, call.reversed = reversed, call.residual = residual.data();
    for (int64_t n = 0; n < m; ++n)
      for (int64_t k = 0; k < n + !strict; ++k)
        W[place(n) * call.row_stride + place(k) * call.column_stride] =
            k == n ? uniform(random) : scale * normal(random) / std::sqrt(static_cast<float>(m));
    for (float& x : c) x = normal(random);
  }

  void masked() {
    std::mt19937 random(5);
    std::uniform_real_distribution<float> uniform(0.0f, 1.2f);
    mask.resize(B * (m + 3));
    for (float& s : mask) s = uniform(random);
    call.mask = {mask.data(), {0, m + 3, 1}};
    call.activation = kIdentity;
  }

  int64_t place(int64_t n) const { return call.reversed ? m - 1 - n : n; }
  float weight(int64_t n, int64_t k) const {
    return n == k && call.strict ? 0.0f : W[place(n) * call.row_stride + place(k) * call.column_stride];
  }

  template <int BT>
  void run(unsigned seed = 1) {
    packed.assign(triangle_floats(m), NAN);
    call.packed = packed.data();
    const int64_t tiles = tiles_of(m), blocks = (B + BT * kTileSamples - 1) / (BT * kTileSamples);
    Emulator::launch(static_cast<int>(tiles), static_cast<int>(tiles), kWarp, 0, seed, [&](char*) {
      if (Emulator::block() <= Emulator::row()) pack_triangle_tile<Emulator>(call, Emulator::row(), Emulator::block());
    });
    solved.assign(blocks * solved_floats(m, BT), NAN);
    call.solved = solved.data();
    Emulator::launch(static_cast<int>(blocks), 1, Substitute<Emulator, BT>::kWarps * kWarp, substitute_layout(BT).bytes, seed,
                     [&](char* shared) { Substitute<Emulator, BT>(call, shared).run(); });
  }

  template <class T>
  T root(T w, T x) const {
    T p = x;
    with_activation<ScalarMath<T>>(call.activation, [&](auto a) {
      for (int i = 0; i < 200; ++i) p = x + w * decltype(a)::value(p);  // |w act'| is below 0.8
      p = decltype(a)::value(p);
    });
    return p;
  }

  // Output by output in T, its sums in eight parts as a vector of numbers would hold them.
  template <class T>
  std::vector<T> plain(int64_t b) const {
    std::vector<T> out(m);
    for (int64_t n = 0; n < m; ++n) {
      T part[8] = {};
      for (int64_t k = 0; k < n; ++k) part[k % 8] += static_cast<T>(weight(n, k)) * out[k];
      T x = static_cast<T>(c[b * (m + 3) + place(n)]);
      for (T sum : part) x += sum;
      const T w = static_cast<T>(weight(n, n));
      if (call.mask.data) {
        const T s = static_cast<T>(mask[b * (m + 3) + place(n)]);
        out[n] = s * x / (1 - s * w);
      } else {
        out[n] = root(w, x);
      }
    }
    return out;
  }

  // The worst sample's relative error, ours and the plain one's.
  void check_accuracy() {
    double ours = 0, theirs = 0;
    for (int64_t b = 0; b < B; ++b) {
      const std::vector<double> exact = plain<double>(b);
      const std::vector<float> rough = plain<float>(b);
      double size = 0, error = 0, other = 0;
      for (int64_t n = 0; n < m; ++n) {
        const double mine = z[b * (m + 3) + place(n)];
        size += exact[n] * exact[n];
        error += (mine - exact[n]) * (mine - exact[n]);
        other += (rough[n] - exact[n]) * (rough[n] - exact[n]);
      }
      ours = std::fmax(ours, size > 0 ? std::sqrt(error / size) : std::sqrt(error));
      theirs = std::fmax(theirs, size > 0 ? std::sqrt(other / size) : std::sqrt(other));
      CHECK(residual[b] >= 0 && residual[b] < 1e-6f);
      for (int64_t i = m; i < m + 3; ++i) CHECK(z[b * (m + 3) + i] == -77.0f);
    }
    if (!CHECK(ours <= 2 * theirs + 2 * 1.1920929e-07))
      std::printf("m %d, B %d, activation %d: error %.2e, plain %.2e\n", (int)m, (int)B, call.activation, ours, theirs);
  }
};

void shapes() {
  for (int64_t m : {1, 16, 17, 50, 100})
    for (int64_t B : {1, 5, 9}) {
      Case one(B, m, kTanh), wide(B, m, kTanh), strict(B, m, kTanh, true);
      one.run<1>();
      one.check_accuracy();
      wide.run<4>(2);  // in other blocks and another order: the same bits
      CHECK(one.z == wide.z && one.residual == wide.residual);
      strict.run<1>(3);
      strict.check_accuracy();
    }
}

void activations() {
  for (int32_t activation = 0; activation < kActivations; ++activation) {
    Case solve(9, 37, activation);
    solve.run<1>();
    solve.check_accuracy();
  }
}

void adjoints() {
  for (bool reversed : {false, true})
    for (bool by_columns : {false, true})
      for (bool strict : {false, true}) {
        Case adjoint(11, 70, kIdentity, strict, reversed, by_columns);
        adjoint.masked();
        adjoint.run<1>();
        adjoint.check_accuracy();
        Case forward(3, 35, kGelu, strict, reversed, by_columns);
        forward.run<4>();
        forward.check_accuracy();
      }
}

// Long sums: what three products of tf32 leave out and the tensor core cuts off must not add up.
void long_sums() {
  for (float scale : {0.9f, 3.0f}) {
    Case wide(2, 700, kTanh, true, false, false, scale);
    wide.run<1>();
    wide.check_accuracy();
  }
  Case drift(2, 500, kRelu, true);  // all of one sign: nothing cancels what is cut off
  for (float& w : drift.W) w = std::fabs(w);
  for (float& x : drift.c) x = std::fabs(x);
  drift.run<1>();
  drift.check_accuracy();
}

void ranges() {
  for (int exponent : {-100, 90}) {  // the same bits, times the power of two
    Case one(3, 20, kRelu), far(3, 20, kRelu);
    for (float& x : far.c) x = std::ldexp(x, exponent);
    one.run<1>();
    far.run<1>();
    for (int64_t i = 0; i < 3 * 23; ++i)
      if (i % 23 < 20) CHECK(std::fabs(far.z[i] - std::ldexp(one.z[i], exponent)) <= std::ldexp(1e-6f, exponent));
    for (int64_t b = 0; b < 3; ++b) CHECK(far.residual[b] < 1e-6f);
  }
  Case wide(2, 20, kElu);  // squares that float32 does not hold
  for (float& x : wide.c) x *= 1e25f;
  wide.run<1>();
  wide.check_accuracy();
  for (float size : {1e-3f, 1e-25f})
    for (bool masked : {false, true}) {  // units that relu or the mask ends say nothing of the scale
      Case off(3, 20, kRelu);
      if (masked) off.masked();
      for (float& x : off.c) x *= size;
      for (int64_t b = 0; b < 3; ++b)
        for (int64_t i = 0; i < 20; i += 3) {
          off.c[b * 23 + i] = masked ? 3e38f : -3e38f;
          if (masked) off.mask[b * 23 + i] = 0;
        }
      off.run<1>();
      if (size > 1e-10f || !masked) off.check_accuracy();
    }
  Case huge(2, 20, kIdentity, true);  // one that does not fit float32, beside one that does
  for (int64_t i = 0; i < 20; ++i) huge.c[i] = 3e38f;
  for (float& w : huge.W)
    if (w == w) w = 0.9f;
  huge.run<1>();
  CHECK(std::isinf(huge.residual[0]) && huge.residual[1] < 1e-5f);
  for (int64_t i = 0; i < 20; ++i) CHECK(std::isfinite(huge.z[i]));
}

void not_finite() {
  Case good(9, 20, kTanh), bad(9, 20, kTanh), adjoint(9, 20, kIdentity);
  adjoint.masked();
  for (Case* k : {&bad, &adjoint}) k->c[2 * 23 + 5] = NAN, k->c[7 * 23] = INFINITY;
  good.run<1>();
  bad.run<1>();
  adjoint.run<1>();
  for (int64_t b = 0; b < 9; ++b) {
    const bool is_bad = b == 2 || b == 7;
    CHECK(std::isnan(bad.residual[b]) == is_bad && std::isnan(adjoint.residual[b]) == is_bad);
    for (int64_t i = 0; i < 20; ++i) {
      CHECK(bad.z[b * 23 + i] == (is_bad ? 0.0f : good.z[b * 23 + i]));
      CHECK(std::isnan(adjoint.z[b * 23 + i]) == is_bad);
    }
  }
}

}  // namespace

int main() {
  shapes();
  activations();
  adjoints();
  long_sums();
  ranges();
  not_finite();
  return check_result();
}
