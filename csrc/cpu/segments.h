// The columns of a row in segments. What is summed over a row (its residual) is summed in every segment alone, and the segments
// are added in order: threads can share a row, and no bit of its answer tells how many did.
#pragma once
#include <stdint.h>

namespace deq {

struct Segments {
  static constexpr int kMost = 16;
  // A segment's products must be worth two synchronisations (some 300 ns): 512 x 256 of them take 4 microseconds.
  static constexpr int64_t kLeastColumns = 256;
  // They start where the tiles of every instruction set do: 8 vectors of 16 elements.
  static constexpr int64_t kMultiple = 128;

  int count;
  int64_t start[kMost + 1];  // segment i holds columns [start[i], start[i + 1])

  // Depends on the width alone; `padded` is the width in whole vectors. A power of two: three segments are not for two threads.
  Segments(int64_t width, int64_t padded) : count(1) {
    while (count < kMost && 2 * count * kLeastColumns <= width) count *= 2;
    for (int i = 0; i < count; ++i) start[i] = (width * i / count + kMultiple / 2) / kMultiple * kMultiple;
    start[count] = padded;
  }
};

}  // namespace deq
