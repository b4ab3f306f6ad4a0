// Substitution for triangular weights and closed forms for diagonal ones: one pass over the outputs, samples in parallel.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "norms.h"
#include "scalar_equations.h"

namespace deq {
namespace {

// A power of two that takes `magnitude` near 1, or 1 if it is not far from there.
template <class T>
T to_unit(T magnitude) {
  constexpr T kNear = static_cast<T>(1 << 20);
  if (!(magnitude > 0) || !(magnitude <= std::numeric_limits<T>::max()) || (magnitude < kNear && magnitude > 1 / kNear)) return 1;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;
  return static_cast<T>(std::ldexp(1.0, std::clamp(-std::ilogb(magnitude), -kLimit, kLimit)));
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
      scale[b] = scale_of(x + b, masked ? lanes.mask + b : nullptr, samples, &largest[b]);
      unit[b] = to_unit(largest[b] * scale[b]);
    }
    // A second pass only for squares that left the range of T because the solution is far larger or smaller than the injection.
    for (int pass = 0; pass < 2; ++pass) {
      if (pass > 0) {
        k_.load(row<T>(p_.injection, first), p_.injection.stride[1], n, m_, p_.reversed, samples, x, largest);
        for (int b = 0; b < n; ++b) scale_of(x + b, masked ? lanes.mask + b : nullptr, samples, &largest[b]);
      }
      for (int b = 0; b < n; ++b)
        if (!std::isfinite(largest[b]))
          for (int64_t k = 0; k < m_; ++k) x[k * samples + b] = T(0);
      if (std::any_of(scale, scale + n, [](T s) { return s != 1; })) k_.scale(x, scale, m_, samples, reach);
      k_.substitute(lanes);
      if (std::all_of(sums + samples, sums + samples + n, [](T s) { return squares_in_range<T>(s); })) break;
      std::fill(reach, reach + samples, T(1));
      k_.scale(x, reach, m_, samples, reach);
      bool again = false;
      for (int b = 0; b < n; ++b)
        if (!squares_in_range<T>(sums[samples + b]) && to_unit(reach[b]) != unit[b]) unit[b] = to_unit(reach[b]), again = true;
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

  // The power of two to multiply a sample by. Where relu or the mask ends the injection it may be of any size, beside which the
  // values would be lost: `largest` becomes theirs, and what the mask ends is left out.
  T scale_of(T* x, const T* mask, int64_t stride, T* largest) const {
    const T injection = *largest, scale = is_rescaled() ? to_unit(injection) : T(1);
    if (scale == 1 || !(mask || p_.activation == kRelu)) return scale;
    *largest = largest_of_influence(x, mask, m_, stride);
    return mask ? to_unit(*largest) : static_cast<T>(std::min<double>(to_unit(*largest), most_scale(injection)));
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
    if (!squares_in_range<T>(size2)) {  // in the unit of the solution, which may be far larger or smaller than the injection
      T reach = 0;
      for (int64_t j = 0; j < m_; ++j) reach = std::max(reach, std::fabs(z[j]));
      if (reach > 0 && to_unit(reach) != solve.unit) {
        solve.unit = to_unit(reach);
        k_.diagonal(solve, &step2, &size2);
      }
    }
    r = residual<T>(step2, size2);
    if (!k.copy_out(z, T(1), m_, out)) {
      hold_in_range(out, 1);
      r = std::numeric_limits<T>::infinity();
    }
    if (derivative) k.copy_out(derivative, T(1), m_, row<T>(p_.derivative, b));
  }

  const DeqSubstitution& p_;
  const StructuredKernels<T>& k_ = structured_kernels<T>();
  const int64_t m_;
  Scalars<T> scalars_{};
  std::atomic<int32_t> error_{DEQ_OK};
};

template <class T>
void pack_triangle(const DeqView& matrix, int64_t m, bool strict, bool reversed, int threads, T* packed, T* diagonal) {
  const StructuredKernels<T>& k = structured_kernels<T>();
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
