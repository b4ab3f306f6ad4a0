// The whole solve by as many blocks together as W needs: each keeps 16 RT rows of it in bfloat16, in shared memory and registers,
// and the state is exchanged through L2. Such a group, a row of blocks, solves samples of its own; the grid has as many groups as
// there is room for and no more than samples, of one weight or of several. They have nothing to do with each other.
//
// Per evaluation every block of a group writes the increments and norms of its rows, raises its flag, waits for the flags of the
// blocks it reads from, and multiplies; warps share out the inner dimension, so that each reads a part of the increments and
// waits for a part of the blocks. Four more warps wait for all, add the norms in a fixed order and judge: all blocks of a group
// decide the same. Two buffers suffice: a block that writes evaluation k has seen every flag k - 1, whose owners had read
// evaluation k - 2. All blocks must be resident (a cooperative launch).
#pragma once
#include "grid_layout.h"

namespace deq {

template <class Gpu, int RT, int BT, int HELD>
class GridSolve {
 public:
  using Map = GridMap<Gpu, RT, BT>;
  using State = Elements<Gpu, Map>;
  static constexpr int E = State::E, kAllSlots = BT * kSlots, kRows = Map::kRows, kStride = sums_stride(RT);
  static constexpr bool kStages = RT > 2;  // whether increments come through shared memory

  DEQ_GPU GridSolve(const Call& call, char* shared)
      : call_(call),
        at_(grid_layout(call.width, RT, BT, HELD)),
        weights_(reinterpret_cast<Quad*>(shared + at_.weights)),
        sums_(reinterpret_cast<float*>(shared + at_.sums)),
        mixtures_(reinterpret_cast<Mixture*>(shared + at_.mixtures)),
        controls_(reinterpret_cast<SlotControl*>(shared + at_.controls)),
        actions_(reinterpret_cast<Action*>(shared + at_.actions)),
        places_(reinterpret_cast<GridPlaces*>(shared + at_.places)),
        orders_(reinterpret_cast<Orders*>(shared + at_.orders)),
        warp_(Gpu::thread() / kWarp),
        lane_(Gpu::thread() % kWarp),
        weight_(call.first_weight + Gpu::row() / call.groups),
        begin_(at_.steps * warp_ / kGridWarps),
        end_(at_.steps * (warp_ + 1) / kGridWarps) {
    const GridScratch in = grid_scratch(call.width, RT, BT);
    if (Gpu::thread() == 0) {
      float* own = call.scratch + Gpu::rows() * in.flags + Gpu::row() * in.floats;
      places_->increments = reinterpret_cast<Pair*>(own + in.increments);
      places_->norms = reinterpret_cast<Norms*>(own + in.norms);
      places_->products = reinterpret_cast<double*>(own + in.products);
      places_->x = own + in.x, places_->y = own + in.y, places_->best = own + in.best;
      places_->flags = reinterpret_cast<uint32_t*>(call.scratch + Gpu::row() * in.flags);
      places_->anchor_flags = places_->flags + at_.blocks;
    }
  }

  // Every block prepares a share of its group's samples; those that judge wait for all of them, the others load W meanwhile.
  DEQ_GPU void run() {
    constexpr int kWarps = kGridWarps + kJudges;
    prepare_samples<Gpu>(call_, weight_, sample_of(static_cast<int64_t>(Gpu::block()) * kWarps + warp_),
                         static_cast<int64_t>(at_.blocks) * kWarps * call_.groups);
    Gpu::sync();
    if (Gpu::thread() == 0) Gpu::release(places_->anchor_flags + Gpu::block(), anchor_epoch_);
    if (warp_ < kGridWarps) {
      compute();
    } else {
      control();
    }
  }

 private:
  static constexpr int kJudged = kAllSlots / kJudges;  // slots of a warp that judges, one a lane

  // The i-th sample of this group: those of a weight take turns, so that each has as many.
  DEQ_GPU int64_t sample_of(int64_t i) const { return i * call_.groups + Gpu::row() % call_.groups; }

  // Every slot takes each kAllSlots-th sample of its group.
  DEQ_GPU void control() {
    const int judge = warp_ - kGridWarps, own = judge * kJudged + lane_ % kJudged;
    const bool decides = lane_ < kJudged;
    const int64_t stride = static_cast<int64_t>(kAllSlots) * call_.groups;
    SlotControl& slot = controls_[own];  // in shared memory: the registers are needed for Anderson's weights
    wait_for(places_->anchor_flags, 0, at_.blocks, anchor_epoch_);
    if (decides) actions_[own] = slot.begin(call_, weight_, first_solved(call_, weight_, sample_of(own), stride));
    tell(judge, slot, false);
    Gpu::sync();
    for (Orders orders = told(); orders.has(Orders::kActive); orders = told()) {
      if (orders.anchors) exact_rows_of_all(orders.anchors);
      Gpu::sync();
      ++epoch_;
      wait_for(places_->flags, 0, at_.blocks, epoch_);
      add_up(judge, orders_[judge].has(Orders::kAccelerated));
      if (decides) {
        const auto norms = [&](int i) { return mixtures_[own].norms[i]; };
        const auto next = [&] { return first_solved(call_, weight_, slot.sample + stride, stride); };
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

  // The norms of all blocks for this judge's slots. Lanes share out their parts, always in the same way; what a slot without a
  // sample adds up is not looked at. All slots at once: one after the other took a third of a solve of 32 samples at m = 2048.
  DEQ_GPU void add_up(int judge, bool is_accelerated) {
    const int first = judge * kJudged;
    const Norms* norms = places_->norms + ((epoch_ & 1) * kAllSlots + first) * at_.steps;
    double sum[2 * kJudged] = {};
#ifdef __CUDACC__
#pragma unroll(kJudged > 4 ? 1 : 5)
#endif
    for (int i = lane_; i < at_.steps; i += kWarp) DEQ_UNROLL for (int slot = 0; slot < kJudged; ++slot) {
        const Norms part = Gpu::load(norms + slot * at_.steps + i);
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
        const double* products = places_->products + (((epoch_ & 1) * kWindow + ring) * kAllSlots + slot) * at_.steps;
        double product[1] = {0};
        DEQ_ROLLED for (int i = lane_; i < at_.steps; i += kWarp) product[0] += Gpu::load(products + i);
        add_lanes<Gpu, 1>(product);
        if (lane_ == 0) mixtures_[slot].norms[2 + ring] = product[0];
      }
    }
  }

  DEQ_GPU void compute() {
    Quad held[RT][HELD > 0 ? HELD : 1];
    State state(call_, {Gpu::block() * kRows, static_cast<unsigned>(Gpu::thread())}, weight_, actions_, mixtures_, kAllSlots,
                places_->best);
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
      if (Gpu::thread() == 0) Gpu::release(places_->flags + Gpu::block(), epoch_);
      wait_for(places_->flags, begin_ / RT, (end_ + RT - 1) / RT, epoch_);
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
    state.publish(slots, places_->x);
    exact_rows_of_all(slots);
    state.take(slots, places_->y);
  }

  // By the warps that multiply, 2 RT rows each; those that judge keep the barriers.
  DEQ_GPU void exact_rows_of_all(uint32_t slots) {
    ++anchor_epoch_;
    Gpu::sync();
    if (Gpu::thread() == 0) Gpu::release(places_->anchor_flags + Gpu::block(), anchor_epoch_);
    if (warp_ < kGridWarps) {
      wait_for(places_->anchor_flags, 0, at_.blocks, anchor_epoch_);
      constexpr int kOwn = kRows / kGridWarps, kAtOnce = HELD > 0 ? 1 : kOwn < 4 ? kOwn : 4;  // as the registers allow
      const int64_t row = static_cast<int64_t>(Gpu::block()) * kRows + warp_ * kOwn;
      exact_product<Gpu, kAtOnce, Map::kGroup, RT == 1 && HELD == 0 ? Gpu::kAnchorReads : Gpu::kTallReads, (HELD > 0)>(
          call_, weight_, count_of(slots), row, row + kOwn, places_->x, places_->y);
    }
    Gpu::sync();
  }

  // f at y; the increments and norms of this evaluation to where the other blocks read them.
  DEQ_GPU void measure(const Orders& orders, State& state) {
    float f[E];
    state.respond(orders, f);
    uint16_t* increments = reinterpret_cast<uint16_t*>(places_->increments + (epoch_ & 1) * at_.steps * BT * kWarp);
    if (orders.has(Orders::kAccelerated)) add_window(f, state);
    add_up(f, state);
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      if (!state.map.owns(e)) continue;
      const int slot = state.map.slot(e), row = state.map.place(), step = step_of();
      const uint32_t increment = state.feed(e, f[e]);
      if (step < at_.steps)
        increments[(step * BT + slot / kSlots) * (kIncrementBytes / 2) + increment_place(row % kTileRows, slot % kSlots)] =
            static_cast<uint16_t>(increment);
    }
  }

  // Of its rows, those that a lane shares with 15 others. Not from the map's place, which would take a register too many.
  DEQ_GPU int step_of() const { return Gpu::block() * RT + Gpu::thread() % kRows / kTileRows; }

  // |f - x|^2 and |f|^2 of the warp's elements, every slot.
  DEQ_GPU void add_up(const float (&f)[E], const State& state) {
    Norms* norms = places_->norms + (epoch_ & 1) * kAllSlots * at_.steps + step_of();
    double sum[2 * E];
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const double value = f[e], step = value - static_cast<double>(state.x[e]);
      sum[2 * e] = step * step, sum[2 * e + 1] = value * value;
    }
    add_lanes<Gpu, 2 * E, kTileRows>(sum);
    constexpr int kHolders = kTileRows / (2 * E);  // lanes that hold the same sum
    const int index = lane_ % kTileRows / kHolders, slot = state.map.slot(index / 2);
    if (lane_ % kHolders == 0 && slot < kAllSlots && step_of() < at_.steps)
      reinterpret_cast<double*>(norms + slot * at_.steps)[index % 2] = sum[0];
  }

  // The new row of Anderson's Gram matrix.
  DEQ_GPU void add_window(const float (&f)[E], const State& state) {
    DEQ_ROLLED for (int ring = 0; ring < call_.depth; ++ring) DEQ_UNROLL for (int e = 0; e < E; ++e) {
      double sum[1] = {state.residual_product(e, ring, f)};
      add_lanes<Gpu, 1, kTileRows>(sum);
      const int place = (((epoch_ & 1) * kWindow + ring) * kAllSlots + state.map.slot(e)) * at_.steps + step_of();
      if (state.map.owns(e) && lane_ % kTileRows == 0 && step_of() < at_.steps) places_->products[place] = sum[0];
    }
  }

  DEQ_GPU void multiply(const Quad (&held)[RT][HELD > 0 ? HELD : 1]) {
    float sum[RT][BT][4] = {};
    const Pair* increments = places_->increments + (epoch_ & 1) * at_.steps * BT * kWarp;
    if constexpr (HELD > 0) {
      DEQ_UNROLL for (int k = 0; k < HELD; ++k) DEQ_UNROLL for (int t = 0; t < BT; ++t) {
        const Pair b = Gpu::load(increments + ((begin_ + k) * BT + t) * kWarp + lane_);
        DEQ_UNROLL for (int r = 0; r < RT; ++r) Gpu::multiply(sum[r][t], held[r][k], b);
      }
    }
    if constexpr (kStages) {
      multiply_staged(increments, sum);
    } else {
#ifdef __CUDACC__
#pragma unroll(RT == 1 ? 4 : 2)
#endif
      for (int k = begin_ + HELD; k < end_; ++k) {
        Quad a[RT];
        DEQ_UNROLL for (int r = 0; r < RT; ++r) a[r] = weight_at(r, k);
        DEQ_UNROLL for (int t = 0; t < BT; ++t) {
          const Pair b = Gpu::load(increments + (k * BT + t) * kWarp + lane_);
          DEQ_UNROLL for (int r = 0; r < RT; ++r) Gpu::multiply(sum[r][t], a[r], b);
        }
      }
    }
    DEQ_UNROLL for (int r = 0; r < RT; ++r) DEQ_UNROLL for (int t = 0; t < BT; ++t) DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      const int row = r * kTileRows + output_row(lane_, e), slot = t * kSlots + output_sample(lane_, e);
      sums_[(warp_ * kAllSlots + slot) * kStride + row] = sum[r][t][e];
    }
  }

  // The increments on their way through the place of this warp's sums, all that it holds at once: a warp of so many sums has no
  // registers for the loads that L2's latency asks for.
  DEQ_GPU void multiply_staged(const Pair* increments, float (&sum)[RT][BT][4]) {
    constexpr int kStep = BT * kWarp, kAtOnce = kAllSlots * kStride * static_cast<int>(sizeof(float)) / (BT * kIncrementBytes);
    constexpr int kCopied = 16 / sizeof(Pair);  // by a lane
    static_assert(kAtOnce >= 1 && kWarp * kCopied <= kStep);
    Pair* stage = reinterpret_cast<Pair*>(sums_ + warp_ * kAllSlots * kStride);
    for (int first = begin_; first < end_; first += kAtOnce) {
      const int steps = end_ - first < kAtOnce ? end_ - first : kAtOnce;
      for (int i = kCopied * lane_; i < steps * kStep; i += kCopied * kWarp) Gpu::copy(stage + i, increments + first * kStep + i);
      Gpu::finish_copies();
      Gpu::sync_warp();
      const Quad* a = &weight_at(0, first);
      const Pair* b = stage + lane_;
      DEQ_ROLLED for (int k = 0; k < steps; ++k, a += RT * kWarp, b += kStep) {
        Pair increment[BT];
        DEQ_UNROLL for (int t = 0; t < BT; ++t) increment[t] = b[t * kWarp];
        DEQ_UNROLL for (int r = 0; r < RT; ++r) {
          const Quad weight = a[r * kWarp];
          DEQ_UNROLL for (int t = 0; t < BT; ++t) Gpu::multiply(sum[r][t], weight, increment[t]);
        }
      }
      Gpu::sync_warp();
    }
  }

  // y += the sum over warps, in their order.
  DEQ_GPU void add_product(State& state) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      if (!state.map.owns(e)) continue;
      const int place = state.map.slot(e) * kStride + state.map.place();
      float sum = 0;
      DEQ_UNROLL for (int w = 0; w < kGridWarps; ++w) sum += sums_[w * kAllSlots * kStride + place];
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
  GridPlaces* places_;
  Orders* orders_;  // one a warp that judges
  const int warp_, lane_;
  const int64_t weight_;
  const int begin_, end_;                  // k-steps of the warp
  uint32_t epoch_ = 0, anchor_epoch_ = 1;  // the first: samples are prepared
};

}  // namespace deq
