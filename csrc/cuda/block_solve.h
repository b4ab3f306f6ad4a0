// The whole solve in one block: W in bfloat16 stays in its shared memory (and registers), and its samples, eight at a time, come
// and go. Every compute warp owns RT tiles of 16 outputs; one more warp judges the last evaluation while the others multiply.
//
// Per evaluation: increments and norms are written, barrier, y += W_low increment, barrier, the slots' actions are carried out.
// Anchors read W in float32 from memory. Forward and adjoint differ in evaluate() alone. Blocks of a cluster read a part of W
// each, and write it, rounded, into the shared memory of all.
#pragma once
#include "elements.h"

namespace deq {

// Where things lie in the shared memory of a block, in bytes.
struct BlockLayout {
  int tiles, warps;  // of outputs; that compute
  int increments, norms, mixtures, controls, actions, orders, bytes;
  int exchange;  // bytes more, where anchors exchange x and y there and not through L2
};

// `rows` tiles a warp, the first `held` k-steps of whose weights are in registers.
DEQ_HD BlockLayout block_layout(int64_t width, int rows, int held) {
  BlockLayout at{};
  at.tiles = tiles_of(width);
  at.warps = (at.tiles + rows - 1) / rows;
  at.increments = at.tiles * (at.tiles > held ? at.tiles - held : 0) * kTileBytes;
  at.norms = at.increments + at.tiles * kIncrementBytes;
  at.mixtures = at.norms + at.warps * kSlots * kNorms * static_cast<int>(sizeof(double));
  at.controls = at.mixtures + kSlots * static_cast<int>(sizeof(Mixture));
  at.actions = at.controls + kSlots * static_cast<int>(sizeof(SlotControl));
  at.orders = (at.actions + kSlots * static_cast<int>(sizeof(Action)) + 15) / 16 * 16;
  at.bytes = at.orders + static_cast<int>(sizeof(Orders));
  at.exchange = kSlots * static_cast<int>((anchor_space(width) + width) * sizeof(float));
  return at;
}

// Floats of scratch a block: x of the anchors, their y, f at the last anchor of every slot, and Anderson's window.
DEQ_HD int64_t block_scratch(int64_t width) { return kSlots * (anchor_space(width) + (2 + 3 * kWindow) * width); }

// Elements as the tensor core leaves them: RT tiles, two slots a thread.
template <class Gpu, int RT>
struct BlockMap {
  static constexpr int E = 4 * RT, G = 2, kGroup = 4;
  int first;  // row of the warp
  int lane;
  DEQ_GPU bool owns(int) const { return true; }
  DEQ_GPU int row(int e) const { return first + e / 4 * kTileRows + output_row(lane, e % 4); }
  DEQ_GPU int slot(int e) const { return output_sample(lane, e % 4); }
};

template <class Gpu, int RT, int HELD>
class BlockSolve {
 public:
  using State = Elements<Gpu, BlockMap<Gpu, RT>>;
  static constexpr int E = State::E;

  DEQ_GPU BlockSolve(const Call& call, char* shared)
      : call_(call),
        at_(block_layout(call.width, RT, HELD)),
        weights_(reinterpret_cast<Quad*>(shared)),
        increments_(reinterpret_cast<Pair*>(shared + at_.increments)),
        norms_(reinterpret_cast<double*>(shared + at_.norms)),
        mixtures_(reinterpret_cast<Mixture*>(shared + at_.mixtures)),
        controls_(reinterpret_cast<SlotControl*>(shared + at_.controls)),
        actions_(reinterpret_cast<Action*>(shared + at_.actions)),
        orders_(reinterpret_cast<Orders*>(shared + at_.orders)),
        warp_(Gpu::thread() / kWarp),
        lane_(Gpu::thread() % kWarp),
        weight_(call.first_weight + Gpu::row()) {
    float* scratch = call.scratch + (static_cast<int64_t>(Gpu::row()) * Gpu::blocks() + Gpu::block()) * block_scratch(call.width);
    x_ = call.exchanges ? reinterpret_cast<float*>(shared + at_.bytes) : scratch;
    y_ = x_ + kSlots * anchor_space(call.width);
    best_ = scratch + kSlots * (anchor_space(call.width) + call.width);
  }

  DEQ_GPU void run() {
    prepare_samples<Gpu>(call_, weight_, Gpu::block() + static_cast<int64_t>(warp_) * Gpu::blocks(),
                         static_cast<int64_t>(at_.warps + 1) * Gpu::blocks());
    Gpu::sync();
    if (sharers_ > 1) Gpu::sync_cluster();  // all have begun: only then may their memory be written
    if (warp_ < at_.warps) {
      compute();
    } else {
      control();
    }
  }

 private:
  // W is here, and nobody writes it any more.
  DEQ_GPU void sync_loaded() const {
    if (sharers_ > 1) {
      Gpu::sync_cluster();
    } else {
      Gpu::sync();
    }
  }

  // The warp that judges: one lane a slot, whose samples are every 8 blocks-th one.
  DEQ_GPU void control() {
    const int64_t stride = static_cast<int64_t>(kSlots) * Gpu::blocks();
    SlotControl& slot = controls_[lane_ % kSlots];  // in shared memory: the registers are needed for Anderson's weights
    if (lane_ < kSlots) {
      const int64_t first = Gpu::block() + static_cast<int64_t>(lane_) * Gpu::blocks();
      actions_[lane_] = slot.begin(call_, weight_, first_solved(call_, weight_, first, stride));
    }
    tell(slot, false);
    sync_loaded();
    while (orders_->has(Orders::kActive)) {
      if (orders_->anchors) Gpu::sync();
      Gpu::sync();
      if (lane_ < kSlots) {
        const auto norms = [&](int i) {
          double sum = 0;
          for (int w = 0; w < at_.warps; ++w) sum += norms_[(w * kSlots + lane_) * kNorms + i];
          return sum;
        };
        const auto next = [&] { return first_solved(call_, weight_, slot.sample + stride, stride); };
        actions_[lane_] = slot.decide(call_, weight_, norms, mixtures_[lane_], true, next);
      }
      tell(slot, orders_->idle >> lane_ & 1);
      Gpu::sync();
    }
  }

  DEQ_GPU void tell(const SlotControl& slot, bool was_idle) {
    Gpu::sync_warp();
    const Orders orders = orders_of<Gpu>(call_, slot, actions_[lane_ % kSlots], kSlots, 0, was_idle);
    if (lane_ == 0) *orders_ = orders;
    Gpu::sync_warp();
  }

  DEQ_GPU void compute() {
    Quad held[RT][HELD > 0 ? HELD : 1];
    State state(call_, {warp_ * RT * kTileRows, lane_}, weight_, actions_, mixtures_, kSlots, best_);
    load_weights(held);
    sync_loaded();
    for (;;) {
      const Orders orders = *orders_;
      if (orders.has(Orders::kSaves)) state.save();
      if (!orders.has(Orders::kActive)) return;
      if (orders.has(Orders::kAccelerated)) state.mix();
      if (orders.has(Orders::kMoves)) state.load();
      if (orders.anchors) anchor(orders.anchors, state);
      measure(orders, state);
      Gpu::sync();
      multiply(held, state.y);
      Gpu::sync();
    }
  }

  DEQ_GPU void load_weights(Quad (&held)[RT][HELD > 0 ? HELD : 1]) {
    float poison = 0;
    DEQ_UNROLL for (int r = 0; r < RT; ++r) {
      const int tile = warp_ * RT + r;
      if (tile >= at_.tiles) continue;
      if constexpr (HELD > 0) weight_fragments<Gpu, HELD>(call_, weight_, tile, 0, 1, poison, held[r]);
      constexpr int kAtOnce = 4;
      for (int k = HELD + sharer_; k < at_.tiles; k += kAtOnce * sharers_) {
        Quad fragments[kAtOnce];
        weight_fragments<Gpu, kAtOnce>(call_, weight_, tile, k, sharers_, poison, fragments);
        DEQ_UNROLL for (int n = 0; n < kAtOnce; ++n) {
          if (k + n * sharers_ >= at_.tiles) break;
          Quad* own = weights_ + (tile * (at_.tiles - HELD) + k + n * sharers_ - HELD) * kWarp + lane_;
          if (sharers_ == 1) *own = fragments[n];
          for (int i = 0; sharers_ > 1 && i < sharers_; ++i) *Gpu::in_block(own, i) = fragments[n];
        }
      }
    }
    report_weight<Gpu>(call_, weight_, warp_ * RT * kTileRows, (warp_ + 1) * RT * kTileRows, poison);
  }

  // y = W x + c in float32 for the slots of the set.
  DEQ_GPU void anchor(uint32_t slots, State& state) {
    state.publish(slots, x_);
    Gpu::sync();
    constexpr int kRows = HELD > 0 ? Gpu::kAnchorRows / 2 : Gpu::kAnchorRows,
                  kOwn = RT * kTileRows;  // more sums do not fit beside held weights
    exact_product<Gpu, kRows, BlockMap<Gpu, RT>::kGroup, Gpu::kAnchorReads, false>(call_, weight_, count_of(slots), warp_ * kOwn,
                                                                                   (warp_ + 1) * kOwn, x_, y_);
    Gpu::sync_warp();
    state.take(slots, y_);
  }

  // f at y, the next increments and the norms of this evaluation.
  DEQ_GPU void measure(const Orders& orders, State& state) {
    float f[E];
    state.respond(orders, f);
    if (orders.has(Orders::kWide))
      add_up<double>(f, state.x);
    else
      add_up<float>(f, state.x);
    if (orders.has(Orders::kAccelerated)) add_window(f, state);
    uint16_t* increments = reinterpret_cast<uint16_t*>(increments_);
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const uint32_t increment = state.feed(e, f[e]);
      const int tile = warp_ * RT + e / 4;
      if (tile < at_.tiles)
        increments[tile * (kIncrementBytes / 2) + increment_place(output_row(lane_, e % 4), output_sample(lane_, e % 4))] =
            static_cast<uint16_t>(increment);
    }
  }

  // |f - x|^2 and |f|^2 of the warp's outputs, every slot.
  template <class S>
  DEQ_GPU void add_up(const float (&f)[E], const float (&x)[E]) {
    S sums[2][2] = {};
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const S step = static_cast<S>(f[e]) - static_cast<S>(x[e]);
      sums[e % 2][0] += step * step;
      sums[e % 2][1] += static_cast<S>(f[e]) * static_cast<S>(f[e]);
    }
    DEQ_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) DEQ_UNROLL for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] +=
        Gpu::shuffle_xor(sums[i / 2][i % 2], mask);
    if (lane_ >= 4) return;
    DEQ_UNROLL for (int i = 0; i < 4; ++i) norms_[(warp_ * kSlots + output_sample(lane_, i / 2)) * kNorms + i % 2] =
        sums[i / 2][i % 2];
  }

  // The new row of Anderson's Gram matrix.
  DEQ_GPU void add_window(const float (&f)[E], const State& state) {
    for (int ring = 0; ring < call_.depth; ++ring) DEQ_UNROLL for (int q = 0; q < 2; ++q) {
        double sum = state.residual_product(q, ring, f);
        DEQ_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) sum += Gpu::shuffle_xor(sum, mask);
        if (lane_ < 4) norms_[(warp_ * kSlots + output_sample(lane_, q)) * kNorms + 2 + ring] = sum;
      }
  }

  DEQ_GPU void multiply(const Quad (&held)[RT][HELD > 0 ? HELD : 1], float (&y)[E]) {
    float sum[RT][4] = {};  // apart from y, to which the tensor core would add with a truncation each time
    if constexpr (HELD > 0) {
      DEQ_UNROLL for (int k = 0; k < HELD; ++k) {
        const Pair b = increments_[k * kWarp + lane_];
        DEQ_UNROLL for (int r = 0; r < RT; ++r) if (warp_ * RT + r < at_.tiles) Gpu::multiply(sum[r], held[r][k], b);
      }
    }
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int k = HELD; k < at_.tiles; ++k) {
      const Pair b = increments_[k * kWarp + lane_];
      DEQ_UNROLL for (int r = 0; r < RT; ++r) {
        const int tile = warp_ * RT + r;
        if (tile < at_.tiles) Gpu::multiply(sum[r], weights_[(tile * (at_.tiles - HELD) + k - HELD) * kWarp + lane_], b);
      }
    }
    DEQ_UNROLL for (int e = 0; e < E; ++e) y[e] += sum[e / 4][e % 4];
  }

  const Call& call_;
  const BlockLayout at_;
  Quad* weights_;
  Pair* increments_;
  double* norms_;
  Mixture* mixtures_;
  SlotControl* controls_;
  Action* actions_;
  Orders* orders_;
  const int warp_, lane_;
  const int sharers_ = Gpu::cluster_blocks(), sharer_ = Gpu::cluster_block();
  const int64_t weight_;
  float *x_, *y_, *best_;
};

}  // namespace deq
