// Leaving out the products with zeros, step after step: whether it pays, and who finds the zeros.
#pragma once
#include <stdint.h>

#include "kernels.h"
#include "team.h"

namespace deq {

// Products with zeros are left out where less than this share of the rows' elements is not zero. Zen 4, float32: at half zeros
// 1.4 x the dense tiles from m = 128 to 1024, even at 0.72 (at 0.6 for 2048 x 16).
constexpr double kSkipBelow = 0.65;

// Of the steps of one tile of samples.
template <class T>
class Zeros {
 public:
  // How n rows are computed; `may`: without the zeros, if they are enough. Where they were left out the last time, they are
  // again, and counted on the way.
  auto choose(const Kernels<T>& k, const Step<T>& step, int n, bool may, const Team& team) {
    all_ = nonzeros_ = n * step.width;
    found_ = 0;
    may_ = may;
    finds_ = may && skipped_ && step.width <= kFindWidth && team.members() == 1;
    if (may && !finds_) nonzeros_ = k.find_nonzeros(step, n);
    skips_ = finds_ || are_few();
    return skips_ ? k.skip_step : k.step;
  }

  // Step::found of a piece of that step; pieces come in order where zeros are found on the way.
  int64_t* found(int piece) { return finds_ && piece == 0 ? &found_ : nullptr; }

  // After the step: the elements of rows that were multiplied.
  int64_t finish() {
    if (finds_) nonzeros_ = found_;
    if (may_) skipped_ = skips_ && are_few();
    return skips_ ? nonzeros_ : all_;
  }

  // Whether the last step that might leave them out did, and was right to.
  bool skipped() const { return skipped_; }

 private:
  bool are_few() const { return static_cast<double>(nonzeros_) < kSkipBelow * static_cast<double>(all_); }

  int64_t all_ = 0, nonzeros_ = 0, found_ = 0;
  bool may_ = false, finds_ = false, skips_ = false, skipped_ = false;
};

}  // namespace deq
