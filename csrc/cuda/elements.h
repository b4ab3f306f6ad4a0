// The elements (output, slot) of a thread, in registers, and what happens to them between two products.
//
// `Map` says which they are: E elements, of which e, e + G, e + 2 G ... belong to one slot; row(e) and slot(e); and how many
// slots are anchored together.
#pragma once
#include "anchor.h"
#include "call.h"
#include "fragments.h"

namespace deq {

template <class Gpu, class Map>
struct Elements {
  static constexpr int E = Map::E, G = Map::G;

  float y[E], x[E];  // y = W x + c
  float c[E], d[E];  // injection, derivative of the adjoint

  const Call& call;
  const Map map;
  const int64_t weight;
  const Action* actions;
  const Mixture* mixtures;
  const int64_t plane;  // elements of all slots
  float* best;          // (slots, width): f at every slot's last anchor
  float* window;        // (3 kWindow, slots, width): x, y and residual of every position of the ring

  DEQ_GPU Elements(const Call& call, const Map& map, int64_t weight, const Action* actions, const Mixture* mixtures, int slots,
                   float* best)
      : call(call),
        map(map),
        weight(weight),
        actions(actions),
        mixtures(mixtures),
        plane(slots * call.width),
        best(best),
        window(best + plane) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) y[e] = x[e] = c[e] = d[e] = 0;
  }

  DEQ_GPU bool exists(int e) const { return map.owns(e) && map.row(e) < call.width; }
  DEQ_GPU int64_t place(int e) const { return map.slot(e) * call.width + map.row(e); }

  // Writes out what is done or better than ever.
  DEQ_GPU void save() const {
    float first[E] = {};  // the value at zero
    bool is_first = false;
    DEQ_UNROLL for (int q = 0; q < G; ++q) is_first |= map.owns(q) && actions[map.slot(q)].saves_first;
    if (is_first) evaluate(call, c, d, first);
    DEQ_UNROLL for (int q = 0; q < G; ++q) {
      if (!map.owns(q)) continue;
      const Action& action = actions[map.slot(q)];
      if (action.save < 0) continue;
      const float scale = call.notes[weight * call.batch + action.save].scale;
      float* out = row_of(call.out, weight, action.save);
      DEQ_UNROLL for (int e = q; e < E; e += G) {
        if (!exists(e)) continue;
        const float result = (action.saves_first ? first[e] : best[place(e)]) / scale;
        out[map.row(e)] = result > kLargest ? kLargest : result < -kLargest ? -kLargest : result;
      }
    }
  }

  // Moves the next samples in where the last ones are done.
  DEQ_GPU void load() {
    uint32_t loaded = 0;
    DEQ_UNROLL for (int q = 0; q < G; ++q) {
      const Action::Kind kind = map.owns(q) ? static_cast<Action::Kind>(actions[map.slot(q)].kind) : Action::kStep;
      if (kind == Action::kIdle) {
        DEQ_UNROLL for (int e = q; e < E; e += G) y[e] = x[e] = c[e] = d[e] = 0;
      }
      if (kind == Action::kLoad) {
        const int64_t sample = actions[map.slot(q)].load;
        const float scale = call.notes[weight * call.batch + sample].scale;
        const float *from = row_of(call.injection, weight, sample), *mask = row_of(call.mask, weight, sample),
                    *start = row_of(call.start, weight, sample);
        DEQ_UNROLL for (int e = q; e < E; e += G) {
          const int64_t row = map.row(e);
          c[e] = exists(e) ? from[row * call.injection.stride[2]] * scale : 0.0f;
          x[e] = exists(e) && call.start.data ? start[row * call.start.stride[2]] * scale : 0.0f;
          y[e] = c[e];  // W x of x = 0 needs no product
          d[e] = exists(e) && call.mask.data ? mask[row * call.mask.stride[2]] : 0.0f;
          if (exists(e)) loaded |= 1u << e;
        }
      }
      if (q % 4 == 3) Gpu::sync_warp();  // more at once would take more registers than there are
    }
    if (call.mask_is_value && loaded) slopes_of(call, loaded, d);
  }

  DEQ_GPU float& held(int kind, int ring, int e) const { return window[(kind * kWindow + ring) * plane + place(e)]; }

  // Anderson: what the last evaluation led to joins the window, and the mixture takes its place.
  DEQ_GPU void mix() {
    DEQ_UNROLL for (int q = 0; q < G; ++q) {
      if (!map.owns(q)) continue;
      const Action& action = actions[map.slot(q)];
      if (action.complete < 0) continue;
      const float* weights = mixtures[map.slot(q)].weights;
      DEQ_UNROLL for (int e = q; e < E; e += G) {
        if (!exists(e)) continue;
        held(0, action.complete, e) = x[e];
        held(1, action.complete, e) = y[e];
        if (action.mix == 0) continue;
        x[e] *= weights[0];
        y[e] *= weights[0];
        DEQ_ROLLED for (int i = 1; i < action.mix; ++i) {
          const int ring = (action.complete - i + call.depth) % call.depth;
          x[e] = fmaf(weights[i], held(0, ring, e), x[e]);
          y[e] = fmaf(weights[i], held(1, ring, e), y[e]);
        }
      }
    }
  }

  // The product of the residual f - x of the elements of group q with that of position `ring`, and at its own its place there.
  DEQ_GPU double residual_product(int q, int ring, const float (&f)[E]) const {
    double sum = 0;
    if (!map.owns(q)) return sum;
    const Action& action = actions[map.slot(q)];
    if (action.entry < 0) return sum;
    DEQ_UNROLL for (int e = q; e < E; e += G) {
      if (!exists(e)) continue;
      const float residual = f[e] - x[e];
      if (ring == action.entry) held(2, ring, e) = residual;
      if (action.filled >> ring & 1) sum += static_cast<double>(residual) * static_cast<double>(held(2, ring, e));
    }
    return sum;
  }

  // f at y; kept where it comes from an anchor, and infinite there if it is out of the range of the result.
  DEQ_GPU void respond(const Orders& orders, float (&f)[E]) const {
    evaluate(call, y, d, f);
    DEQ_UNROLL for (int e = 0; e < E; ++e) if (!exists(e) || (orders.idle >> map.slot(e) & 1)) f[e] = 0;
    if (!orders.exact) return;
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      if (!exists(e) || !(orders.exact >> map.slot(e) & 1)) continue;
      best[place(e)] = f[e];
      if (!(fabsf(f[e]) <= actions[map.slot(e)].limit)) f[e] = INFINITY;
    }
  }

  // x to where the anchors of the set read it. The last also fills the places beside it, so that nothing is read that was never
  // written.
  DEQ_GPU void publish(uint32_t slots, float* at) const {
    constexpr int N = Map::kGroup;
    const int count = count_of(slots);
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const int slot = map.slot(e);
      if (!exists(e) || !(slots >> slot & 1)) continue;
      const int rank = rank_of(slots, slot);
      float* own = at + anchor_place<N>(call.width, count, rank, map.row(e));
      const int fill = rank + 1 < count || rank % N == 0 ? 1 : N - rank % N;
      DEQ_ROLLED for (int i = 0; i < fill; ++i) own[i] = x[e];
    }
  }

  // y = W x + c from the products of the set.
  DEQ_GPU void take(uint32_t slots, const float* products) {
    DEQ_UNROLL for (int e = 0; e < E; ++e) {
      const int slot = map.slot(e);
      if (exists(e) && (slots >> slot & 1)) y[e] = products[rank_of(slots, slot) * call.width + map.row(e)] + c[e];
    }
  }

  // The next increment of element e, as the bits of a bfloat16: what rounding leaves out of it is still in the one after.
  DEQ_GPU uint32_t feed(int e, float f) {
    const uint32_t rounded = Gpu::pack_bfloat16(f - x[e], 0.0f) & 0xffff;
    x[e] += bfloat16_to_float(rounded);
    return rounded;
  }
};

// The fragments a of N tiles (tile, k), (tile, k + step), ... of W, rounded to bfloat16, zero beyond its edges. Everything is
// asked for before anything is used: a fragment at a time, waiting for its loads was a fifth of a solve at m = 256. `poison`
// becomes NaN with an element that is not finite.
template <class Gpu, int N>
DEQ_GPU void weight_fragments(const Call& call, int64_t weight, int tile, int k, int step, float& poison, Quad (&a)[N]) {
  const float* W = call.W + weight * call.matrix_stride;
  const int lane = Gpu::thread() % kWarp;
  float low[N][4], high[N][4];
  DEQ_UNROLL for (int n = 0; n < N; ++n) DEQ_UNROLL for (int q = 0; q < 4; ++q) {
    const int64_t i = tile * kTileRows + weight_row(lane, q), j = (k + n * step) * kTileDepth + weight_column(lane, q);
    const float* at = W + i * call.row_stride + j;
    low[n][q] = i < call.width && j < call.width ? at[0] : 0.0f;
    high[n][q] = i < call.width && j + 1 < call.width ? at[1] : 0.0f;
  }
  DEQ_UNROLL for (int n = 0; n < N; ++n) DEQ_UNROLL for (int q = 0; q < 4; ++q) {
    poison = fmaf(low[n][q], 0.0f, fmaf(high[n][q], 0.0f, poison));
    a[n].word[q] = Gpu::pack_bfloat16(low[n][q], high[n][q]);
  }
}

// Names the first element of a warp's rows [first, last) of W that is not finite, if its `poison` says that there is one.
template <class Gpu>
DEQ_GPU void report_weight(const Call& call, int64_t weight, int64_t first, int64_t last, float poison) {
  if (!Gpu::any(poison != poison)) return;
  for (int64_t i = first; i < last && i < call.width; ++i) {
    const float* row = call.W + weight * call.matrix_stride + i * call.row_stride;
    for (int64_t j = Gpu::thread() % kWarp; j < call.width; j += kWarp)
      if (!(fabsf(row[j]) < INFINITY)) Gpu::keep_least(&call.report->bad_weight, 1 + (weight * call.width + i) * call.width + j);
  }
}

}  // namespace deq
