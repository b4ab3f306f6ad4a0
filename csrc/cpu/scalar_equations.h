// What solvers of weights of known structure share: the constants of a diagonal's scalar equations, memory, residuals.
#pragma once
#include <stdlib.h>

#include <cmath>
#include <limits>

#include "../activations.h"
#include "../scalar_root.h"
#include "../structured.h"
#include "cache.h"
#include "convert.h"
#include "structured_kernels.h"

namespace deq {

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

}  // namespace deq
