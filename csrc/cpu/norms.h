// Squared norms of samples, and what becomes of them where squares leave the range of the numbers.
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../judge.h"

namespace deq {

// Whether a sum of squares in T kept its digits, and that of steps of a relative 1e-7 with it. Else it is formed again: of
// float32 in double, whose range they cannot leave, or in another unit.
template <class T>
bool squares_in_range(double sum) {
  return sizeof(T) == 4 ? sum > 1e-20 && sum < 1e30 : sum > 1e-120 && sum < 1e120;
}

// The same of |f(y)|^2 and |f(y) - y|^2: an activation of bounded range brings back a y whose square is none of T.
template <class T>
bool squares_in_range(double size2, double step2) {
  return squares_in_range<T>(size2) && step2 < INFINITY;
}

template <class T>
double size_of(const T* y, int64_t m, double unit = 1) {
  double part[4] = {};  // one sum would wait for every addition
  auto add = [&](int i, T value) {
    const double scaled = static_cast<double>(value) * unit;
    part[i] += scaled * scaled;
  };
  int64_t j = 0;
  for (; j + 4 <= m; j += 4)
    for (int i = 0; i < 4; ++i) add(i, y[j + i]);
  for (; j < m; ++j) add(0, y[j]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <class T>
double distance(const T* f, const T* y, int64_t m, double unit = 1) {
  double sum = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double diff = static_cast<double>(f[j]) * unit - static_cast<double>(y[j]) * unit;
    sum += diff * diff;
  }
  return sum;
}

// The largest value that an injection of m elements, `stride` apart, makes where relu, or a mask if that is not null, may end
// elements of any size, beside which the values would be lost; what the mask ends becomes zero.
template <class T>
T largest_of_influence(T* x, const T* mask, int64_t m, int64_t stride) {
  T largest = 0;
  for (int64_t j = 0; j < m; ++j) {
    T& value = x[j * stride];
    if (mask && mask[j * stride] == 0) value = T(0);
    largest = std::max(largest, mask ? std::fabs(value) : value);
  }
  return largest;
}

// The largest power of two times which a magnitude stays finite, with a factor of two to spare.
template <class T>
double most_scale(T magnitude) {
  return std::ldexp(1.0, std::numeric_limits<T>::max_exponent - 2 - std::ilogb(magnitude));
}

// The power of two, as its exponent, times which steps of this squared length have products in the range of T: 0 where they have
// as they are. `unit`: what the square was taken in.
template <class T>
int exponent_of_steps(double step2, double unit) {
  if (unit == 1.0 && squares_in_range<T>(step2)) return 0;  // most; the functions below are 4 % of a small solve
  const int own = std::ilogb(unit);
  if (!(step2 > 0) || !std::isfinite(step2) || squares_in_range<T>(std::ldexp(step2, -2 * own))) return 0;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;
  return std::clamp(own - std::ilogb(step2) / 2, -kLimit, kLimit);
}

// What a sample's squares are taken in, and its record with them: 1, until squares of float64 leave its range where the sample
// itself is not rescaled, because the activation is not homogeneous.
class Unit {
 public:
  double value() const { return value_; }
  bool is_one() const { return value_ == 1; }

  // |f - y|^2 and |f|^2, of which the latter left the range of T or is in another unit; y null: it is zero.
  template <class T>
  void measure(Record& record, bool may_change, const T* f, const T* y, int64_t m, double* step2, double* size2) {
    *size2 = size_of(f, m, value_);
    if (sizeof(T) == 8 && may_change && !squares_in_range<T>(*size2)) {
      move(record, f, m);
      *size2 = size_of(f, m, value_);
    }
    *step2 = y ? distance(f, y, m, value_) : *size2;
    // Where both are finite their distance is, if not its square.
    if (*size2 < INFINITY) *step2 = std::min(*step2, std::numeric_limits<double>::max());
  }

 private:
  // To the unit of f.
  template <class T>
  void move(Record& record, const T* f, int64_t m) {
    double largest = 0;
    for (int64_t j = 0; j < m; ++j) largest = std::max(largest, std::fabs(static_cast<double>(f[j])));
    if (!(largest > 0) || !std::isfinite(largest)) return;
    constexpr int kLimit = std::numeric_limits<double>::max_exponent - 2;
    const double unit = std::ldexp(1.0, std::clamp(-std::ilogb(largest), -kLimit, kLimit));
    const int shift = 2 * (std::ilogb(unit) - std::ilogb(value_));
    for (double& step2 : record.step2) step2 = std::ldexp(step2, shift);
    record.limit2 = std::ldexp(record.limit2, shift);
    if (record.best_size2 > 0) {  // of the best only the ratio counts
      record.best_step2 /= record.best_size2;
      record.best_size2 = 1;
    }
    value_ = unit;
  }

  double value_ = 1;
};

}  // namespace deq
