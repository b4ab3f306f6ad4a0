// Substitution for triangular weights and closed forms for diagonal ones: one pass over the outputs, samples in parallel.
#include "triangular.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../activations.h"
#include "../scalar_root.h"
#include "../structured.h"
#include "cache.h"
#include "kernels.h"

namespace deq {
namespace {

constexpr int kMaxSamples = 32;

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(allocate(bytes)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(data_); }
  void* get() const { return data_; }

 private:
  void* data_;
};

// What the scalar equations of a diagonal need; `activation` is -1 for a masked problem, which needs the diagonal alone.
template <class T>
class ScalarEquations {
 public:
  ScalarEquations(const void* diagonal, int64_t m, int32_t activation)
      : padded_((m + 63) / 64 * 64), memory_(3 * padded_ * static_cast<int64_t>(sizeof(T))) {
    T* d = static_cast<T*>(memory_.get());
    if (!d) {
      error_ = DEQ_NO_MEMORY;
      return;
    }
    T *inverse = d + padded_, *other = d + 2 * padded_;
    scalars_ = {d, inverse, other};
    for (int64_t j = 0; j < padded_; ++j) {
      d[j] = j < m ? static_cast<const T*>(diagonal)[j] : T(0);
      if (activation < 0) continue;
      const double least = activation == kIdentity ? std::fabs(1 - d[j]) : least_slope(activation, d[j]);
      if (!(least > 0)) error_ = DEQ_BAD_ARGUMENT;
      inverse[j] = 1 / (1 - d[j]);
      other[j] = activation == kLeakyRelu ? static_cast<T>(1 / (1 - 0.01 * d[j])) : static_cast<T>(least);
    }
  }
  // DEQ_BAD_ARGUMENT where an equation has no unique root.
  int32_t error() const { return error_; }
  const Scalars<T>& scalars() const { return scalars_; }

 private:
  const int64_t padded_;
  Memory memory_;
  Scalars<T> scalars_{};
  int32_t error_ = DEQ_OK;
};

// A power of two that takes `magnitude` near 1, or 1 if it is not far from there.
template <class T>
T to_unit(T magnitude) {
  constexpr T kNear = static_cast<T>(1 << 20);
  if (!(magnitude > 0) || !(magnitude <= std::numeric_limits<T>::max()) || (magnitude < kNear && magnitude > 1 / kNear)) return 1;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;
  return static_cast<T>(std::ldexp(1.0, std::clamp(-std::ilogb(magnitude), -kLimit, kLimit)));
}

// ||f(z) - z|| / ||f(z)|| from squares, infinity if they left the range.
template <class T>
T residual(double step2, double size2) {
  if (!(step2 < INFINITY) || !(size2 < INFINITY)) return std::numeric_limits<T>::infinity();
  return static_cast<T>(step2 > 0 ? std::sqrt(step2 / size2) : 0.0);
}

template <class T>
T* row(const DeqView& view, int64_t b) {
  return static_cast<T*>(view.data) + b * view.stride[1];
}

template <class T>
class Substitution {
 public:
  explicit Substitution(const DeqSubstitution& p) : p_(p), m_(p.width) {}

  int32_t run() {
    const ScalarEquations<T> equations(p_.diagonal, m_, p_.mask.data ? -1 : p_.activation);
    if (const int32_t error = equations.error()) return error;
    scalars_ = equations.scalars();
    const int threads = 1.0 * p_.batch * m_ * (p_.packed ? m_ : 16) < 1e6 ? 1 : std::max(p_.threads, 1);
    if (!p_.packed && !p_.mask.data) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
      for (int64_t b = 0; b < p_.batch; ++b) solve_row(b);
    } else {
      const int64_t samples = p_.batch > static_cast<int64_t>(threads) * k_.lanes ? k_.samples : k_.lanes;
      const int64_t tiles = (p_.batch + samples - 1) / samples;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
      for (int64_t i = 0; i < tiles; ++i)
        solve_tile(i * samples, static_cast<int>(std::min(samples, p_.batch - i * samples)), static_cast<int>(samples));
    }
    return error_;
  }

 private:
  // Linear in the injection up to a positive factor: rescaling by a power of two changes no bit but keeps the range.
  bool is_rescaled() const { return p_.mask.data || is_homogeneous(p_.activation); }

  static bool in_range(double sum) { return sizeof(T) == 4 ? sum > 1e-20 && sum < 1e30 : sum > 1e-120 && sum < 1e120; }

  void solve_tile(int64_t first, int n, int samples) {
    const int64_t rows = triangle_panels(m_) * kPanel, per_part = rows * samples;
    const bool masked = p_.mask.data, derives = p_.derivative.data && !masked;
    Memory memory((per_part * (masked || derives ? 2 : 1)) * static_cast<int64_t>(sizeof(T)));
    if (!memory.get()) {
      error_ = DEQ_NO_MEMORY;
      return;
    }
    alignas(64) T sums[2 * kMaxSamples], unit[kMaxSamples], scale[kMaxSamples], largest[kMaxSamples], reach[kMaxSamples];
    T* x = static_cast<T*>(memory.get());
    Lanes<T> lanes{x,
                   masked || derives ? x + per_part : nullptr,
                   sums,
                   unit,
                   static_cast<const T*>(p_.packed),
                   scalars_,
                   m_,
                   samples,
                   p_.activation,
                   derives};
    if (masked) {
      k_.load(row<T>(p_.mask, first), p_.mask.stride[1], n, m_, p_.reversed, samples, lanes.mask, nullptr);
      if (p_.activation >= 0) kernels<T>().derivative_of_value(p_.activation, lanes.mask, per_part);
    }
    k_.load(row<T>(p_.injection, first), p_.injection.stride[1], n, m_, p_.reversed, samples, x, largest);
    for (int b = 0; b < samples; ++b) {
      scale[b] = is_rescaled() ? to_unit(largest[b]) : T(1);
      unit[b] = to_unit(largest[b] * scale[b]);
    }
    // A second pass only for squares that left the range of T because the solution is far larger or smaller than the injection.
    for (int pass = 0; pass < 2; ++pass) {
      if (pass > 0) k_.load(row<T>(p_.injection, first), p_.injection.stride[1], n, m_, p_.reversed, samples, x, largest);
      for (int b = 0; b < n; ++b)
        if (!std::isfinite(largest[b]))
          for (int64_t k = 0; k < m_; ++k) x[k * samples + b] = T(0);
      if (std::any_of(scale, scale + n, [](T s) { return s != 1; })) k_.scale(x, scale, m_, samples, reach);
      k_.substitute(lanes);
      if (std::all_of(sums + samples, sums + samples + n, [](T s) { return in_range(s) || s == 0; })) break;
      std::fill(reach, reach + samples, T(1));
      k_.scale(x, reach, m_, samples, reach);
      bool again = false;
      for (int b = 0; b < n; ++b)
        if (!in_range(sums[samples + b]) && to_unit(reach[b]) != unit[b]) unit[b] = to_unit(reach[b]), again = true;
      if (!again) break;
    }
    for (int b = 0; b < samples; ++b) reach[b] = 1 / scale[b];
    alignas(64) T end[kMaxSamples];
    k_.scale(x, reach, m_, samples, end);
    for (int b = 0; b < n; ++b) {
      T r = residual<T>(sums[b], sums[samples + b]);
      if (!std::isfinite(end[b])) {
        r = std::numeric_limits<T>::infinity();
        hold_in_range(x + b, samples);
      }
      if (!std::isfinite(largest[b])) {
        r = std::numeric_limits<T>::quiet_NaN();
        if (masked)
          for (int64_t k = 0; k < m_; ++k) x[k * samples + b] = r;  // NaN in, NaN out: a loss scaler looks for it
      }
      static_cast<T*>(p_.residual)[first + b] = r;
    }
    k_.store(x, n, m_, p_.reversed, samples, row<T>(p_.out, first), p_.out.stride[1]);
    if (derives) k_.store(lanes.mask, n, m_, p_.reversed, samples, row<T>(p_.derivative, first), p_.derivative.stride[1]);
  }

  void hold_in_range(T* x, int64_t stride) const {
    constexpr T kLargest = std::numeric_limits<T>::max();
    for (int64_t k = 0; k < m_; ++k) {
      T& value = x[k * stride];
      value = std::isnan(value) ? T(0) : std::clamp(value, -kLargest, kLargest);
    }
  }

  void solve_row(int64_t b) {
    const int64_t padded = (m_ + k_.lanes - 1) / k_.lanes * k_.lanes;
    Memory memory(3 * padded * static_cast<int64_t>(sizeof(T)));
    if (!memory.get()) {
      error_ = DEQ_NO_MEMORY;
      return;
    }
    T *x = static_cast<T*>(memory.get()), *z = x + padded, *derivative = p_.derivative.data ? z + padded : nullptr;
    const Kernels<T>& k = kernels<T>();
    const T largest = k.copy_in(row<T>(p_.injection, b), m_, padded, x);
    T* out = row<T>(p_.out, b);
    T& r = static_cast<T*>(p_.residual)[b];
    if (!std::isfinite(largest)) {
      std::fill(out, out + m_, T(0));
      if (derivative) std::fill_n(row<T>(p_.derivative, b), m_, T(0));
      r = std::numeric_limits<T>::quiet_NaN();
      return;
    }
    double step2, size2;
    Row<T> solve{x, z, derivative, scalars_, m_, p_.activation, to_unit(largest)};
    k_.diagonal(solve, &step2, &size2);
    if (!in_range(size2) && size2 != 0) {
      T reach = 0;
      for (int64_t j = 0; j < m_; ++j) reach = std::max(reach, std::fabs(z[j]));
      solve.unit = to_unit(reach);
      k_.diagonal(solve, &step2, &size2);
    }
    r = residual<T>(step2, size2);
    if (!k.copy_out(z, T(1), m_, out)) {
      hold_in_range(out, 1);
      r = std::numeric_limits<T>::infinity();
    }
    if (derivative) k.copy_out(derivative, T(1), m_, row<T>(p_.derivative, b));
  }

  const DeqSubstitution& p_;
  const TriangularKernels<T>& k_ = triangular_kernels<T>();
  const int64_t m_;
  Scalars<T> scalars_{};
  std::atomic<int32_t> error_{DEQ_OK};
};

template <class T>
int32_t reduced(const DeqReduced& p) {
  constexpr int64_t kBlock = 64;  // outputs at a time: a tile of them stays in L1
  const TriangularKernels<T>& k = triangular_kernels<T>();
  const ScalarEquations<T> equations(p.diagonal, p.width, p.mask.data ? -1 : p.activation);
  if (equations.error()) return equations.error();
  const Scalars<T>& scalars = equations.scalars();
  const int threads = 4.0 * p.batch * p.width * p.rank < 1e6 ? 1 : std::max(p.threads, 1);
  const int64_t samples = p.batch > static_cast<int64_t>(threads) * k.lanes ? k.samples : k.lanes;
  const int64_t tiles = (p.batch + samples - 1) / samples, padded_rank = triangle_panels(p.rank) * kPanel;
  std::atomic<int32_t> error{DEQ_OK};
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * samples;
    const int n = static_cast<int>(std::min(samples, p.batch - first));
    Memory memory((3 * kBlock + 2 * padded_rank) * samples * static_cast<int64_t>(sizeof(T)));
    T* x = static_cast<T*>(memory.get());
    if (!x) {
      error = DEQ_NO_MEMORY;
      continue;
    }
    alignas(64) T sums[2 * kMaxSamples] = {};
    T *mask = x + kBlock * samples, *out = mask + kBlock * samples, *q = out + kBlock * samples,
      *following = q + padded_rank * samples;
    const bool is_last = p.out.data;
    k.load(row<T>(p.q, first), p.q.stride[1], n, p.rank, false, static_cast<int>(samples), q, nullptr);
    if (is_last)
      k.load(row<T>(p.following, first), p.following.stride[1], n, p.rank, false, static_cast<int>(samples), following, nullptr);
    else
      std::fill(following, following + padded_rank * samples, T(0));
    for (int64_t j = 0; j < p.width; j += kBlock) {
      const int64_t outputs = std::min(kBlock, p.width - j);
      k.load(row<T>(p.injection, first) + j, p.injection.stride[1], n, outputs, false, static_cast<int>(samples), x, nullptr);
      if (p.mask.data)
        k.load(row<T>(p.mask, first) + j, p.mask.stride[1], n, outputs, false, static_cast<int>(samples), mask, nullptr);
      const Reduced<T> block{x,
                             p.mask.data ? mask : nullptr,
                             q,
                             following,
                             sums,
                             static_cast<const T*>(p.P) + j * p.rank,
                             static_cast<const T*>(p.Q) + j * p.rank,
                             Scalars<T>{scalars.d + j, scalars.inverse + j, scalars.other + j},
                             outputs,
                             p.rank,
                             static_cast<int>(samples),
                             p.activation};
      if (!is_last) {
        k.reduce(block);
        continue;
      }
      std::copy(x, x + triangle_panels(outputs) * kPanel * samples, out);
      k.last(Last<T>{block, out, sums});
      k.store(out, n, outputs, false, static_cast<int>(samples), row<T>(p.out, first) + j, p.out.stride[1]);
    }
    T* size = static_cast<T*>(p.size) + first;
    if (is_last) {
      for (int b = 0; b < n; ++b) size[b] = residual<T>(sums[b], sums[samples + b]);
      continue;
    }
    k.store(following, n, p.rank, false, static_cast<int>(samples), row<T>(p.following, first), p.following.stride[1]);
    for (int b = 0; b < n; ++b) size[b] = std::sqrt(sums[b]);
  }
  return error;
}

// d^T gram d of every sample, d = following - q.
template <class T>
void step_squares(const double* gram, const T* following, const T* q, int64_t rank, int64_t samples, double* squares) {
  std::fill(squares, squares + samples, 0.0);
  double row[kMaxSamples];
  for (int64_t i = 0; i < rank; ++i) {
    std::fill(row, row + samples, 0.0);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t b = 0; b < samples; ++b)
        row[b] += gram[i * rank + j] * static_cast<double>(following[j * samples + b] - q[j * samples + b]);
    for (int64_t b = 0; b < samples; ++b)
      squares[b] += row[b] * static_cast<double>(following[i * samples + b] - q[i * samples + b]);
  }
}

template <class T>
int32_t reduced_iterate(const DeqReducedIteration& iteration) {
  constexpr int64_t kBlock = 64;
  constexpr double kSlowAtTol = 0.8;
  const DeqReduced& p = iteration.problem;
  const TriangularKernels<T>& k = triangular_kernels<T>();
  const ScalarEquations<T> equations(p.diagonal, p.width, p.mask.data ? -1 : p.activation);
  if (equations.error()) return equations.error();
  const Scalars<T>& scalars = equations.scalars();
  const int threads = 4.0 * p.batch * p.width * p.rank < 1e6 ? 1 : std::max(p.threads, 1);
  const int64_t samples = p.batch > static_cast<int64_t>(threads) * k.lanes ? k.samples : k.lanes;
  const int64_t tiles = (p.batch + samples - 1) / samples, padded_rank = triangle_panels(p.rank) * kPanel;
  const int64_t padded_width = triangle_panels(p.width) * kPanel;
  const bool masked = p.mask.data;
  std::atomic<int32_t> error{DEQ_OK};
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * samples;
    const int n = static_cast<int>(std::min(samples, p.batch - first)), width = static_cast<int>(samples);
    Memory memory(((masked ? 2 : 1) * padded_width + kBlock + 2 * padded_rank) * samples * static_cast<int64_t>(sizeof(T)));
    T* x = static_cast<T*>(memory.get());
    if (!x) {
      error = DEQ_NO_MEMORY;
      continue;
    }
    T *q = x + kBlock * samples, *following = q + padded_rank * samples, *c = following + padded_rank * samples;
    T* mask = masked ? c + padded_width * samples : nullptr;
    k.load(row<T>(p.q, first), p.q.stride[1], n, p.rank, false, width, q, nullptr);
    k.load(row<T>(p.injection, first), p.injection.stride[1], n, p.width, false, width, c, nullptr);
    if (masked) k.load(row<T>(p.mask, first), p.mask.stride[1], n, p.width, false, width, mask, nullptr);
    T* residual = static_cast<T*>(p.size) + first;
    int32_t* iterations = iteration.iterations + first;
    alignas(64) T sums[kMaxSamples];
    double squares[kMaxSamples], before[2][kMaxSamples];
    bool settled[kMaxSamples] = {};
    std::fill(&before[0][0], &before[0][0] + 2 * kMaxSamples, INFINITY);
    int left = n;
    for (int32_t it = 1; it <= iteration.max_iter && left > 0; ++it) {
      std::fill(following, following + padded_rank * samples, T(0));
      std::fill(sums, sums + samples, T(0));
      for (int64_t j = 0; j < p.width; j += kBlock) {
        const int64_t outputs = std::min(kBlock, p.width - j), rows = triangle_panels(outputs) * kPanel;
        std::copy(c + j * samples, c + (j + rows) * samples, x);
        k.reduce(Reduced<T>{x, masked ? mask + j * samples : nullptr, q, following, sums, static_cast<const T*>(p.P) + j * p.rank,
                            static_cast<const T*>(p.Q) + j * p.rank,
                            Scalars<T>{scalars.d + j, scalars.inverse + j, scalars.other + j}, outputs, p.rank, width,
                            p.activation});
      }
      step_squares(iteration.gram, following, q, p.rank, samples, squares);
      for (int b = 0; b < n; ++b) {
        if (settled[b]) continue;
        const double step = std::sqrt(squares[b]), size = std::sqrt(static_cast<double>(sums[b]));
        const double r = step > 0 ? (size > step && size < INFINITY ? step / (size - step) : INFINITY) : step;
        const bool is_done = r <= iteration.leave || (r <= iteration.tol && r > kSlowAtTol * before[0][b]);
        const bool is_slow = it > 2 && r > iteration.slow * before[0][b] && before[0][b] > iteration.slow * before[1][b];
        residual[b] = std::isnan(r) ? std::numeric_limits<T>::infinity() : static_cast<T>(r);
        iterations[b] = it;
        before[1][b] = before[0][b], before[0][b] = r;
        if (is_done || is_slow || !std::isfinite(sums[b]) || it == iteration.max_iter) {
          settled[b] = true;
          --left;
        } else {
          for (int64_t j = 0; j < p.rank; ++j) q[j * samples + b] = following[j * samples + b];
        }
      }
    }
    k.store(q, n, p.rank, false, width, row<T>(p.q, first), p.q.stride[1]);
    k.store(following, n, p.rank, false, width, row<T>(p.following, first), p.following.stride[1]);
  }
  return error;
}

template <class T>
void pack_triangle(const DeqView& matrix, int64_t m, bool strict, bool reversed, int threads, T* packed, T* diagonal) {
  const TriangularKernels<T>& k = triangular_kernels<T>();
  int64_t row = matrix.stride[1], column = matrix.stride[2];
  const T* w = static_cast<const T*>(matrix.data);
  if (reversed) {  // element (i, j) is that of W at (m - 1 - j, m - 1 - i)
    w += (m - 1) * (row + column);
    std::swap(row, column);
    row = -row, column = -column;
  }
  const int64_t panels = triangle_panels(m);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && m >= 256)
  for (int64_t p = 0; p < panels; p += 8) k.pack(w, row, column, m, strict, packed, p, std::min(panels, p + 8));
  for (int64_t j = 0; j < m; ++j) diagonal[j] = strict ? T(0) : w[j * (row + column)];
}

}  // namespace
}  // namespace deq

int32_t deq_cpu_substitute(const DeqSubstitution* p) {
  const bool masked = p && p->mask.data;
  if (!p || p->batch < 0 || p->width < 1 || (p->type != DEQ_FLOAT32 && p->type != DEQ_FLOAT64) || !p->diagonal || !p->residual ||
      p->activation < (masked ? -1 : 0) || p->activation >= deq::kActivations ||
      (masked && p->activation >= 0 && !deq::has_of_value(p->activation)) || (masked && !p->packed))
    return DEQ_BAD_ARGUMENT;
  if (p->type == DEQ_FLOAT64) return deq::Substitution<double>(*p).run();
  return deq::Substitution<float>(*p).run();
}

namespace {
bool well_formed(const DeqReduced& p) {
  return p.batch >= 0 && p.width >= 1 && p.rank >= 1 && (p.type == DEQ_FLOAT32 || p.type == DEQ_FLOAT64) && p.P && p.Q &&
         p.diagonal && p.size && p.activation >= 0 && p.activation < deq::kActivations;
}
}  // namespace

int32_t deq_cpu_reduced(const DeqReduced* p) {
  if (!p || !well_formed(*p)) return DEQ_BAD_ARGUMENT;
  return p->type == DEQ_FLOAT64 ? deq::reduced<double>(*p) : deq::reduced<float>(*p);
}

int32_t deq_cpu_reduced_iterate(const DeqReducedIteration* p) {
  if (!p || !well_formed(p->problem) || !p->gram || !p->iterations || p->max_iter < 1) return DEQ_BAD_ARGUMENT;
  return p->problem.type == DEQ_FLOAT64 ? deq::reduced_iterate<double>(*p) : deq::reduced_iterate<float>(*p);
}

int64_t deq_cpu_triangle_elements(int64_t width) { return deq::triangle_elements(width); }

int32_t deq_cpu_pack_triangle(const DeqView* matrix, int64_t width, int32_t type, int32_t strict, int32_t reversed,
                              int32_t threads, void* packed, void* diagonal) {
  if (!matrix || width < 1 || !packed || !diagonal) return DEQ_BAD_ARGUMENT;
  if (type == DEQ_FLOAT64)
    deq::pack_triangle<double>(*matrix, width, strict, reversed, threads, static_cast<double*>(packed),
                               static_cast<double*>(diagonal));
  else if (type == DEQ_FLOAT32)
    deq::pack_triangle<float>(*matrix, width, strict, reversed, threads, static_cast<float*>(packed),
                              static_cast<float*>(diagonal));
  else
    return DEQ_BAD_ARGUMENT;
  return DEQ_OK;
}
