// The whole solve by all blocks of the grid together: each keeps 16 RT rows of W in bfloat16, in shared memory and registers, and
// the state is exchanged through L2.
//
// Per evaluation every block writes the increments and norms of its rows, raises its flag, waits for the flags of the blocks it
// reads from, and multiplies; warps share out the inner dimension, so that each reads a part of the increments and waits for a
// part of the blocks. Four more warps wait for all, add the norms in a fixed order and judge: all blocks decide the same.
// Two buffers suffice: a block that writes evaluation k has seen every flag k - 1, whose owners had read evaluation k - 2.
// All blocks must be resident (a cooperative launch).
#pragma once
#include "elements.h"

namespace deq {

constexpr int kGridWarps = 8;  // that multiply; with more, a thread could not have the registers
constexpr int kJudges = 4;     // warps that judge: one would take longer for the norms of 132 blocks than the others multiply
constexpr int kGridThreads = (kGridWarps + kJudges) * kWarp;

// Where things lie in the shared memory of a block, in bytes.
struct GridLayout {
  int steps;   // of the inner dimension, 16 each
  int blocks;  // that the rows need
  int sums, mixtures, controls, actions, orders, bytes;
};

// `rows` tiles of 16 outputs a block, 8 `columns` slots, the first `held` k-steps of every warp in registers.
DEQ_HD GridLayout grid_layout(int64_t width, int rows, int columns, int held) {
  GridLayout at{};
  at.steps = tiles_of(width);
  at.blocks = (at.steps + rows - 1) / rows;
  at.sums = (at.steps - held * kGridWarps) * rows * kTileBytes;
  at.mixtures = at.sums + kGridWarps * rows * kTileRows * columns * kSlots * static_cast<int>(sizeof(float));
  at.controls = at.mixtures + columns * kSlots * static_cast<int>(sizeof(Mixture));
  at.actions = at.controls + columns * kSlots * static_cast<int>(sizeof(SlotControl));
  at.orders = (at.actions + columns * kSlots * static_cast<int>(sizeof(Action)) + 15) / 16 * 16;
  at.bytes = at.orders + kJudges * static_cast<int>(sizeof(Orders));
  return at;
}

// |f - x|^2 and |f|^2 of a slot in the rows of a block.
struct alignas(16) Norms {
  double step2, size2;
};

// The memory that the blocks of one weight share, in floats from its start.
struct GridScratch {
  int64_t increments, norms, products, x, y, best, flags, floats;
};

DEQ_HD GridScratch grid_scratch(int64_t width, int rows, int columns) {
  const int64_t steps = tiles_of(width), blocks = (steps + rows - 1) / rows, slots = columns * kSlots;
  GridScratch at{};
  at.norms = 2 * steps * columns * (kIncrementBytes / 4);
  at.products = at.norms + 2 * blocks * slots * (sizeof(Norms) / 4);
  at.x = at.products + 2 * blocks * slots * kWindow * (sizeof(double) / 4);
  at.y = at.x + slots * anchor_space(width);
  at.best = at.y + slots * width;
  at.flags = at.best + (1 + 3 * kWindow) * slots * width;  // and Anderson's window
  at.floats = (at.flags + 2 * blocks + 63) / 64 * 64;
  return at;
}

// One element a thread and pass, the rows of a slot side by side.
template <class Gpu, int RT, int BT>
struct GridMap {
  static constexpr int kRows = RT * kTileRows, kElements = kRows * BT * kSlots, kOwners = kGridWarps * kWarp;
  static constexpr int E = (kElements + kOwners - 1) / kOwners, G = E;
  static constexpr int kGroup = RT > 1 ? kSlots : 4;  // a W so wide lies in memory, which is read once for all
  int first;                                          // row of the block
  int thread;
  DEQ_GPU int index(int e) const { return e * kOwners + thread; }
  DEQ_GPU bool owns(int e) const { return index(e) < kElements; }
  DEQ_GPU int row(int e) const { return first + index(e) % kRows; }
  DEQ_GPU int slot(int e) const { return index(e) / kRows; }
};

template <class Gpu, int RT, int BT, int HELD>
class GridSolve {
 public:
  using Map = GridMap<Gpu, RT, BT>;
  using State = Elements<Gpu, Map>;
  static constexpr int E = State::E, kAllSlots = BT * kSlots, kRows = Map::kRows;

  DEQ_GPU GridSolve(const Call& call, char* shared)
      : call_(call),
        at_(grid_layout(call.width, RT, BT, HELD)),
        weights_(reinterpret_cast<Quad*>(shared)),
        sums_(reinterpret_cast<float*>(shared + at_.sums)),
        mixtures_(reinterpret_cast<Mixture*>(shared + at_.mixtures)),
        controls_(reinterpret_cast<SlotControl*>(shared + at_.controls)),
        actions_(reinterpret_cast<Action*>(shared + at_.actions)),
        orders_(reinterpret_cast<Orders*>(shared + at_.orders)),
        warp_(Gpu::thread() / kWarp),
        lane_(Gpu::thread() % kWarp),
        weight_(call.first_weight),
        begin_(at_.steps * warp_ / kGridWarps),
        end_(at_.steps * (warp_ + 1) / kGridWarps) {
    const GridScratch in = grid_scratch(call.width, RT, BT);
    increments_ = reinterpret_cast<Pair*>(call.scratch + in.increments);
    norms_ = reinterpret_cast<Norms*>(call.scratch + in.norms);
    products_ = reinterpret_cast<double*>(call.scratch + in.products);
    x_ = call.scratch + in.x;
    y_ = call.scratch + in.y;
    best_ = call.scratch + in.best;
    flags_ = reinterpret_cast<uint32_t*>(call.scratch + in.flags);
    anchor_flags_ = flags_ + at_.blocks;
  }

  // Every block prepares a share of the samples; those that judge wait for all of them, the others load W meanwhile.
  DEQ_GPU void run() {
    constexpr int kWarps = kGridWarps + kJudges;
    prepare_samples<Gpu>(call_, weight_, static_cast<int64_t>(Gpu::block()) * kWarps + warp_,
                         static_cast<int64_t>(at_.blocks) * kWarps);
    Gpu::sync();
    if (Gpu::thread() == 0) Gpu::release(anchor_flags_ + Gpu::block(), anchor_epoch_);
    if (warp_ < kGridWarps) {
      compute();
    } else {
      control();
    }
  }

 private:
  static constexpr int kJudged = kAllSlots / kJudges;  // slots of a warp that judges, one a lane

  // Every slot takes each kAllSlots-th sample.
  DEQ_GPU void control() {
    const int judge = warp_ - kGridWarps, own = judge * kJudged + lane_ % kJudged;
    const bool decides = lane_ < kJudged;
    SlotControl& slot = controls_[own];  // in shared memory: the registers are needed for Anderson's weights
    wait_for(anchor_flags_, 0, at_.blocks, anchor_epoch_);
    if (decides) actions_[own] = slot.begin(call_, weight_, first_solved(call_, weight_, own, kAllSlots));
    tell(judge, slot, false);
    Gpu::sync();
    for (Orders orders = told(); orders.has(Orders::kActive); orders = told()) {
      if (orders.anchors) exact_rows_of_all(orders.anchors);
      Gpu::sync();
      ++epoch_;
      wait_for(flags_, 0, at_.blocks, epoch_);
      add_up(judge, orders_[judge].has(Orders::kAccelerated));
      if (decides) {
        const auto norms = [&](int i) { return mixtures_[own].norms[i]; };
        const auto next = [&] { return first_solved(call_, weight_, slot.sample + kAllSlots, kAllSlots); };
        actions_[own] = slot.decide(call_, weight_, norms, mixtures_[own], Gpu::block() == 0, next);
      }
      tell(judge, slot, orders_[judge].idle >> own & 1);
      Gpu::sync();
    }
  }

  DEQ_GPU void tell(int judge, const SlotControl& slot, bool was_idle) {
    Gpu::sync_warp();
    const int first = judge * kJudged;
    const Orders orders = orders_of<Gpu>(call_, slot, actions_[first + lane_ % kJudged], kJudged, first, was_idle);
    if (lane_ == 0) orders_[judge] = orders;
  }
  DEQ_GPU Orders told() const {
    Orders all = orders_[0];
    DEQ_UNROLL for (int judge = 1; judge < kJudges; ++judge) all.join(orders_[judge]);
    return all;
  }

  // The norms of all blocks for this judge's slots. Lanes share out the blocks, always in the same way; what a slot without a
  // sample adds up is not looked at. All slots at once: one after the other took a third of a solve of 32 samples at m = 2048.
  DEQ_GPU void add_up(int judge, bool is_accelerated) {
    const int first = judge * kJudged;
    const Norms* norms = norms_ + ((epoch_ & 1) * kAllSlots + first) * at_.blocks;
    double sum[2 * kJudged] = {};
#ifdef __CUDACC__
#pragma unroll(kJudged > 4 ? 1 : 5)
#endif
    for (int block = lane_; block < at_.blocks; block += kWarp) DEQ_UNROLL for (int slot = 0; slot < kJudged; ++slot) {
        const Norms part = Gpu::load(norms + slot * at_.blocks + block);
        sum[2 * slot] += part.step2;
        sum[2 * slot + 1] += part.size2;
      }
    add_lanes<Gpu, 2 * kJudged>(sum);
    constexpr int kHolders = kWarp / (2 * kJudged);  // lanes that hold the same sum
    const int index = lane_ / kHolders;
    if (lane_ % kHolders == 0) mixtures_[first + index / 2].norms[index % 2] = sum[0];
    if (is_accelerated) add_products(first);
    Gpu::sync_warp();
  }

  // And the products of the residuals with those of the window, for the slots that are accelerated.
  DEQ_GPU void add_products(int first) {
    DEQ_ROLLED for (int slot = first; slot < first + kJudged; ++slot) {
      if (actions_[slot].kind == Action::kIdle || actions_[slot].entry < 0) continue;
      DEQ_ROLLED for (int ring = 0; ring < call_.depth; ++ring) {
        const double* products = products_ + (((epoch_ & 1) * kWindow + ring) * kAllSlots + slot) * at_.blocks;
        double product[1] = {0};
        DEQ_ROLLED for (int block = lane_; block < at_.blocks; block += kWarp) product[0] += Gpu::load(products + block);
        add_lanes<Gpu, 1>(product);
        if (lane_ == 0) mixtures_[slot].norms[2 + ring] = product[0];
      }
    }
  }

  DEQ_GPU void compute() {
    Quad held[RT][HELD > 0 ? HELD : 1];
    State state(call_, {Gpu::block() * kRows, Gpu::thread()}, weight_, actions_, mixtures_, kAllSlots, best_);
    load_weights(held);
    Gpu::sync();
    for (;;) {
      const Orders orders = told();
      if (orders.has(Orders::kSaves)) state.save();
      if (!orders.has(Orders::kActive)) return;
      if (orders.has(Orders::kAccelerated)) state.mix();
      if (orders.has(Orders::kMoves)) state.load();
      if (orders.anchors) anchor(orders.anchors, state);
      ++epoch_;
      measure(orders, state);
      Gpu::sync();
      if (Gpu::thread() == 0) Gpu::release(flags_ + Gpu::block(), epoch_);
      wait_for(flags_, begin_ / RT, (end_ + RT - 1) / RT, epoch_);
      multiply(held);
      Gpu::sync();
      add_product(state);
    }
  }

  // Waits until the blocks [first, last) have come to `epoch`; what they wrote before is then seen by the whole warp.
  DEQ_GPU void wait_for(const uint32_t* flags, int first, int last, uint32_t epoch) {
    for (int block = first + lane_; block < last; block += kWarp)
      while (Gpu::acquire(flags + block) < epoch) {
      }
    Gpu::sync_warp();
  }

  DEQ_GPU bool has_tile(int r) const { return Gpu::block() * RT + r < at_.steps; }

  // Step k >= begin_ + HELD of this warp, tile r. Every warp has at least HELD steps.
  DEQ_GPU Quad& weight_at(int r, int k) { return weights_[((k - HELD * (warp_ + 1)) * RT + r) * kWarp + lane_]; }

  DEQ_GPU void load_weights(Quad (&held)[RT][HELD > 0 ? HELD : 1]) {
    float poison = 0;
    DEQ_UNROLL for (int r = 0; r < RT; ++r) {
      const int tile = Gpu::block() * RT + r;  // one beyond the last is zero
      DEQ_UNROLL for (int k = 0; k < HELD; k += 2) {
        Quad fragments[2];
        weight_fragments<Gpu, 2>(call_, weight_, tile, begin_ + k, 1, poison, fragments);
        held[r][k] = fragments[0];
        if (k + 1 < HELD) held[r][k + 1] = fragments[1];
        Gpu::sync_warp();  // more at once would take more registers than there are
      }
      constexpr int kAtOnce = HELD > 0 ? 2 : 4;
      for (int k = begin_ + HELD; k < end_; k += kAtOnce) {
        Quad fragments[kAtOnce];
        weight_fragments<Gpu, kAtOnce>(call_, weight_, tile, k, 1, poison, fragments);
        DEQ_UNROLL for (int n = 0; n < kAtOnce; ++n) if (k + n < end_) weight_at(r, k + n) = fragments[n];
      }
    }
    report_weight<Gpu>(call_, weight_, static_cast<int64_t>(Gpu::block()) * kRows, static_cast<int64_t>(Gpu::block() + 1) * kRows,
                       poison);
  }

  // y = W x + c in float32 for the slots of the set, after an exchange of their x.
  DEQ_GPU void anchor(uint32_t slots, State& state) {
    state.publish(slots, x_);
    exact_rows_of_all(slots);
    DEQ_UNROLL for (int e = 0; e < E; ++e) if (state.exists(e) && (slots >> state.map.slot(e) & 1)) state.y[e] =
        y_[state.place(e)] + state.c[e];
  }

  // By the warps that multiply, 2 RT rows each; those that judge keep the barriers.
  DEQ_GPU void exact_rows_of_all(uint32_t slots) {
    ++anchor_epoch_;
    Gpu::sync();
    if (Gpu::thread() == 0) Gpu::release(anchor_flags_ + Gpu::block(), anchor_epoch_);
    if (warp_ < kGridWarps) {
      wait_for(anchor_flags_, 0, at_.blocks, anchor_epoch_);
      constexpr int kOwn = kRows / kGridWarps, kAtOnce = HELD > 0 ? 1 : kOwn;  // more sums do not fit beside held weights
      const int64_t row = static_cast<int64_t>(Gpu::block()) * kRows + warp_ * kOwn;
      exact_product<Gpu, kAtOnce, Map::kGroup>(call_, weight_, slots, kAllSlots, row, row + kOwn, x_, y_);
    }
    Gpu::sync();
  }

  // f at y; the increments and norms of this evaluation to where the other blocks read them.
  DEQ_GPU void measure(const Orders& orders, State& state) {
    float f[E];
    state.respond(orders, f);
    uint16_t* increments = reinterpret_cast<uint16_t*>(increments_ + (epoch_ & 1) * at_.steps * BT * kWarp);
    Norms* norms = norms_ + (epoch_ & 1) * kAllSlots * at_.blocks + Gpu::block();
    if (orders.has(Orders::kAccelerated)) add_window(f, state);
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      double sum[2] = {static_cast<double>(f[e]) - static_cast<double>(state.x[e]), static_cast<double>(f[e])};
      DEQ_UNROLL for (int i = 0; i < 2; ++i) {
        sum[i] *= sum[i];
        DEQ_UNROLL for (int mask = 1; mask < kRows; mask *= 2) sum[i] += Gpu::shuffle_xor(sum[i], mask);
      }
      if (!state.map.owns(e)) continue;
      const int slot = state.map.slot(e), row = state.map.index(e) % kRows, step = Gpu::block() * RT + row / kTileRows;
      if (row == 0) norms[slot * at_.blocks] = Norms{sum[0], sum[1]};
      const uint32_t increment = state.feed(e, f[e]);
      if (step < at_.steps)
        increments[(step * BT + slot / kSlots) * (kIncrementBytes / 2) + increment_place(row % kTileRows, slot % kSlots)] =
            static_cast<uint16_t>(increment);
    }
  }

  // The new row of Anderson's Gram matrix.
  DEQ_GPU void add_window(const float (&f)[E], const State& state) {
    double* products = products_ + (epoch_ & 1) * kWindow * kAllSlots * at_.blocks + Gpu::block();
    DEQ_ROLLED for (int ring = 0; ring < call_.depth; ++ring) DEQ_UNROLL for (int e = 0; e < E; ++e) {
      double sum = state.residual_product(e, ring, f);
      DEQ_UNROLL for (int mask = 1; mask < kRows; mask *= 2) sum += Gpu::shuffle_xor(sum, mask);
      if (state.map.owns(e) && state.map.index(e) % kRows == 0)
        products[(ring * kAllSlots + state.map.slot(e)) * at_.blocks] = sum;
    }
  }

  DEQ_GPU void multiply(const Quad (&held)[RT][HELD > 0 ? HELD : 1]) {
    float sum[RT][BT][4] = {};
    const Pair* increments = increments_ + (epoch_ & 1) * at_.steps * BT * kWarp + lane_;
    if constexpr (HELD > 0) {
      DEQ_UNROLL for (int k = 0; k < HELD; ++k) DEQ_UNROLL for (int t = 0; t < BT; ++t) {
        const Pair b = Gpu::load(increments + ((begin_ + k) * BT + t) * kWarp);
        DEQ_UNROLL for (int r = 0; r < RT; ++r) Gpu::multiply(sum[r][t], held[r][k], b);
      }
    }
#ifdef __CUDACC__
#pragma unroll(RT == 1 ? 4 : 2)
#endif
    for (int k = begin_ + HELD; k < end_; ++k) {
      Quad a[RT];
      DEQ_UNROLL for (int r = 0; r < RT; ++r) a[r] = weight_at(r, k);
      DEQ_UNROLL for (int t = 0; t < BT; ++t) {
        const Pair b = Gpu::load(increments + (k * BT + t) * kWarp);
        DEQ_UNROLL for (int r = 0; r < RT; ++r) Gpu::multiply(sum[r][t], a[r], b);
      }
    }
    DEQ_UNROLL for (int r = 0; r < RT; ++r) DEQ_UNROLL for (int t = 0; t < BT; ++t) DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      const int row = r * kTileRows + output_row(lane_, e), slot = t * kSlots + output_sample(lane_, e);
      sums_[(warp_ * kAllSlots + slot) * kRows + row] = sum[r][t][e];
    }
  }

  // y += the sum over warps, in their order.
  DEQ_GPU void add_product(State& state) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      if (!state.map.owns(e)) continue;
      float sum = 0;
      DEQ_UNROLL for (int w = 0; w < kGridWarps; ++w) sum += sums_[w * kAllSlots * kRows + state.map.index(e)];
      state.y[e] += sum;
    }
  }

  const Call& call_;
  const GridLayout at_;
  Quad* weights_;
  float* sums_;
  Mixture* mixtures_;
  SlotControl* controls_;
  Action* actions_;
  Orders* orders_;  // one a warp that judges
  const int warp_, lane_;
  const int64_t weight_;
  const int begin_, end_;                  // k-steps of the warp
  uint32_t epoch_ = 0, anchor_epoch_ = 1;  // the first: samples are prepared
  Pair* increments_;
  Norms* norms_;      // (2, slots, blocks)
  double* products_;  // (2, kWindow, slots, blocks): of the residuals with those of the window
  float *x_, *y_, *best_;
  uint32_t *flags_, *anchor_flags_;
};

}  // namespace deq
