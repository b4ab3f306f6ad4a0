// The order of the columns in a step of the delta engine: block Gauss-Seidel.
//
// A sweep takes the columns in stages, and every stage sees what the stages before it have made of theirs. Four stages need
// 0.65 to 0.8 times the steps of one for the families of bench/families.py, on the plain map and on the reflected one (a Gaussian
// W of norm 0.9 at any width from 128 on: 8.0 for 10.6; spectral radius 1, m = 256: 23 for 34; W of a trained network, reflected,
// where one in five samples failed: all), 32 stages hardly fewer than eight. For a Gaussian W that contracts by q in one stage,
// many stages contract by a with a^2 ln(a^2) / (a^2 - 1) = q^2, the spectral radius of the matrix with its two triangles weighted
// a and 1: 0.21 for 0.38. No map is certain to contract in stages because it does at once; anchors notice.
#pragma once
#include <stdint.h>

namespace deq {

struct Sweep {
  static constexpr int kStages = 4;
  // Whole tiles of every instruction set, and whole words of an increment.
  static constexpr int64_t kMultiple = 32;

  int stages;
  int64_t start[kStages + 1];  // stage i holds columns [start[i], start[i + 1])

  // Depends on the width alone, so that neither batch nor threads change an answer; `padded` is the width in whole vectors.
  Sweep(int64_t width, int64_t padded) {
    stages = static_cast<int>(width < kMultiple ? 1 : width / kMultiple < kStages ? width / kMultiple : kStages);
    for (int i = 0; i < stages; ++i) start[i] = rounded(width * i / stages);
    start[stages] = padded;
  }

  // Piece i of `count` of a stage, for the threads of a team; it may be empty.
  int64_t piece(int stage, int i, int count) const {
    if (i == count) return start[stage + 1];
    return start[stage] + rounded((start[stage + 1] - start[stage]) * i / count);
  }

 private:
  static int64_t rounded(int64_t columns) { return (columns + kMultiple / 2) / kMultiple * kMultiple; }
};

}  // namespace deq
