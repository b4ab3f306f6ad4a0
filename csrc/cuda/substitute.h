// Lower triangular W: z = act(W z + c), or the adjoint u = s (W u + g), in one pass over the outputs. Sixteen at a time.
//
// A block takes its samples through all outputs. One warp for every eight samples runs the chain: within a tile of 16 outputs
// each is a scalar root that needs the one before. Meanwhile kAhead more warps multiply what the next tile needs of all tiles
// but the last two with what is known, and share out the inner dimension; one barrier a tile. The transpose of a triangular
// matrix is solved from the last output to the first: outputs are counted in the order in which they are solved.
//
// Products are float32 multiply-adds. Tensor cores would have to take float32 in pieces of tf32 and cut their sums off towards
// zero: csrc/cuda/README.md has the numbers.
#pragma once
#include "../scalar_root.h"
#include "call.h"

namespace deq {

constexpr int kAhead = 8;           // warps that multiply ahead
constexpr int kParts = kAhead + 1;  // of the sum over all earlier tiles: theirs, and that of the tile just before

// Arguments of the kernels. T below is W or, `reversed`, W with rows and columns counted from the end; with `strict` without its
// diagonal. Above the diagonal W is not read.
struct Substitution {
  int64_t batch, width;
  const float* W;
  int64_t row_stride, column_stride;
  DeqView injection, mask, out;  // (1, B, m), mask data null for a solve
  int32_t activation, strict, reversed;
  float* residual;
  float* packed;  // triangle_floats: the tiles of T on and below the diagonal, row by row
  float* solved;  // solved_floats of every block: its z as inputs of the products
};

constexpr int kTriangleTile = kTileRows * kTileDepth;       // floats of a tile of T, its 16 rows side by side
constexpr int kTriangleInputs = kTileDepth * kTileSamples;  // and of those it is multiplied with, eight samples side by side

DEQ_HD int64_t triangle_tile(int64_t i, int64_t j) { return (i * (i + 1) / 2 + j) * kTriangleTile; }
DEQ_HD int64_t triangle_floats(int64_t width) { return triangle_tile(tiles_of(width), 0); }
DEQ_HD int64_t solved_floats(int64_t width, int columns) {
  return static_cast<int64_t>(tiles_of(width)) * columns * kTriangleInputs;
}

// Writes the tile (i, j) of T, by one warp.
template <class Gpu>
DEQ_GPU void pack_triangle_tile(const Substitution& call, int64_t i, int64_t j) {
  float* to = call.packed + triangle_tile(i, j);
  for (int e = Gpu::thread() % kWarp; e < kTriangleTile; e += kWarp) {
    // Neighbouring lanes read neighbours in memory, whichever way W is stored.
    const bool by_rows = call.column_stride <= call.row_stride;
    const int row = by_rows ? e / kTileDepth : e % kTileRows, column = by_rows ? e % kTileDepth : e / kTileRows;
    const int64_t n = i * kTileRows + row, k = j * kTileDepth + column;
    const bool exists = n < call.width && (k < n || (k == n && !call.strict));
    const int64_t at = call.reversed ? (call.width - 1 - n) * call.row_stride + (call.width - 1 - k) * call.column_stride
                                     : n * call.row_stride + k * call.column_stride;
    to[column * kTileRows + row] = exists ? call.W[at] : 0.0f;
  }
}

// Where things lie in the shared memory of a block, in bytes. `columns`: eights of samples.
struct SubstituteLayout {
  int equations, partials, scales, bytes;
};

DEQ_HD constexpr SubstituteLayout substitute_layout(int columns) {
  SubstituteLayout at{};
  at.equations = columns * kTriangleTile * 4;  // after the diagonal tile of every chain
  at.partials = at.equations + columns * kTileRows * static_cast<int>(sizeof(ScalarEquation));
  at.scales = at.partials + 2 * kParts * columns * kTileRows * kTileSamples * 4;
  at.bytes = at.scales + columns * kTileSamples * 4;
  return at;
}

template <class Gpu, int BT>
class Substitute {
 public:
  static constexpr int kWarps = BT + kAhead, kSamples = BT * kTileSamples;

  DEQ_GPU Substitute(const Substitution& call, char* shared)
      : call_(call),
        tiles_(tiles_of(call.width)),
        warp_(Gpu::thread() / kWarp),
        lane_(Gpu::thread() % kWarp),
        first_(static_cast<int64_t>(Gpu::block()) * kSamples) {
    const SubstituteLayout at = substitute_layout(BT);
    const int chain = warp_ < BT ? warp_ : 0;
    diagonal_ = reinterpret_cast<float*>(shared) + chain * kTriangleTile;
    equations_ = reinterpret_cast<ScalarEquation*>(shared + at.equations) + chain * kTileRows;
    partials_ = reinterpret_cast<Sum*>(shared + at.partials);
    scales_ = reinterpret_cast<float*>(shared + at.scales);
    solved_ = call.solved + Gpu::block() * solved_floats(call.width, BT);
  }

  DEQ_GPU void run() {
    for (int s = warp_; s < kSamples; s += kWarps) {
      const bool exists = first_ + s < call_.batch;
      const float reach =
          exists ? reach_of<Gpu>(row_of(call_.injection, 0, first_ + s), call_.injection.stride[2], call_.width) : INFINITY;
      const bool is_finite = reach < INFINITY, is_scaled = is_finite && is_homogeneous();
      const float scale = is_scaled ? held_scale(to_unit(value_reach(first_ + s)), reach) : 1.0f;
      if (lane_ == 0) scales_[s] = is_finite ? scale : 0;
    }
    Gpu::sync();
    if (warp_ < BT) {
      chain();
    } else {
      for (int i = 0; i < tiles_; ++i) {
        look_ahead(i);
        Gpu::sync();
      }
    }
  }

 private:
  struct alignas(16) Sum {
    float value[4];
  };
  struct Weights {  // a lane's share of a tile of T: four rows of every fourth column
    Sum of[4];
  };

  DEQ_GPU bool is_masked() const { return call_.mask.data != nullptr; }
  DEQ_GPU bool is_homogeneous() const { return is_masked() || deq::is_homogeneous(call_.activation); }

  // The largest magnitude of what relu or a mask makes of the injection, which may be of any size where they end it.
  DEQ_GPU float value_reach(int64_t sample) const {
    const float *c = row_of(call_.injection, 0, sample), *s = row_of(call_.mask, 0, sample);
    return reach_of<Gpu>(call_.width, [&](int64_t k) {
      const float x = c[k * call_.injection.stride[2]];
      if (is_masked()) return x * s[k * call_.mask.stride[2]];
      return call_.activation == kRelu ? Relu<ScalarMath<float>>::value(x) : x;
    });
  }

  // Of element e of this lane in tile i, as the products leave them.
  DEQ_GPU int64_t output(int i, int e) const { return static_cast<int64_t>(i) * kTileRows + output_row(lane_, e); }
  DEQ_GPU int64_t place(int64_t output) const { return call_.reversed ? call_.width - 1 - output : output; }
  DEQ_GPU int slot(int e) const { return warp_ * kTileSamples + output_sample(lane_, e); }

  struct Tile {
    float c[4], s[4];
    Quad diagonal[2];  // T (i, i), and of T (i, i - 1) this lane's share
    Weights last;
  };

  // What the chain needs of memory for tile i, read while it is busy with the one before.
  DEQ_GPU Tile read(int i) const {
    Tile tile{};
    if (i >= tiles_) return tile;
    const float* weights = call_.packed + triangle_tile(i, i);
    DEQ_UNROLL for (int h = 0; h < 2; ++h) tile.diagonal[h] = reinterpret_cast<const Quad*>(weights)[h * kWarp + lane_];
    if (i > 0) tile.last = weights_at(weights - kTriangleTile);
    DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      const int64_t n = output(i, e), sample = first_ + slot(e);
      if (n >= call_.width || sample >= call_.batch) continue;
      tile.c[e] = row_of(call_.injection, 0, sample)[place(n) * call_.injection.stride[2]];
      if (is_masked()) tile.s[e] = row_of(call_.mask, 0, sample)[place(n) * call_.mask.stride[2]];
    }
    return tile;
  }

  DEQ_GPU void chain() {
    double sums[2][2] = {};  // |f(z) - z|^2 and |f(z)|^2 of this lane's outputs, for each of its two samples
    bool leaves[2] = {};     // the range of float32
    Tile tile = read(0);
    for (int i = 0; i < tiles_; ++i) {
      const Tile next = read(i + 1);
      float x[4], z[4];
      begin(i, tile, x);
      solve(x, tile.s, z);
      finish(i, x, tile.s, z, sums, leaves);
      Gpu::sync();
      tile = next;
    }
    DEQ_UNROLL for (int q = 0; q < 2; ++q) {
      DEQ_UNROLL for (int mask = 4; mask < kWarp; mask *= 2) {
        DEQ_UNROLL for (int n = 0; n < 2; ++n) sums[q][n] += Gpu::shuffle_xor(sums[q][n], mask);
        leaves[q] = Gpu::shuffle_xor(static_cast<int>(leaves[q]), mask) | static_cast<int>(leaves[q]);
      }
      const int64_t sample = first_ + slot(q);
      if (lane_ >= 4 || sample >= call_.batch) continue;
      float residual = sums[q][0] == 0 ? 0.0f : static_cast<float>(sqrt(sums[q][0] / sums[q][1]));
      if (leaves[q] || !(residual < INFINITY)) residual = INFINITY;
      call_.residual[sample] = scales_[slot(q)] == 0 ? NAN : residual;
    }
  }

  // x = c + what all earlier tiles contribute; the equations of the tile's diagonal.
  DEQ_GPU void begin(int i, const Tile& tile, float (&x)[4]) {
    DEQ_UNROLL for (int h = 0; h < 2; ++h) reinterpret_cast<Quad*>(diagonal_)[h * kWarp + lane_] = tile.diagonal[h];
    float sum[4] = {};
    if (i > 0) {
      float own[4][4] = {};
      add_product(tile.last, inputs_of(i - 1, warp_), own);
      keep(own, i, kAhead, warp_);
      Gpu::sync_warp();
      for (int w = i > 1 ? 0 : kAhead; w < kParts; ++w) {
        const Sum part = partials_[(((i & 1) * kParts + w) * BT + warp_) * kWarp + lane_];
        DEQ_UNROLL for (int e = 0; e < 4; ++e) sum[e] += part.value[e];
      }
    }
    DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      const float scale = scales_[slot(e)];
      x[e] = sum[e] + (scale == 0 ? 0.0f : tile.c[e] * scale);
    }
    Gpu::sync_warp();
    if (lane_ < kTileRows) equations_[lane_] = scalar_equation(call_.activation, diagonal_[lane_ * kTileRows + lane_]);
    Gpu::sync_warp();
  }

  // The outputs of the tile one after the other; x becomes the sum over all others.
  DEQ_GPU void solve(float (&x)[4], const float (&s)[4], float (&z)[4]) {
    DEQ_UNROLL for (int e = 0; e < 4; ++e) z[e] = 0;
    if (is_masked()) {
      float factor[4];  // u = factor x
      DEQ_UNROLL for (int e = 0; e < 4; ++e) factor[e] = s[e] / (1 - s[e] * equations_[output_row(lane_, e)].d);
#ifdef __CUDACC__
#pragma unroll 1
#endif
      for (int n = 0; n < kTileRows; ++n) {
        float own[2], f[2];
        owned(n, x, own);
        owned(n, factor, f);
        DEQ_UNROLL for (int q = 0; q < 2; ++q) own[q] *= f[q];
        eliminate(n, own, x, z);
      }
      return;
    }
    with_activation<ScalarMath<float>>(call_.activation, [&](auto activation) {
#ifdef __CUDACC__
#pragma unroll 1
#endif
      for (int n = 0; n < kTileRows; ++n) {
        float own[2], root[2];
        owned(n, x, own);
        scalar_roots<decltype(activation), 2>(equations_[n], own, root);
        eliminate(n, root, x, z);
      }
    });
  }

  // The values at output n of this lane's two samples.
  DEQ_GPU void owned(int n, const float (&of)[4], float (&value)[2]) const {
    const int owner = n % 8 * 4 + lane_ % 4;
    DEQ_UNROLL for (int q = 0; q < 2; ++q) value[q] = Gpu::shuffle(n < 8 ? of[q] : of[2 + q], owner);
  }

  // Output n is known: those after it take their share.
  DEQ_GPU void eliminate(int n, const float (&value)[2], float (&x)[4], float (&z)[4]) const {
    DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      const int row = output_row(lane_, e);
      if (row == n) z[e] = value[e % 2];
      if (row > n) x[e] = fmaf(diagonal_[n * kTileRows + row], value[e % 2], x[e]);
    }
  }

  // Norms of the tile, and z to where products and the caller read it.
  DEQ_GPU void finish(int i, const float (&x)[4], const float (&s)[4], const float (&z)[4], double (&sums)[2][2],
                      bool (&leaves)[2]) {
    float y[4], f[4];
    DEQ_UNROLL for (int e = 0; e < 4; ++e) y[e] = fmaf(equations_[output_row(lane_, e)].d, z[e], x[e]);
    if (is_masked()) {
      DEQ_UNROLL for (int e = 0; e < 4; ++e) f[e] = s[e] * y[e];
    } else {
      with_activation<ScalarMath<float>>(call_.activation, [&](auto activation) {
        DEQ_UNROLL for (int e = 0; e < 4; ++e) f[e] = decltype(activation)::value(y[e]);
      });
    }
    float* inputs = inputs_of(i, warp_);
    DEQ_UNROLL for (int e = 0; e < 4; ++e) {
      inputs[output_row(lane_, e) * kTileSamples + output_sample(lane_, e)] = z[e];
      const int64_t n = output(i, e), sample = first_ + slot(e);
      if (n >= call_.width || sample >= call_.batch) continue;
      const double step = static_cast<double>(f[e]) - static_cast<double>(z[e]);
      sums[e % 2][0] += step * step;
      sums[e % 2][1] += static_cast<double>(f[e]) * static_cast<double>(f[e]);
      const float scale = scales_[slot(e)];
      float result = scale == 0 ? 0.0f : z[e] / scale;
      if (!(fabsf(result) <= kLargest)) {
        leaves[e % 2] = true;
        result = result != result ? 0.0f : result > 0 ? kLargest : -kLargest;
      }
      // NaN in, NaN out for the adjoint: a loss scaler looks for it.
      row_of(call_.out, 0, sample)[place(n)] = scale == 0 && is_masked() ? NAN : result;
    }
  }

  // What the tile i + 1 needs of the tiles before i, this warp's share of them.
  DEQ_GPU void look_ahead(int i) {
    if (i + 1 >= tiles_ || i < 1) return;
    const int ahead = warp_ - BT;
    const float* weights = call_.packed + triangle_tile(i + 1, 0);
    float sum[BT][4][4] = {};
#ifdef __CUDACC__
#pragma unroll(BT == 1 ? 2 : 1)
#endif
    for (int j = ahead; j < i; j += kAhead) {
      const Weights w = weights_at(weights + j * kTriangleTile);
      DEQ_UNROLL for (int t = 0; t < BT; ++t) {
        add_product(w, inputs_of(j, t), sum[t]);
        if constexpr (BT > 1) Gpu::sync_warp();  // one after the other: all at once would take more registers than there are
      }
    }
    DEQ_UNROLL for (int t = 0; t < BT; ++t) keep(sum[t], i + 1, ahead, t);
  }

  // A lane multiplies four rows by four samples, for every fourth input: it reads as much as it must to do 16 multiply-adds.
  DEQ_GPU int input_group() const { return lane_ % 4; }
  DEQ_GPU int row_group() const { return lane_ / 4 % 4; }
  DEQ_GPU int sample_group() const { return lane_ / 16; }
  DEQ_GPU float* inputs_of(int tile, int column) const { return solved_ + (tile * BT + column) * kTriangleInputs; }

  DEQ_GPU Weights weights_at(const float* tile) const {
    Weights w;
    DEQ_UNROLL for (int k = 0; k < 4; ++k) w.of[k] =
        *reinterpret_cast<const Sum*>(tile + (4 * k + input_group()) * kTileRows + 4 * row_group());
    return w;
  }

  DEQ_GPU void add_product(const Weights& w, const float* inputs, float (&sum)[4][4]) const {
    DEQ_UNROLL for (int k = 0; k < 4; ++k) {
      const Sum z = *reinterpret_cast<const Sum*>(inputs + (4 * k + input_group()) * kTileSamples + 4 * sample_group());
      DEQ_UNROLL for (int r = 0; r < 4; ++r) DEQ_UNROLL for (int s = 0; s < 4; ++s) sum[r][s] =
          fmaf(w.of[k].value[r], z.value[s], sum[r][s]);
    }
  }

  // Adds up what the lanes have of the four groups of inputs, and leaves it for the chain of tile i.
  DEQ_GPU void keep(const float (&sum)[4][4], int i, int part, int column) const {
    float half[2][4], own[4];
    const bool is_upper = lane_ & 2, is_odd = lane_ & 1;
    DEQ_UNROLL for (int r = 0; r < 2; ++r) DEQ_UNROLL for (int s = 0; s < 4; ++s) {
      const float kept = is_upper ? sum[2 + r][s] : sum[r][s], sent = is_upper ? sum[r][s] : sum[2 + r][s];
      half[r][s] = kept + Gpu::shuffle_xor(sent, 2);
    }
    DEQ_UNROLL for (int s = 0; s < 4; ++s) {
      const float kept = is_odd ? half[1][s] : half[0][s], sent = is_odd ? half[0][s] : half[1][s];
      own[s] = kept + Gpu::shuffle_xor(sent, 1);
    }
    const int row = 4 * row_group() + input_group();
    float* parts = reinterpret_cast<float*>(partials_ + (((i & 1) * kParts + part) * BT + column) * kWarp);
    DEQ_UNROLL for (int s = 0; s < 4; ++s) {
      const int sample = 4 * sample_group() + s;
      parts[(row % 8 * 4 + sample / 2) * 4 + row / 8 * 2 + sample % 2] = own[s];
    }
  }

  const Substitution& call_;
  const int tiles_, warp_, lane_;
  const int64_t first_;        // sample of the block
  float* diagonal_;            // the diagonal tile of this chain
  ScalarEquation* equations_;  // and what its roots need
  Sum* partials_;              // (2, kParts, BT, lanes): of the next tile and of this one
  float* scales_;              // of every sample, 0 where it is not finite
  float* solved_;              // (tiles, BT, 16, 8)
};

}  // namespace deq
