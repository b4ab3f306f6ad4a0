// Products of matrices, the rows and columns of the result divided among threads.
#include <algorithm>

#include "../kernels.h"
#include "cache.h"
#include "kernels.h"
#include "samples.h"

namespace deq {
namespace {

constexpr int64_t kRows = 96, kColumns = 256;  // of the result, at most and at least, taken by a thread at once
constexpr int64_t kTile = 24;                  // rows: a multiple of those of every instruction set's tiles
// From here on a second thread pays: bytes of the result, or flops.
constexpr int64_t kLeastBytes = 1 << 20;
constexpr double kLeastFlops = 2e6;
// A result that is not worth its place in the caches: training steps at 2048 x 16 take 0.97 of their time where the gradient of W
// is written past them, 0.98 with an optimiser that reads it (Zen 4; 1536 x 16: 0.94 and 0.99; 4096 x 16: 0.92 to 0.98).
constexpr int64_t kLargeBytes = 8 << 20;
thread_local Arena scratch_arena;

template <class T>
int32_t product(const DeqProduct& p) {
  const Kernels<T>& k = kernels<T>();
  const int64_t bytes = p.count * p.rows * p.columns * static_cast<int64_t>(sizeof(T));
  const double flops = 2.0 * p.count * p.rows * p.inner * p.columns;
  const int threads = bytes < kLeastBytes && flops < kLeastFlops ? 1 : std::max(p.threads, 1);
  if (!p.adds && p.out.stride[1] == p.columns) prefer_huge_pages(p.out.data, bytes);
  // As many blocks of rows for every thread, if they are as many as that.
  const int64_t least = (p.rows + kRows - 1) / kRows, even = (least + threads - 1) / threads * threads;
  const int64_t block_rows = std::min(kRows, ((p.rows + even - 1) / even + kTile - 1) / kTile * kTile);
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  const int64_t wanted = threads > 1 ? (4 * threads + p.count * blocks - 1) / (p.count * blocks) : 1;
  const int64_t pieces = std::clamp<int64_t>(p.columns / kColumns, 1, wanted);
  auto at = [](const DeqView& view, int64_t s) { return static_cast<T*>(view.data) + s * view.stride[0]; };
  bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(|| : failed) if (threads > 1)
  for (int64_t i = 0; i < p.count * blocks * pieces; ++i) {
    const int64_t s = i / (blocks * pieces), block = i / pieces % blocks, piece = i % pieces;
    const int64_t row = block * block_rows, rows = std::min(block_rows, p.rows - row);
    const int64_t column = p.columns * piece / pieces, columns = p.columns * (piece + 1) / pieces - column;
    T* scratch = static_cast<T*>(scratch_arena.get(k.product_scratch(rows) * static_cast<int64_t>(sizeof(T))));
    if (!scratch) {
      failed = true;
      continue;
    }
    k.product(Product<T>{at(p.left, s) + row * p.left.stride[1], p.left.stride[1], p.left.stride[2],
                         at(p.right, s) + column * p.right.stride[2], p.right.stride[1], p.right.stride[2],
                         at(p.out, s) + row * p.out.stride[1] + column, p.out.stride[1], rows, p.inner, columns,
                         static_cast<T>(p.factor), p.adds != 0, bytes >= kLargeBytes, scratch});
  }
  return failed ? DEQ_NO_MEMORY : DEQ_OK;
}

}  // namespace
}  // namespace deq

int32_t deq_cpu_product(const DeqProduct* p) {
  if (!p || p->count < 0 || p->rows < 0 || p->inner < 0 || p->columns < 0 || p->out.stride[2] != 1) return DEQ_BAD_ARGUMENT;
  if (p->type != DEQ_FLOAT32 && p->type != DEQ_FLOAT64) return DEQ_BAD_ARGUMENT;
  if (p->count * p->rows * p->columns == 0) return DEQ_OK;
  return p->type == DEQ_FLOAT32 ? deq::product<float>(*p) : deq::product<double>(*p);
}
