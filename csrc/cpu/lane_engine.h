// The lane engine's front door (lanes.cpp).
#pragma once
#include <stdint.h>

#include "../kernels.h"

namespace deq {

// Widths up to so many vectors are served by lanes, whatever the batch: an answer must not depend on that. Zen 4, float32, B =
// 256, AVX-512 (16 lanes), speed of the row engine = 1, plain / accelerated relu / tanh: m = 8: 1.7 / 2.1 / 1.5, 16: 1.4 / 3.4 /
// 1.1, 24: 1.3 / 3.4 / 1.2, 32: 1.0 / 2.7 / 1.0, 48: 1.1 / 2.5 / 1.0. At 64 they still gain 2.0 where most samples are
// accelerated, but relu without acceleration takes 1.3 times as long, because rows skip the products with zeros. Shorter vectors
// come to that earlier (plain relu, AVX2, 8 lanes: m = 16: 1.2, 32: 0.86, 48: 0.71; portable: 1.03, 0.77, 0.66).
constexpr int64_t kLaneVectors = 3;

bool lanes_serve(const DeqProblem& problem);
int32_t lane_solve(const DeqProblem& problem);

}  // namespace deq
