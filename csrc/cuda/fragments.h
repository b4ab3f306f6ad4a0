// Index maps of the tensor core's m16n8k16 product, on the host and on the device: which lane and word of a warp's fragment
// holds which element.
//
//   a  16 outputs x 16 inputs of W: bfloat16, four words a lane
//   b  16 inputs x 8 samples: bfloat16, two words a lane
//   d  16 outputs x 8 samples: float32, four words a lane
#pragma once
#include <stdint.h>

#include "device.h"

namespace deq {

constexpr int kTileRows = 16, kTileDepth = 16, kTileSamples = 8;
constexpr int kTileBytes = kTileRows * kTileDepth * 2;          // of W, one fragment a
constexpr int kIncrementBytes = kTileDepth * kTileSamples * 2;  // of increments, one fragment b

DEQ_HD int tiles_of(int64_t width) { return static_cast<int>((width + kTileRows - 1) / kTileRows); }

// Element e < 4 of a lane's d: output row and sample.
DEQ_HD int output_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
DEQ_HD int output_sample(int lane, int e) { return 2 * (lane % 4) + e % 2; }

// Word q < 4 of a lane's a holds columns `weight_column` and the next one of row `weight_row`.
DEQ_HD int weight_row(int lane, int q) { return lane / 4 + 8 * (q % 2); }
DEQ_HD int weight_column(int lane, int q) { return 2 * (lane % 4) + 8 * (q / 2); }

// Position in 2-byte elements of input k < 16 of a sample within its fragment b, stored lane by lane.
DEQ_HD int increment_place(int k, int sample) { return ((sample * 4 + k % 8 / 2) * 2 + k / 8) * 2 + k % 2; }

}  // namespace deq
