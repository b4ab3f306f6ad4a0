// The memory of the delta engine's tile: its sample slots, and the scratch of their evaluations.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "../reliable.h"
#include "delta.h"
#include "kernels.h"
#include "samples.h"
#include "team.h"

namespace deq {

// More of a 1 MB L2 for the rows of a tile: the panels of W that stream through are a quarter as large as in float32.
constexpr int64_t kDeltaTileBytes = 768 << 10;

struct alignas(64) DeltaSlot {
  DeltaRow row;
  DeltaRow rest;  // of the corrections: its x is the part of row.x that they have covered
  Progress progress;
  float* c;
  int64_t sample;
  double scale;     // the sample was multiplied by this power of two
  double changed1;  // |.|_1 of what corrections have covered since the last anchor
  double left_out;  // of the step to come, which is judged if its y is proven to be good enough
  Next next;
  Old old;             // of the next step
  bool is_judged;      // the next step is, as an anchor would be
  bool best_is_first;  // the best iterate is the value at zero, and not yet written
};

struct DeltaSlots {
  // For one thread of `sharing`, helped by a team of so many members, who sum a row in so many segments; W packed or in place.
  bool reserve(Arena& arena, const DeqProblem& p, const DeltaKernels& low, bool is_packed, int64_t padded, int segments,
               int sharing, int members) {
    constexpr int64_t kFloat = sizeof(float);
    const Kernels<float>& k = kernels<float>();
    const int64_t sums = 3 * 64 * segments;
    const int64_t stride = padded * kFloat + kRowSkew, half = (padded * low.element_bytes + 63) / 64 * 64;
    const int64_t rows = p.mask.data ? 5 : 4, per_slot = rows * stride + 3 * half + sums;
    const int64_t words = (p.width + 63) / 64;
    const int64_t share = (p.batch + sharing - 1) / sharing, fit = kDeltaTileBytes / per_slot / k.rows * k.rows;
    size = static_cast<int>(std::min<int64_t>({kMaxTile, std::max<int64_t>(2 * k.rows, fit), share}));
    // A sum for every slot, or for the samples side by side as many as fill whole vectors.
    const int64_t in_place = is_packed ? 0 : (size + k.lanes - 1) / k.lanes * k.lanes;
    char* next = static_cast<char*>(
        arena.get(size * (per_slot + words * 8 + members * kSkipWidth * kFloat) + (2 * members + 1 + in_place) * stride));
    if (!next) return false;
    auto take = [&](int64_t bytes) {
      next += bytes;
      return next - bytes;
    };
    for (int i = 0; i < size; ++i) {
      DeltaSlot& slot = at[i];
      slot.row = DeltaRow{};
      slot.row.sums = reinterpret_cast<float*>(take(sums));
      slot.row.y = reinterpret_cast<float*>(take(stride));
      slot.row.x = reinterpret_cast<float*>(take(stride));
      slot.c = reinterpret_cast<float*>(take(stride));
      d[i] = p.mask.data ? reinterpret_cast<float*>(take(stride)) : nullptr;
      slot.row.d = d[i];
      slot.row.increment = take(half);
      slot.row.next = take(half);
      slot.rest = DeltaRow{};
      slot.rest.y = slot.row.y;
      slot.rest.sums = slot.row.sums;
      slot.rest.x = reinterpret_cast<float*>(take(stride));
      slot.rest.next = slot.rest.increment = take(half);
    }
    for (int i = 0; i < members; ++i) {
      value[i] = reinterpret_cast<float*>(take(stride));
      state[i] = reinterpret_cast<float*>(take(stride));
    }
    if (!is_packed) {
      char* scratch = take(in_place * stride);
      for (int i = 0; i < size; ++i) partial[i] = reinterpret_cast<float*>(scratch + i * stride);
      lanes = p.W.stride[2] == 1 ? reinterpret_cast<float*>(scratch) : nullptr;
    }
    ones = reinterpret_cast<float*>(take(stride));
    std::fill(ones, ones + padded, 1.0f);
    total = reinterpret_cast<float*>(take(size * members * kSkipWidth * kFloat));
    nonzeros = reinterpret_cast<uint64_t*>(take(size * words * 8));
    return true;
  }

  int size = 0;
  DeltaSlot at[kMaxTile];
  float* d[kMaxTile];                                          // the slots' derivatives, or null
  float *value[Team::kMostPieces], *state[Team::kMostPieces];  // of every member
  float* partial[kMaxTile];                                    // sums of an evaluation in place
  float* lanes = nullptr;                                      // or the samples side by side, where W has its rows in place
  float *ones = nullptr, *total = nullptr;
  uint64_t* nonzeros = nullptr;
};

}  // namespace deq
