// The lane engine's front door (lanes.cpp).
#pragma once
#include <stdint.h>

#include "../kernels.h"

namespace deq {

// Widths up to which lanes are faster than rows: by width and map alone, so that an answer does not depend on the batch.
constexpr int64_t kLanesUpTo = 64, kLanesUpToSparse = 64;

bool lanes_serve(const DeqProblem& problem);
int32_t lane_solve(const DeqProblem& problem);

}  // namespace deq
