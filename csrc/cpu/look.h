// A cheap look at W, which tells a solve that its plan is not for this weight.
#pragma once
#include <algorithm>

#include "../kernels.h"
#include "convert.h"
#include "kernels.h"
#include "norms.h"

namespace deq {

// Whether the rows of W, those of all matrices together, have a root mean square norm above `limit`: the root mean square
// singular value ||W||_F / sqrt(m), as far as some rows, evenly spread, tell it. Enough of them are looked at to tell the size of
// a W; 0.2 to 1 us. Never true where it meets NaN.
inline bool is_larger(const DeqProblem& p, double limit) {
  constexpr int64_t kElements = 4096, kLeastRows = 8;
  const int64_t m = p.width, wanted = std::max(kLeastRows, kElements / m), every = std::max<int64_t>(1, m / wanted);
  const bool plain = p.type == DEQ_FLOAT32 && p.W.stride[2] == 1;
  const Kernels<float>& k = kernels<float>();
  const int64_t whole = m / k.lanes * k.lanes;
  double sum = 0;
  int64_t rows = 0;
  for (int64_t s = 0; s < p.weights; ++s)
    for (int64_t i = 0; i < m; i += every, ++rows) {
      const int64_t first = s * p.W.stride[0] + i * p.W.stride[1];
      if (plain) {
        const float* row = static_cast<const float*>(p.W.data) + first;
        double size2;
        k.dots(row, &row, 1, whole, &size2);
        sum += size2 + size_of(row + whole, m - whole);
      } else {
        for (int64_t j = 0; j < m; ++j) {
          const double w = element(p.W.data, p.type, first + j * p.W.stride[2]);
          sum += w * w;
        }
      }
    }
  return sum > limit * limit * static_cast<double>(rows);
}

}  // namespace deq
