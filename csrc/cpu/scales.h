// The scale of the increments of the delta engine: a step stores an increment while it is being computed, and so its scale is a
// guess. Increments are expected to shrink like the last one, with some allowance; a wrong guess costs digits, or elements are
// cut off and what was cut is in the next increment, never lost.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "delta.h"

namespace deq {

class Scales {
 public:
  explicit Scales(int64_t width)
      // The products of 2^shift units and those of one, at most 127 x 127 each, fit an int32.
      : most_shift_(exponent_of(0x1p31 / (127.0 * 127.0 * static_cast<double>(width)) - 1)) {}

  // Of the increment from a point whose largest change is known.
  static void set_known(DeltaRow& row) { row.set_next_scale(row.largest / 127.0); }

  // Of the first of some sweeps, in which later stages change more than that point shows.
  static void set_first_of_sweeps(DeltaRow& row) { row.set_next_scale(kHeadroom / 127 * row.largest); }

  // The increment just written becomes that of the step before, and the scale of the one after it is set, given the square of the
  // last ratio of their norms; in a sweep it is a power of two times this one, so that a sum of products can go from one to the
  // other.
  void expect(DeltaRow& row, double ratio2, bool sweeps) const {
    std::swap(row.increment, row.next);
    const double ratio = std::sqrt(static_cast<float>(ratio2));
    const double cut = row.largest - 127.0 * row.next_scale, expected = std::clamp(ratio, kLeastRatio, kMostRatio);
    double scale = kHeadroom / 127 * std::max(row.largest * expected, cut);
    row.scale = row.next_scale;
    if (sweeps) {
      row.shift = std::clamp(exponent_of(row.scale / scale), -kMostGrowth, most_shift_);
      scale = row.scale * power_of_two(-row.shift);
    }
    row.set_next_scale(scale);
  }

 private:
  static constexpr double kHeadroom = 1.3, kLeastRatio = 0.1, kMostRatio = 4;
  static constexpr int kMostGrowth = 3;  // of a scale in one step, as a power of two

  // floor(log2(x)) of a normal number, some large number of infinity and NaN, some small one of zero; a tenth of the time of
  // ilogb.
  static int exponent_of(double x) {
    int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return static_cast<int>(bits >> 52 & 2047) - 1023;
  }

  static double power_of_two(int exponent) {
    const int64_t bits = static_cast<int64_t>(exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }

  const int most_shift_;
};

}  // namespace deq
