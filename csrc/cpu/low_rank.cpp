// W = diag(d) + P Q^T: the iteration in R^r, and its last evaluation; tiles of samples in parallel.
#include <algorithm>
#include <atomic>

#include "norms.h"
#include "scalar_equations.h"

namespace deq {
namespace {

constexpr int64_t kBlock = 64;  // outputs at a time: a tile of them stays in L1

// How the samples of a problem are cut into tiles, and the equations that they share.
template <class T>
struct Tiles {
  explicit Tiles(const DeqReduced& p)
      : threads(4.0 * p.batch * p.width * p.rank < 1e6 ? 1 : std::max(p.threads, 1)),
        samples(p.batch > static_cast<int64_t>(threads) * kernels.lanes ? kernels.samples : kernels.lanes),
        count((p.batch + samples - 1) / samples),
        padded_rank(triangle_panels(p.rank) * kPanel),
        equations(p.diagonal, p.width, p.mask.data ? -1 : p.activation) {}
  const StructuredKernels<T>& kernels = structured_kernels<T>();
  int threads, samples;
  int64_t count, padded_rank;
  ScalarEquations<T> equations;
};

template <class T>
int32_t reduced(const DeqReduced& p) {
  const Tiles<T> tiles(p);
  const StructuredKernels<T>& k = tiles.kernels;
  const int samples = tiles.samples;
  const int64_t padded_rank = tiles.padded_rank;
  if (tiles.equations.error()) return tiles.equations.error();
  const Scalars<T>& scalars = tiles.equations.scalars();
  std::atomic<int32_t> error{DEQ_OK};
#pragma omp parallel for num_threads(tiles.threads) schedule(dynamic) if (tiles.threads > 1)
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t first = i * samples;
    const int n = static_cast<int>(std::min<int64_t>(samples, p.batch - first));
    Memory memory((3 * kBlock + 2 * padded_rank) * samples * static_cast<int64_t>(sizeof(T)));
    T* x = static_cast<T*>(memory.get());
    if (!x) {
      error = DEQ_NO_MEMORY;
      continue;
    }
    alignas(64) T sums[2 * kMaxSamples] = {};
    T *mask = x + kBlock * samples, *out = mask + kBlock * samples, *q = out + kBlock * samples,
      *following = q + padded_rank * samples;
    const bool is_last = p.out.data;
    k.load(row<T>(p.q, first), p.q.stride[1], n, p.rank, false, samples, q, nullptr);
    if (is_last)
      k.load(row<T>(p.following, first), p.following.stride[1], n, p.rank, false, samples, following, nullptr);
    else
      std::fill(following, following + padded_rank * samples, T(0));
    for (int64_t j = 0; j < p.width; j += kBlock) {
      const int64_t outputs = std::min(kBlock, p.width - j);
      k.load(row<T>(p.injection, first) + j, p.injection.stride[1], n, outputs, false, samples, x, nullptr);
      if (p.mask.data) k.load(row<T>(p.mask, first) + j, p.mask.stride[1], n, outputs, false, samples, mask, nullptr);
      const Reduced<T> block{x,
                             p.mask.data ? mask : nullptr,
                             q,
                             following,
                             sums,
                             static_cast<const T*>(p.P) + j * p.rank,
                             static_cast<const T*>(p.Q) + j * p.rank,
                             Scalars<T>{scalars.d + j, scalars.inverse + j, scalars.other + j},
                             outputs,
                             p.rank,
                             samples,
                             p.activation};
      if (!is_last) {
        k.reduce(block);
        continue;
      }
      std::copy(x, x + triangle_panels(outputs) * kPanel * samples, out);
      k.last(Last<T>{block, out, sums});
      k.store(out, n, outputs, false, samples, row<T>(p.out, first) + j, p.out.stride[1]);
    }
    T* size = static_cast<T*>(p.size) + first;
    if (is_last) {
      for (int b = 0; b < n; ++b) {
        size[b] = residual<T>(sums[b], sums[samples + b]);
        const T* z = row<T>(p.out, first + b);
        const bool is_zero = sums[b] == 0 && std::all_of(z, z + p.width, [](T x) { return x == 0; });
        if (!squares_in_range<T>(sums[samples + b]) && !is_zero) size[b] = std::numeric_limits<T>::quiet_NaN();
      }
      continue;
    }
    k.store(following, n, p.rank, false, samples, row<T>(p.following, first), p.following.stride[1]);
    for (int b = 0; b < n; ++b) size[b] = squares_in_range<T>(sums[b]) ? std::sqrt(sums[b]) : std::numeric_limits<T>::quiet_NaN();
  }
  return error;
}

// d^T gram d of every sample, d = following - q.
template <class T>
void step_squares(const double* gram, const T* following, const T* q, int64_t rank, int64_t samples, double* squares) {
  std::fill(squares, squares + samples, 0.0);
  double row[kMaxSamples];
  for (int64_t i = 0; i < rank; ++i) {
    std::fill(row, row + samples, 0.0);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t b = 0; b < samples; ++b)
        row[b] += gram[i * rank + j] * static_cast<double>(following[j * samples + b] - q[j * samples + b]);
    for (int64_t b = 0; b < samples; ++b)
      squares[b] += row[b] * static_cast<double>(following[i * samples + b] - q[i * samples + b]);
  }
}

template <class T>
int32_t reduced_iterate(const DeqReducedIteration& iteration) {
  constexpr double kSlowAtTol = 0.8;
  const DeqReduced& p = iteration.problem;
  const Tiles<T> tiles(p);
  const StructuredKernels<T>& k = tiles.kernels;
  const int samples = tiles.samples;
  const int64_t padded_rank = tiles.padded_rank;
  if (tiles.equations.error()) return tiles.equations.error();
  const Scalars<T>& scalars = tiles.equations.scalars();
  const int64_t padded_width = triangle_panels(p.width) * kPanel;
  const bool masked = p.mask.data;
  std::atomic<int32_t> error{DEQ_OK};
#pragma omp parallel for num_threads(tiles.threads) schedule(dynamic) if (tiles.threads > 1)
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t first = i * samples;
    const int n = static_cast<int>(std::min<int64_t>(samples, p.batch - first));
    Memory memory(((masked ? 2 : 1) * padded_width + kBlock + 2 * padded_rank) * samples * static_cast<int64_t>(sizeof(T)));
    T* x = static_cast<T*>(memory.get());
    if (!x) {
      error = DEQ_NO_MEMORY;
      continue;
    }
    T *q = x + kBlock * samples, *following = q + padded_rank * samples, *c = following + padded_rank * samples;
    T* mask = masked ? c + padded_width * samples : nullptr;
    k.load(row<T>(p.q, first), p.q.stride[1], n, p.rank, false, samples, q, nullptr);
    k.load(row<T>(p.injection, first), p.injection.stride[1], n, p.width, false, samples, c, nullptr);
    if (masked) k.load(row<T>(p.mask, first), p.mask.stride[1], n, p.width, false, samples, mask, nullptr);
    T* residual = static_cast<T*>(p.size) + first;
    int32_t* iterations = iteration.iterations + first;
    alignas(64) T sums[kMaxSamples];
    double squares[kMaxSamples], before[2][kMaxSamples];
    bool settled[kMaxSamples] = {};
    std::fill(&before[0][0], &before[0][0] + 2 * kMaxSamples, INFINITY);
    int left = n;
    for (int32_t it = 1; it <= iteration.max_iter && left > 0; ++it) {
      std::fill(following, following + padded_rank * samples, T(0));
      std::fill(sums, sums + samples, T(0));
      for (int64_t j = 0; j < p.width; j += kBlock) {
        const int64_t outputs = std::min(kBlock, p.width - j), rows = triangle_panels(outputs) * kPanel;
        std::copy(c + j * samples, c + (j + rows) * samples, x);
        k.reduce(Reduced<T>{x, masked ? mask + j * samples : nullptr, q, following, sums, static_cast<const T*>(p.P) + j * p.rank,
                            static_cast<const T*>(p.Q) + j * p.rank,
                            Scalars<T>{scalars.d + j, scalars.inverse + j, scalars.other + j}, outputs, p.rank, samples,
                            p.activation});
      }
      step_squares(iteration.gram, following, q, p.rank, samples, squares);
      for (int b = 0; b < n; ++b) {
        if (settled[b]) continue;
        const double step = std::sqrt(squares[b]), size = std::sqrt(static_cast<double>(sums[b]));
        const bool is_measured = squares_in_range<T>(sums[b]);
        const double r = step > 0 ? (is_measured && size > step ? step / (size - step) : INFINITY) : step;
        const bool is_done = r <= iteration.leave || (r <= iteration.tol && r > kSlowAtTol * before[0][b]);
        // Infinite ones are slow too: a sample that grows must leave before its squares overflow.
        const bool is_slow = it > 2 && !(r <= iteration.slow * before[0][b]) && !(before[0][b] <= iteration.slow * before[1][b]);
        residual[b] = std::isnan(r) ? std::numeric_limits<T>::infinity() : static_cast<T>(r);
        iterations[b] = it;
        before[1][b] = before[0][b], before[0][b] = r;
        if (is_done || is_slow || !is_measured || it == iteration.max_iter) {
          settled[b] = true;
          --left;
        } else {
          for (int64_t j = 0; j < p.rank; ++j) q[j * samples + b] = following[j * samples + b];
        }
      }
    }
    k.store(q, n, p.rank, false, samples, row<T>(p.q, first), p.q.stride[1]);
    k.store(following, n, p.rank, false, samples, row<T>(p.following, first), p.following.stride[1]);
  }
  return error;
}

}  // namespace
}  // namespace deq

namespace {
bool well_formed(const DeqReduced& p) {
  return p.batch >= 0 && p.width >= 1 && p.rank >= 1 && (p.type == DEQ_FLOAT32 || p.type == DEQ_FLOAT64) && p.P && p.Q &&
         p.diagonal && p.size && p.activation >= 0 && p.activation < deq::kActivations;
}
}  // namespace

int32_t deq_cpu_reduced(const DeqReduced* p) {
  if (!p || !well_formed(*p)) return DEQ_BAD_ARGUMENT;
  return p->type == DEQ_FLOAT64 ? deq::reduced<double>(*p) : deq::reduced<float>(*p);
}

int32_t deq_cpu_reduced_iterate(const DeqReducedIteration* p) {
  if (!p || !well_formed(p->problem) || !p->gram || !p->iterations || p->max_iter < 1) return DEQ_BAD_ARGUMENT;
  return p->problem.type == DEQ_FLOAT64 ? deq::reduced_iterate<double>(*p) : deq::reduced_iterate<float>(*p);
}
