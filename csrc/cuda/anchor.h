// Anchors: y = W x in float32, W read from memory, for the slots that are to be judged.
#pragma once
#include "call.h"

namespace deq {

// The sums of N numbers over every LANES lanes of a warp: of number i in sum[0] of those from i LANES / N on, N a power of two up
// to LANES. Every step adds lanes that differ in one bit; while there are several sums, the lanes also share them out. Each sum
// is formed in the same order, whatever N is.
template <class Gpu, int N, int LANES = kWarp, class T>
DEQ_GPU void add_lanes(T (&sum)[N]) {
  const int lane = Gpu::thread() % kWarp;
  int count = N;
  DEQ_UNROLL for (int mask = LANES / 2; mask; mask /= 2) {
    const bool upper = lane & mask;
    if (count == 1) {
      sum[0] += Gpu::shuffle_xor(sum[0], mask);
      continue;
    }
    count /= 2;
    DEQ_UNROLL for (int i = 0; i < N / 2; ++i) {
      if (i >= count) break;
      const T kept = upper ? sum[count + i] : sum[i], sent = upper ? sum[i] : sum[count + i];
      sum[i] = kept + Gpu::shuffle_xor(sent, mask);
    }
  }
}

template <int N>
struct alignas(N < 4 ? 4 * N : 16) Row {
  float value[N];
};

// An anchor reads W by 16 bytes a lane: inputs 4 l to 4 l + 3 of every kAnchorInputs are lane l's. Its x lies so that neighbours
// read neighbours.
constexpr int kLaneInputs = 4, kAnchorInputs = kLaneInputs * kWarp;
DEQ_HD int64_t anchor_input(int64_t k) {
  return k / kAnchorInputs * kAnchorInputs + k % kLaneInputs * kWarp + k % kAnchorInputs / kLaneInputs;
}
// Places of the inputs of a slot.
DEQ_HD int64_t anchor_space(int64_t width) { return (width + kAnchorInputs - 1) / kAnchorInputs * kAnchorInputs; }

// y (slot, row) = W x for the rows [first_row, last_row) of W, R at a time, and N slots, by one warp: float32 throughout. Every
// sum runs over the same lanes in the same order whatever R and N are. `x` is (anchor_space, N), at the places that anchor_input
// says: one load for all slots; `y` holds `width` floats a slot, from `first_slot` on. Bound by the latency of the bytes of W
// under way: as many are asked for before any is multiplied as there are registers for.
template <class Gpu, int R, int N, int READS, bool ONCE>
DEQ_GPU void exact_rows(const float* W, int64_t row_stride, int64_t width, int64_t first_row, int64_t last_row, const float* x,
                        float* y, int first_slot) {
  using Weights = Row<kLaneInputs>;
  const int lane = Gpu::thread() % kWarp, columns = static_cast<int>(width);
  const bool is_aligned =
      columns % kLaneInputs == 0 && row_stride % kLaneInputs == 0 && reinterpret_cast<uintptr_t>(W) % sizeof(Weights) == 0;
  constexpr bool kAhead = R == READS && R > 1;
  const auto* inputs = reinterpret_cast<const Row<N>*>(x) + lane;  // of lane's k they lie k - 4 lane further
  const float* w[R];
  const auto find = [&](int64_t row) {
    DEQ_UNROLL for (int r = 0; r < R; ++r) w[r] = W + (row + r < width ? row + r : width - 1) * row_stride;
  };
  const auto read = [&](int k, Weights(&weights)[R]) {
    DEQ_UNROLL for (int r = 0; r < R; ++r) weights[r] =
        ONCE ? Gpu::template read_once<Weights>(w[r] + k) : *reinterpret_cast<const Weights*>(w[r] + k);
  };
  Weights next[R];
  find(first_row);
  if (kAhead && is_aligned && kLaneInputs * lane < columns) read(kLaneInputs * lane, next);
  DEQ_ROLLED for (int64_t first = first_row; first < last_row; first += R) {
    float sum[R * N];
    DEQ_UNROLL for (int i = 0; i < R * N; ++i) sum[i] = 0;
    const auto multiply = [&](int k, int i, const Weights(&weights)[R], int place) {
      const Row<N> at = inputs[k - kLaneInputs * lane + i * kWarp];
      DEQ_UNROLL for (int r = 0; r < R; ++r) DEQ_UNROLL for (int n = 0; n < N; ++n) sum[r * N + n] =
          fmaf(weights[r].value[place], at.value[n], sum[r * N + n]);
    };
    if (!is_aligned) {
      find(first);
      DEQ_ROLLED for (int k = kLaneInputs * lane; k < columns; k += kAnchorInputs) {
        Weights weights[R];
        DEQ_ROLLED for (int i = 0; i < kLaneInputs && k + i < columns; ++i) {
          DEQ_UNROLL for (int r = 0; r < R; ++r) weights[r].value[0] = w[r][k + i];
          multiply(k, i, weights, 0);
        }
      }
    } else if constexpr (kAhead) {  // of many rows those to come, while these are multiplied
      DEQ_ROLLED for (int k = kLaneInputs * lane; k < columns; k += kAnchorInputs) {
        Weights weights[R];
        DEQ_UNROLL for (int r = 0; r < R; ++r) weights[r] = next[r];
        const bool is_last = k + kAnchorInputs >= columns;
        if (is_last) find(first + R);
        if (!is_last || first + R < last_row) read(is_last ? kLaneInputs * lane : k + kAnchorInputs, next);
        DEQ_UNROLL for (int i = 0; i < kLaneInputs; ++i) multiply(k, i, weights, i);
      }
    } else {  // of few rows several inputs
      constexpr int D = R < READS ? READS / R : 1;
      find(first);
      DEQ_ROLLED for (int begin = kLaneInputs * lane; begin < columns; begin += D * kAnchorInputs) {
        Weights weights[D][R];
        DEQ_UNROLL for (int i = 0; i < D; ++i) if (begin + i * kAnchorInputs < columns)
            read(begin + i * kAnchorInputs, weights[i]);
        DEQ_UNROLL for (int i = 0; i < D; ++i) {
          const int k = begin + i * kAnchorInputs;
          if (k >= columns) break;
          DEQ_UNROLL for (int j = 0; j < kLaneInputs; ++j) multiply(k, j, weights[i], j);
        }
      }
    }
    add_lanes<Gpu, R * N>(sum);
    const int index = lane * (R * N) / kWarp;
    if (lane % (kWarp / (R * N)) == 0) {
      const int64_t row = first + index / N;
      if (row < width) y[(first_slot + index % N) * width + row] = sum[0];
    }
  }
}

// Anchored slots lie side by side in the order of their numbers, N of them at a time: the place of one among all of a set.
DEQ_HD int rank_of(uint32_t slots, int slot) {
  slots &= (1u << slot) - 1;
#ifdef __CUDA_ARCH__
  return __popc(slots);
#else
  return __builtin_popcount(slots);
#endif
}
DEQ_HD int count_of(uint32_t slots) { return rank_of(slots >> 1, 31) + static_cast<int>(slots & 1); }

// Where exact_product finds input `row` of the slot of that rank among `count`: N side by side, or the last on its own.
template <int N>
DEQ_HD int64_t anchor_place(int64_t width, int count, int rank, int64_t row) {
  const int first = rank / N * N;
  const int64_t at = first * anchor_space(width);
  return first + 1 == count ? at + anchor_input(row) : at + anchor_input(row) * N + rank % N;
}

// y (rank, row) = W x for the rows [first_row, last_row) of W, R at a time, and `count` slots, N at a time. READS of a lane are
// under way. ONCE: W goes past the cache of the multiprocessor, which then has room for x.
template <class Gpu, int R, int N, int READS, bool ONCE>
DEQ_GPU void exact_product(const Call& call, int64_t weight, int count, int64_t first_row, int64_t last_row, const float* x,
                           float* y) {
  const float* W = call.W + weight * call.matrix_stride;
  if (last_row > call.width) last_row = call.width;
  DEQ_ROLLED for (int first = 0; first < count; first += N) {
    const float* group = x + first * anchor_space(call.width);
    if (first + 1 == count) {
      exact_rows<Gpu, R, 1, READS, ONCE>(W, call.row_stride, call.width, first_row, last_row, group, y, first);
    } else {
      exact_rows<Gpu, R, N, READS, ONCE>(W, call.row_stride, call.width, first_row, last_row, group, y, first);
    }
  }
}

}  // namespace deq
