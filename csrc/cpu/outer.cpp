// Sums of outer products, the rows of the result divided among threads.
#include <algorithm>

#include "../kernels.h"
#include "cache.h"
#include "kernels.h"

namespace deq {
namespace {

constexpr int64_t kRowsTogether = 48;  // of the result, taken by a thread at once
// From here on a second thread pays: bytes of the result, or flops.
constexpr int64_t kLeastBytes = 1 << 20;
constexpr double kLeastFlops = 2e6;

template <class T>
void outer(const DeqOuter& p) {
  const Kernels<T>& k = kernels<T>();
  const int64_t blocks = (p.width + kRowsTogether - 1) / kRowsTogether;
  const int64_t bytes = p.weights * p.width * p.width * static_cast<int64_t>(sizeof(T));
  const double flops = 2.0 * p.weights * p.batch * p.width * p.width;
  const int threads = bytes < kLeastBytes && flops < kLeastFlops ? 1 : std::max(p.threads, 1);
  prefer_huge_pages(p.out, bytes);
  const T *u = static_cast<const T*>(p.left.data), *z = static_cast<const T*>(p.right.data);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < p.weights * blocks; ++i) {
    const int64_t s = i / blocks, first = i % blocks * kRowsTogether;
    k.outer(u + s * p.left.stride[0], p.left.stride[1], z + s * p.right.stride[0], p.right.stride[1], p.batch, p.width,
            static_cast<T*>(p.out) + s * p.width * p.width, first, std::min(first + kRowsTogether, p.width));
  }
}

}  // namespace
}  // namespace deq

int32_t deq_cpu_outer(const DeqOuter* p) {
  if (!p || p->weights < 0 || p->batch < 0 || p->width < 1 || p->left.stride[2] != 1 || p->right.stride[2] != 1)
    return DEQ_BAD_ARGUMENT;
  if (p->type == DEQ_FLOAT32)
    deq::outer<float>(*p);
  else if (p->type == DEQ_FLOAT64)
    deq::outer<double>(*p);
  else
    return DEQ_BAD_ARGUMENT;
  return DEQ_OK;
}
