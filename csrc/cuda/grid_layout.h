// Where the blocks of a grid solve keep and exchange things, and which elements a thread owns (grid_solve.h).
#pragma once
#include "elements.h"

namespace deq {

constexpr int kGridWarps = 8;  // that multiply; with more, a thread could not have the registers
constexpr int kJudges = 4;     // warps that judge: one would take longer for the norms of 132 blocks than the others multiply
constexpr int kGridThreads = (kGridWarps + kJudges) * kWarp;

// |f - x|^2 and |f|^2 of a slot in 16 rows. Such parts are added up in one order, so that the bits do not depend on the kernel.
struct alignas(16) Norms {
  double step2, size2;
};

// Where the blocks of a group exchange. The pointers lie in shared memory: a thread that multiplies has no registers for them.
struct GridPlaces {
  Pair* increments;
  Norms* norms;      // (2, slots, steps)
  double* products;  // (2, kWindow, slots, steps): of the residuals with those of the window
  float *x, *y, *best;
  uint32_t *flags, *anchor_flags;  // one a block
};

// Where things lie in the shared memory of a block, in bytes. W comes last: the other places are known to the compiler.
struct GridLayout {
  int steps;   // of the inner dimension, 16 each
  int blocks;  // of a group: that the rows need
  int places, orders, controls, actions, mixtures, sums, weights, bytes;
};

// Floats from one slot's partial sums to the next one's: four more than its rows, so that what the lanes of a warp write lies in
// different banks.
DEQ_HD constexpr int sums_stride(int rows) { return rows * kTileRows + 4; }

// `rows` tiles of 16 outputs a block, 8 `columns` slots, the first `held` k-steps of every warp in registers.
DEQ_HD GridLayout grid_layout(int64_t width, int rows, int columns, int held) {
  const int slots = columns * kSlots;
  GridLayout at{};
  at.steps = tiles_of(width);
  at.blocks = (at.steps + rows - 1) / rows;
  at.orders = static_cast<int>(sizeof(GridPlaces));
  at.controls = at.orders + kJudges * static_cast<int>(sizeof(Orders));
  at.actions = at.controls + slots * static_cast<int>(sizeof(SlotControl));
  at.mixtures = at.actions + slots * static_cast<int>(sizeof(Action));
  at.sums = at.mixtures + slots * static_cast<int>(sizeof(Mixture));
  at.weights = at.sums + kGridWarps * sums_stride(rows) * slots * static_cast<int>(sizeof(float));
  at.bytes = at.weights + (at.steps - held * kGridWarps) * rows * kTileBytes;
  return at;
}

// The memory that the blocks of a group share, in floats: `flags` of it lie before everything else, those of all groups side by
// side; then come the `floats` of each group, at these places.
struct GridScratch {
  int64_t flags, increments, norms, products, x, y, best, floats;
};

DEQ_HD GridScratch grid_scratch(int64_t width, int rows, int columns) {
  const int64_t steps = tiles_of(width), blocks = (steps + rows - 1) / rows, slots = columns * kSlots;
  GridScratch at{};
  at.flags = (2 * blocks + 63) / 64 * 64;
  at.norms = 2 * steps * columns * (kIncrementBytes / 4);
  at.products = at.norms + 2 * steps * slots * (sizeof(Norms) / 4);
  at.x = at.products + 2 * steps * slots * kWindow * (sizeof(double) / 4);
  at.y = at.x + slots * anchor_space(width);
  at.best = at.y + slots * width;
  at.floats = (at.best + (1 + 3 * kWindow) * slots * width + 63) / 64 * 64;  // Anderson's window too
  return at;
}

// One element a thread and pass, the rows of a slot side by side.
template <class Gpu, int RT, int BT>
struct GridMap {
  static constexpr int kRows = RT * kTileRows, kElements = kRows * BT * kSlots, kOwners = kGridWarps * kWarp;
  static constexpr int kAtOnce = kOwners / kRows;  // slots between an element and the next one
  static constexpr int E = (kElements + kOwners - 1) / kOwners, G = E;
  static constexpr int kGroup = RT == 2 ? kSlots : 4;  // slots of an anchor: for more there are no registers
  static_assert(kOwners % kRows == 0);
  int first;  // row of the block
  unsigned thread;
  DEQ_GPU bool owns(int e) const { return e * kOwners + thread < kElements; }
  DEQ_GPU int place() const { return thread % kRows; }  // of all its elements, among the rows of the block
  DEQ_GPU int row(int) const { return first + place(); }
  DEQ_GPU int slot(int e) const { return e * kAtOnce + thread / kRows; }
};

}  // namespace deq
