// Semi-smooth Newton for the samples that a solve left unsolved, globalised by pseudo-time: deq/solvers/newton.py on the device,
// one block a sample, one LU in double a step. Nothing is read back: the kernel looks at every status itself.
//
// A step solves (I / delta + I - D W) dz = act(W z + c) - z; delta grows as the residual falls. Of an adjoint u = d (A u + g) it
// is the one system (I - D A) u = D g. A sample is judged in float32, and only a smaller residual replaces what was found before.
#pragma once
#include "call.h"
#include "lu.h"

namespace deq {

constexpr int kRescueThreads = kLuWarps * kWarp;
constexpr int kNewtonSteps = 60;              // of a sample
constexpr double kRescueFlops = 5e10;         // of a block, were all steps needed: half a second at 100 GFLOP/s in double
constexpr int64_t kJacobianBytes = 64 << 20;  // of all blocks together, or one Jacobian

// deq/solvers/newton.py has measured these.
constexpr double kBriskDelta = 3.0, kBriskPower = 1.5, kPatientDelta = 1.0, kPatientPower = 0.75;  // first step, its growth
constexpr int kFirstShare = 3;
constexpr double kGrowth = 10, kShortest = 1e-2, kLongest = 1e14, kMissed = 0.1, kShort = 10;

DEQ_HD double newton_flops(int64_t width) {
  const double m = static_cast<double>(width);
  return kNewtonSteps * (2.0 / 3) * m * m * m;
}

// Samples that one block may take on, 0 where W is too wide for any.
DEQ_HD int64_t rescued_by_a_block(int64_t width) { return static_cast<int64_t>(kRescueFlops / newton_flops(width)); }

// An odd stride: neighbours in a column lie in different banks.
DEQ_HD int64_t jacobian_stride(int64_t width) { return width | 1; }
DEQ_HD int64_t jacobian_bytes(int64_t width) { return width * jacobian_stride(width) * static_cast<int64_t>(sizeof(double)); }

constexpr int kNewtonVectors = 8;

// Bytes of shared memory: the vectors, after which the Jacobian may find room.
DEQ_HD int64_t newton_vector_bytes(int64_t width) {
  return static_cast<int64_t>(sizeof(LuExchange)) + kNewtonVectors * width * static_cast<int64_t>(sizeof(double));
}
DEQ_HD bool jacobian_is_shared(int64_t width, int64_t most) { return newton_vector_bytes(width) + jacobian_bytes(width) <= most; }

// Arguments of the kernel, those of the solve before it. `jacobians` holds one for every block, null where it is in shared
// memory.
struct Rescue {
  Call call;
  int64_t weights;
  double tol;
  int64_t max_iter;
  double* jacobians;
};

template <class Gpu>
class NewtonRescue {
 public:
  DEQ_GPU NewtonRescue(const Rescue& rescue, char* shared)
      : rescue_(rescue),
        call_(rescue.call),
        m_(rescue.call.width),
        exchange_(*reinterpret_cast<LuExchange*>(shared)),
        lane_(Gpu::thread() % kWarp) {
    double* vectors = reinterpret_cast<double*>(shared + sizeof(LuExchange));
    for (double** v : {&z_, &F_, &d_, &x_, &trial_, &G_, &slope_}) *v = vectors, vectors += m_;
    image_ = reinterpret_cast<float*>(vectors);
    jacobian_ = rescue.jacobians ? rescue.jacobians + Gpu::block() * m_ * jacobian_stride(m_) : vectors + m_;
  }

  // Block i looks after every sample i, i + blocks, ...
  DEQ_GPU void run() {
    const int64_t samples = rescue_.weights * call_.batch, blocks = Gpu::blocks();
    int64_t left = rescued_by_a_block(m_);
    for (int64_t first = Gpu::block(); first < samples; first += Gpu::threads() * blocks) {
      const int64_t own = first + Gpu::thread() * blocks;
      if (block_sum<Gpu>(own < samples && steps_for(own) > 0, exchange_) == 0) continue;  // nearly always
      for (int64_t index = first; index < samples && index < first + Gpu::threads() * blocks && left > 0; index += blocks)
        if (const int steps = steps_for(index)) rescue(index, steps), --left;
    }
  }

 private:
  // That a sample may still take; none if it needs none.
  DEQ_GPU int steps_for(int64_t index) const {
    const uint8_t status = call_.status[index];
    if (status == DEQ_CONVERGED || status == DEQ_NONFINITE) return 0;
    const int64_t left = rescue_.max_iter - call_.iterations[index];
    return static_cast<int>(left < 0 ? 0 : left < kNewtonSteps ? left : kNewtonSteps);
  }

  DEQ_GPU void rescue(int64_t index, int steps) {
    begin(index);
    if (call_.mask.data) {
      solve_masked();
    } else {
      march(steps);
    }
    Gpu::sync();
    if (Gpu::thread() == 0) {
      call_.iterations[index] += taken_;
      call_.residual[index] = best_;
      if (improved_ && static_cast<double>(best_) <= rescue_.tol) call_.status[index] = DEQ_CONVERGED;
    }
    Gpu::sync();
  }

  DEQ_GPU void begin(int64_t index) {
    weight_ = index / call_.batch, sample_ = index % call_.batch;
    W_ = call_.W + weight_ * call_.matrix_stride;
    c_ = row_of(call_.injection, weight_, sample_);
    out_ = row_of(call_.out, weight_, sample_);
    best_ = call_.residual[index];
    improved_ = false;
    taken_ = 0;
  }

  DEQ_GPU double limit() const { return rescue_.tol < 1 ? pow(rescue_.tol, 1 + kMarginPower) : rescue_.tol; }
  DEQ_GPU bool is_done() const { return improved_ && static_cast<double>(best_) <= limit(); }
  DEQ_GPU double injection(int64_t i) const { return c_[i * call_.injection.stride[2]]; }

  template <class T, class Work>
  DEQ_GPU void with_act(const Work& work) const {
    with_activation<ScalarMath<T>>(call_.activation, work);
  }

  // Briskly from what the solve found, then patiently from act(c).
  DEQ_GPU void march(int steps) {
    const int first = (steps + kFirstShare - 1) / kFirstShare;
    for (int pace = 0; pace < 2 && !is_done(); ++pace) {
      for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) {
        double start = out_[i];
        if (pace > 0) with_act<double>([&](auto act) { start = decltype(act)::value(injection(i)); });
        trial_[i] = start;
      }
      Gpu::sync();
      double size = evaluate(), delta = pace == 0 ? kBriskDelta : kPatientDelta;
      accept();
      judge();
      for (int step = pace == 0 ? 0 : first; step < (pace == 0 ? first : steps) && !is_done(); ++step) {
        assemble(1 + 1 / delta);
        ++taken_;
        Lu<Gpu> lu(jacobian_, m_, jacobian_stride(m_), exchange_);
        double after = INFINITY, missed = INFINITY;
        if (lu.solve(x_)) {
          for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) trial_[i] = z_[i] - x_[i];
          Gpu::sync();
          after = evaluate();
          missed = missed_by_linear(delta);
        }
        double growth = 1 / kGrowth;  // a singular system takes no step, but a shorter one next time
        if (after < INFINITY) {
          accept();
          judge();
          growth = after > 0 ? pow(size / after, pace == 0 ? kBriskPower : kPatientPower) : kGrowth;
          if (missed < kMissed * size) growth = fmax(growth, fmin(sqrt(kMissed * size / missed), kShort / delta));
          growth = growth < 1 / kGrowth ? 1 / kGrowth : growth > kGrowth ? kGrowth : growth;
          size = after;
        }
        delta *= growth;
        delta = delta < kShortest ? kShortest : delta > kLongest ? kLongest : delta;
      }
    }
  }

  DEQ_GPU void solve_masked() {
    const float* mask = row_of(call_.mask, weight_, sample_);
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) {
      const float given = mask[i * call_.mask.stride[2]];
      d_[i] = call_.mask_is_value ? derivative_of_value<ScalarMath<float>>(call_.activation, given) : given;
      F_[i] = d_[i] * injection(i);
    }
    Gpu::sync();
    assemble(1);
    ++taken_;
    Lu<Gpu> lu(jacobian_, m_, jacobian_stride(m_), exchange_);
    if (!lu.solve(x_)) return;
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) trial_[i] = x_[i];
    Gpu::sync();
    if (evaluate() < INFINITY) judge();
  }

  // The trial point becomes the iterate.
  DEQ_GPU void accept() const {
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) z_[i] = trial_[i], F_[i] = G_[i], d_[i] = slope_[i];
    Gpu::sync();
  }

  // The Jacobian with this number added to the diagonal of -D W, and its right side.
  DEQ_GPU void assemble(double diagonal) const {
    for (int64_t i = Gpu::thread() / kWarp; i < m_; i += Gpu::threads() / kWarp) {
      double* row = jacobian_ + i * jacobian_stride(m_);
      for (int64_t j = lane_; j < m_; j += kWarp)
        row[j] = (i == j ? diagonal : 0.0) - d_[i] * static_cast<double>(W_[i * call_.row_stride + j]);
      if (lane_ == 0) x_[i] = F_[i];
    }
    Gpu::sync();
  }

  // Of the trial point: G = trial - act(W trial + c) and act', in double, and its image in float32; the norm of G.
  DEQ_GPU double evaluate() {
    for (int64_t i = Gpu::thread() / kWarp; i < m_; i += Gpu::threads() / kWarp) {
      const float* w = W_ + i * call_.row_stride;
      double wide = 0;
      float narrow = 0;
      for (int64_t k = lane_; k < m_; k += kWarp) {
        wide += static_cast<double>(w[k]) * trial_[k];
        narrow = fmaf(w[k], static_cast<float>(trial_[k]), narrow);
      }
      DEQ_UNROLL for (int mask = 1; mask < kWarp; mask *= 2) {
        wide += Gpu::shuffle_xor(wide, mask);
        narrow += Gpu::shuffle_xor(narrow, mask);
      }
      if (lane_ != 0) continue;
      wide += injection(i);
      narrow += static_cast<float>(injection(i));
      if (call_.mask.data) {
        G_[i] = trial_[i] - d_[i] * wide;
        image_[i] = static_cast<float>(d_[i]) * narrow;
      } else {
        with_act<double>([&](auto act) {
          G_[i] = trial_[i] - decltype(act)::value(wide);
          slope_[i] = decltype(act)::derivative(wide);
        });
        with_act<float>([&](auto act) { image_[i] = decltype(act)::value(narrow); });
      }
    }
    Gpu::sync();
    double sum = 0;
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) sum += G_[i] * G_[i];
    return sqrt(block_sum<Gpu>(sum, exchange_));
  }

  // What the step -x of this length, linear, has missed of the G at its end.
  DEQ_GPU double missed_by_linear(double delta) const {
    double sum = 0;
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) sum += (G_[i] - x_[i] / delta) * (G_[i] - x_[i] / delta);
    return sqrt(block_sum<Gpu>(sum, exchange_));
  }

  // The residual of the trial point in float32; its image is kept if none was better.
  DEQ_GPU void judge() {
    double step = 0, size = 0;
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) {
      const double f = image_[i], moved = f - static_cast<double>(static_cast<float>(trial_[i]));
      step += moved * moved, size += f * f;
    }
    step = block_sum<Gpu>(step, exchange_), size = block_sum<Gpu>(size, exchange_);
    const float residual = static_cast<float>(step == 0 ? 0.0 : sqrt(step / size));  // NaN beyond the range
    if (!(residual < best_)) return;                                                 // nor one that is NaN
    best_ = residual, improved_ = true;
    for (int64_t i = Gpu::thread(); i < m_; i += Gpu::threads()) out_[i] = image_[i];
    Gpu::sync();
  }

  const Rescue& rescue_;
  const Call& call_;
  const int64_t m_;
  LuExchange& exchange_;
  const int lane_;
  double *z_, *F_, *d_;               // the iterate, z - f(z) and act' there
  double *x_, *trial_, *G_, *slope_;  // its step, and the same of the next one
  float* image_;
  double* jacobian_;
  int64_t weight_ = 0, sample_ = 0;
  const float *W_ = nullptr, *c_ = nullptr;
  float* out_ = nullptr;
  float best_ = 0;  // the smallest residual, that of the solve to begin with
  bool improved_ = false;
  int32_t taken_ = 0;
};

}  // namespace deq
