// The whole solve in one block: W in bfloat16 stays in its shared memory (and registers), and its samples, eight at a time, come
// and go. Every compute warp owns RT tiles of 16 outputs; one more warp judges the last evaluation while the others multiply.
//
// Per evaluation: increments and norms are written, barrier, y += W_low increment, barrier, the slots' actions are carried out.
// Anchors read W in float32 from memory. Forward and adjoint differ in evaluate() alone.
#pragma once
#include "call.h"

namespace deq {

// Where things lie in the shared memory of a block, in bytes.
struct BlockLayout {
  int tiles, warps;  // of outputs; that compute
  int increments, norms, actions, bytes;
};

// `rows` tiles a warp, the first `held` k-steps of whose weights are in registers.
DEQ_HD BlockLayout block_layout(int64_t width, int rows, int held) {
  BlockLayout at{};
  at.tiles = tiles_of(width);
  at.warps = (at.tiles + rows - 1) / rows;
  at.increments = at.tiles * (at.tiles > held ? at.tiles - held : 0) * kTileBytes;
  at.norms = at.increments + at.tiles * kIncrementBytes;
  at.actions = at.norms + at.warps * kSlots * 2 * static_cast<int>(sizeof(double));
  at.bytes = at.actions + kSlots * static_cast<int>(sizeof(Action)) + 16;
  return at;
}

// Floats of scratch a block: x of the anchors, their y, and f at the last anchor of every slot.
DEQ_HD int64_t block_scratch(int64_t width) { return 3 * kSlots * width; }

template <class Gpu, int RT, int HELD>
class BlockSolve {
 public:
  static constexpr int E = 4 * RT;  // elements a thread

  DEQ_GPU BlockSolve(const Call& call, char* shared)
      : call_(call),
        at_(block_layout(call.width, RT, HELD)),
        weights_(reinterpret_cast<Quad*>(shared)),
        increments_(reinterpret_cast<Pair*>(shared + at_.increments)),
        norms_(reinterpret_cast<double*>(shared + at_.norms)),
        actions_(reinterpret_cast<Action*>(shared + at_.actions)),
        active_(reinterpret_cast<int32_t*>(shared + at_.actions + kSlots * sizeof(Action))),
        warp_(Gpu::thread() / kWarp),
        lane_(Gpu::thread() % kWarp),
        weight_(call.first_weight + Gpu::row()) {
    float* scratch = call.scratch + (static_cast<int64_t>(Gpu::row()) * Gpu::blocks() + Gpu::block()) * call.scratch_size;
    x_ = scratch;
    y_ = scratch + kSlots * call.width;
    best_ = scratch + 2 * kSlots * call.width;
  }

  DEQ_GPU void run() {
    if (warp_ < at_.warps) {
      compute();
    } else {
      control();
    }
  }

 private:
  // The slot's samples are every 8 blocks-th one. Samples that are refused are not solved.
  DEQ_GPU int64_t first_solved(int64_t sample) const {
    const int64_t stride = static_cast<int64_t>(kSlots) * Gpu::blocks();
    while (sample < call_.batch && call_.notes[weight_ * call_.batch + sample].scale == 0) sample += stride;
    return sample < call_.batch ? sample : -1;
  }

  // The warp that judges: one lane a slot.
  DEQ_GPU void control() {
    const int64_t stride = static_cast<int64_t>(kSlots) * Gpu::blocks();
    SlotControl slot;
    slot.sample = -1;
    if (lane_ < kSlots) actions_[lane_] = slot.begin(first_solved(Gpu::block() + static_cast<int64_t>(lane_) * Gpu::blocks()));
    tell_all(slot);
    Gpu::sync();
    while (active_[0]) {
      if (anchored_slots()) Gpu::sync();
      Gpu::sync();
      if (lane_ < kSlots) {
        double step2 = 0, size2 = 0;
        for (int w = 0; w < at_.warps; ++w) {
          step2 += norms_[(w * kSlots + lane_) * 2];
          size2 += norms_[(w * kSlots + lane_) * 2 + 1];
        }
        const auto next = [&] { return first_solved(slot.sample + stride); };
        actions_[lane_] = slot.decide(call_, weight_, step2, size2, next);
      }
      tell_all(slot);
      Gpu::sync();
    }
  }

  // Whether any slot has a sample, and whether any of them is wide.
  DEQ_GPU void tell_all(const SlotControl& slot) {
    const bool is_active = slot.sample >= 0;
    const bool is_wide = is_active && call_.notes[weight_ * call_.batch + slot.sample].is_wide;
    const bool any_active = Gpu::any(is_active), any_wide = Gpu::any(is_wide);
    if (lane_ == 0) active_[0] = any_active, active_[1] = any_wide;
  }

  // One bit for every slot whose y is to be evaluated anew from its x.
  DEQ_GPU unsigned anchored_slots() const {
    unsigned slots = 0;
    DEQ_UNROLL for (int s = 0; s < kSlots; ++s) {
      const int32_t kind = actions_[s].kind;
      if (kind == Action::kAnchor || (kind == Action::kLoad && call_.start.data)) slots |= 1u << s;
    }
    return slots;
  }

  DEQ_GPU void compute() {
    Quad held[RT][HELD > 0 ? HELD : 1];
    float y[E], x[E], c[E], d[E];
    DEQ_UNROLL for (int e = 0; e < E; ++e) y[e] = x[e] = c[e] = d[e] = 0;
    load_weights(held);
    Gpu::sync();
    while (active_[0]) {
      move_samples(y, x, c, d);
      if (const unsigned slots = anchored_slots()) anchor(slots, y, x, c);
      measure(y, x, d);
      Gpu::sync();
      multiply(held, y);
      Gpu::sync();
    }
    save_samples(c, d);
  }

  DEQ_GPU int row(int e) const { return (warp_ * RT + e / 4) * kTileRows + output_row(lane_, e % 4); }
  DEQ_GPU int slot(int e) const { return output_sample(lane_, e % 4); }
  DEQ_GPU int64_t place(int e) const { return slot(e) * call_.width + row(e); }

  DEQ_GPU void load_weights(Quad (&held)[RT][HELD > 0 ? HELD : 1]) {
    const float* W = call_.W + weight_ * call_.matrix_stride;
    DEQ_UNROLL for (int r = 0; r < RT; ++r) {
      const int tile = warp_ * RT + r;
      if (tile >= at_.tiles) continue;
      if constexpr (HELD > 0) {
        DEQ_UNROLL for (int k = 0; k < HELD; ++k) held[r][k] = weight_fragment(W, tile, k);
      }
      for (int k = HELD; k < at_.tiles; ++k)
        weights_[(tile * (at_.tiles - HELD) + k - HELD) * kWarp + lane_] = weight_fragment(W, tile, k);
    }
  }

  DEQ_GPU Quad weight_fragment(const float* W, int tile, int k) const {
    Quad a;
    DEQ_UNROLL for (int q = 0; q < 4; ++q) {
      const int64_t i = tile * kTileRows + weight_row(lane_, q), j = k * kTileDepth + weight_column(lane_, q);
      float pair[2];
      DEQ_UNROLL for (int h = 0; h < 2; ++h) {
        pair[h] = i < call_.width && j + h < call_.width ? W[i * call_.row_stride + j + h] : 0.0f;
        if (!(fabsf(pair[h]) < INFINITY))
          Gpu::keep_least(&call_.report->bad_weight, 1 + (weight_ * call_.width + i) * call_.width + j + h);
      }
      a.word[q] = Gpu::pack_bfloat16(pair[0], pair[1]);
    }
    return a;
  }

  DEQ_GPU void save_samples(const float (&c)[E], const float (&d)[E]) {
    DEQ_UNROLL for (int q = 0; q < 2; ++q) {
      const Action action = actions_[slot(q)];
      if (action.save < 0) continue;
      const float scale = call_.notes[weight_ * call_.batch + action.save].scale;
      float first[E];
      if (action.saves_first) evaluate(call_, c, d, first);
      DEQ_UNROLL for (int e = q; e < E; e += 2) {
        if (row(e) >= call_.width) continue;
        hand_out(call_, weight_, action.save, row(e), scale, action.saves_first ? first[e] : best_[place(e)]);
      }
    }
  }

  // Writes out what is done or better than ever, and moves the next samples in.
  DEQ_GPU void move_samples(float (&y)[E], float (&x)[E], float (&c)[E], float (&d)[E]) {
    save_samples(c, d);
    DEQ_UNROLL for (int q = 0; q < 2; ++q) {
      const Action action = actions_[slot(q)];
      if (action.kind == Action::kIdle) {
        DEQ_UNROLL for (int e = q; e < E; e += 2) y[e] = x[e] = c[e] = d[e] = 0;
      }
      if (action.kind != Action::kLoad) continue;
      const float scale = call_.notes[weight_ * call_.batch + action.load].scale;
      const float *from = row_of(call_.injection, weight_, action.load), *mask = row_of(call_.mask, weight_, action.load),
                  *start = row_of(call_.start, weight_, action.load);
      DEQ_UNROLL for (int e = q; e < E; e += 2) {
        const bool exists = row(e) < call_.width;
        c[e] = exists ? from[row(e) * call_.injection.stride[2]] * scale : 0.0f;
        x[e] = exists && call_.start.data ? start[row(e) * call_.start.stride[2]] * scale : 0.0f;
        y[e] = c[e];  // W x of x = 0 needs no product
        d[e] = exists && call_.mask.data ? mask[row(e) * call_.mask.stride[2]] : 0.0f;
        if (call_.mask_is_value) d[e] = exists ? derivative_of_value<ScalarMath<float>>(call_.activation, d[e]) : 0.0f;
      }
    }
  }

  // y = W x + c in float32 for the slots of the set.
  DEQ_GPU void anchor(unsigned slots, float (&y)[E], const float (&x)[E], const float (&c)[E]) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) if (row(e) < call_.width) x_[place(e)] = x[e];
    Gpu::sync();
    const float* W = call_.W + weight_ * call_.matrix_stride;
    const bool is_single = (slots & (slots - 1)) == 0;
    int single = 0;
    while (is_single && !(slots >> single & 1)) ++single;
    constexpr int kRows = HELD > 0 ? 2 : 4;  // more sums would not fit into the registers beside held weights
    for (int first = warp_ * RT * kTileRows; first < (warp_ + 1) * RT * kTileRows && first < call_.width; first += kRows) {
      if (is_single) {
        exact_rows<Gpu, kRows, 1>(W, call_.row_stride, call_.width, first, x_, y_, {single});
      } else {
        exact_rows<Gpu, kRows, kSlots>(W, call_.row_stride, call_.width, first, x_, y_, {0, 1, 2, 3, 4, 5, 6, 7});
      }
    }
    Gpu::sync_warp();
    DEQ_UNROLL for (int e = 0; e < E; ++e) if ((slots >> slot(e) & 1) && row(e) < call_.width) y[e] = y_[place(e)] + c[e];
  }

  // f at y, the next increments and the norms of this evaluation.
  DEQ_GPU void measure(const float (&y)[E], float (&x)[E], const float (&d)[E]) {
    float f[E];
    evaluate(call_, y, d, f);
    DEQ_UNROLL for (int q = 0; q < 2; ++q) {
      const int32_t kind = actions_[slot(q)].kind;
      DEQ_UNROLL for (int e = q; e < E; e += 2) {
        const bool exists = kind != Action::kIdle && row(e) < call_.width;
        if (!exists) f[e] = 0;
        if (exists && kind != Action::kStep) best_[place(e)] = f[e];
      }
    }
    if (active_[1])
      add_up<double>(f, x);
    else
      add_up<float>(f, x);
    uint16_t* increments = reinterpret_cast<uint16_t*>(increments_);
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const uint32_t rounded = Gpu::pack_bfloat16(f[e] - x[e], 0.0f) & 0xffff;
      x[e] += bfloat16_to_float(rounded);
      const int tile = warp_ * RT + e / 4;
      if (tile < at_.tiles)
        increments[tile * (kIncrementBytes / 2) + increment_place(output_row(lane_, e % 4), slot(e))] = rounded;
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
    DEQ_UNROLL for (int i = 0; i < 4; ++i) norms_[(warp_ * kSlots + slot(i / 2)) * 2 + i % 2] = sums[i / 2][i % 2];
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
  Action* actions_;
  int32_t* active_;
  const int warp_, lane_;
  const int64_t weight_;
  float *x_, *y_, *best_;
};

}  // namespace deq
