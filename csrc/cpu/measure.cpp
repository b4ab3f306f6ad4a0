// Ceilings of this core, measured: the FMA peak, and the inner loop alone without the solve around it.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "../activations.h"
#include "../kernels.h"
#include "cache.h"
#include "guarded.h"
#include "kernels.h"
#include "segments.h"

namespace deq {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate over short bursts: the peak is what the core does when nothing else takes it.
template <class F>
double best_gflops(double seconds, F burst) {
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now(), flops = burst();
    best = std::max(best, flops / (now() - start) * 1e-9);
  } while (now() < end);
  return best;
}

template <class T>
double kernel_gflops(int64_t batch, int64_t m, double seconds) {
  const Kernels<T>& k = kernels<T>();
  const int64_t padded = (m + k.lanes - 1) / k.lanes * k.lanes, stride = padded + kRowSkew / static_cast<int64_t>(sizeof(T));
  const Segments segments(m, padded);
  const int64_t sums_size = 2 * k.lanes * segments.count;
  std::vector<T> w(m * m, T(0.5) / static_cast<T>(m));
  std::vector<const T*> z(batch), c(batch);
  std::vector<T*> out(batch), sums(batch);
  std::vector<double> totals(2 * batch);
  T* packed = static_cast<T*>(allocate(packed_elements(k, m) * static_cast<int64_t>(sizeof(T))));
  T* rows = static_cast<T*>(allocate(batch * (3 * stride + sums_size) * static_cast<int64_t>(sizeof(T))));
  if (!packed || !rows) {
    free(packed);
    free(rows);
    return 0;
  }
  k.pack(w.data(), m, 1, m, packed, 0, (m + k.panel - 1) / k.panel);
  memset(rows, 0, batch * (3 * stride + sums_size) * sizeof(T));
  for (int64_t b = 0; b < batch; ++b) {
    T* at = rows + b * (3 * stride + sums_size);
    sums[b] = at;
    z[b] = at + sums_size;
    out[b] = at + sums_size + stride;
    c[b] = at + sums_size + 2 * stride;
  }
  // As the row engine: so many rows together, the segments one after the other.
  const int64_t together = tile_size(k, 3, stride);
  const double flops = 2.0 * batch * m * m;
  const int repeats = static_cast<int>(1e6 / flops) + 1;
  const double best = best_gflops(seconds, [&] {
    for (int i = 0; i < repeats; ++i)
      for (int64_t b = 0; b < batch; b += together) {
        const int n = static_cast<int>(std::min(together, batch - b));
        Step<T> step{&z[b], &out[b], &c[b], nullptr, &sums[b], &totals[2 * b], packed, m, kRelu, 0, 0, 0};
        for (; step.segment < segments.count; ++step.segment) {
          step.from = segments.start[step.segment];
          step.to = segments.start[step.segment + 1];
          k.step(step, n);
        }
        k.add_up(step, n, segments.count);
      }
    return repeats * flops;
  });
  free(packed);
  free(rows);
  return best;
}

}  // namespace
}  // namespace deq

double deq_cpu_peak_gflops(int32_t type, double seconds) {
  constexpr int64_t kRepeats = 20000;
  return deq::best_gflops(seconds, [&] {
    return type == DEQ_FLOAT64 ? deq::kernels<double>().peak_flops(kRepeats) : deq::kernels<float>().peak_flops(kRepeats);
  });
}

double deq_cpu_read_gbs(int64_t bytes, double seconds) {
  constexpr int64_t kPart = 1024;  // elements that are copied at a time, into the L1 cache: what counts is the reading
  const deq::Kernels<float>& k = deq::kernels<float>();
  const int64_t parts = std::max<int64_t>(bytes / (kPart * static_cast<int64_t>(sizeof(float))), 1), size = parts * kPart;
  float* data = static_cast<float*>(deq::allocate((size + kPart) * static_cast<int64_t>(sizeof(float))));
  if (!data) return 0;
  std::fill(data, data + size + kPart, 1.0f);
  const double read = static_cast<double>(sizeof(float)) * static_cast<double>(size);
  const int repeats = static_cast<int>(1e6 / read) + 1;
  const double best = deq::best_gflops(seconds, [&] {
    for (int i = 0; i < repeats; ++i)
      for (int64_t part = 0; part < parts; ++part) k.copy_in(data + part * kPart, kPart, kPart, data + size);
    return repeats * read;
  });
  free(data);
  return best;
}

double deq_cpu_kernel_gflops(int32_t type, int64_t batch, int64_t width, double seconds) {
  if (batch < 1 || width < 1) return 0;
  double best = 0;
  deq::guarded([&]() -> int32_t {
    best = type == DEQ_FLOAT64 ? deq::kernel_gflops<double>(batch, width, seconds)
                               : deq::kernel_gflops<float>(batch, width, seconds);
    return DEQ_OK;
  });
  return best;
}
