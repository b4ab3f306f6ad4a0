// A call's samples: taken one by one from a shared queue, read in any dtype and stride, and written back with how they ended.
// What every engine of this backend does before the first and after the last evaluation of a sample.
#pragma once
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "../activations.h"
#include "../judge.h"
#include "../kernels.h"
#include "cache.h"
#include "convert.h"
#include "kernels.h"
#include "norms.h"

namespace deq {

// Memory that a thread keeps between calls, so that small solves do not pay for page faults.
class Arena {
 public:
  ~Arena() { free(data_); }
  void* get(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      data_ = allocate(bytes);
      size_ = data_ ? bytes : 0;
    }
    return data_;
  }
  void trim() {
    if (size_ <= kKeptBytes) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr int64_t kKeptBytes = 4 << 20;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// What the last solve of this thread multiplied, see deq_cpu_last_work.
extern thread_local DeqWork last_work;

// Shared by the threads of a call.
struct Totals {
  std::atomic<int64_t> failed{0}, bad_injection{0}, bad_start{0};
  std::atomic<int32_t> error{DEQ_OK};
  DeqWork work{};
  std::mutex adding;

  void add(const DeqWork& done) {
    const std::lock_guard<std::mutex> lock(adding);
    work.native_rows += done.native_rows;
    work.native_products += done.native_products;
    work.native_sweeps += done.native_sweeps;
    work.increment_rows += done.increment_rows;
    work.correction_rows += done.correction_rows;
    work.increment_sweeps += done.increment_sweeps;
    work.correction_sweeps += done.correction_sweeps;
  }
  // At the end of a call: tells the caller, and returns its error.
  int32_t report(const DeqProblem& p) const {
    last_work = work;
    p.report->failed = failed;
    p.report->bad_injection = bad_injection;
    p.report->bad_start = bad_start;
    return error;
  }
  static void keep_first(std::atomic<int64_t>& at, int64_t index) {
    int64_t now = at.load();
    while ((now == 0 || index + 1 < now) && !at.compare_exchange_weak(now, index + 1)) {
    }
  }
};

// Runs what `new (std::nothrow)` made, and ends it: no exception may leave a thread of a parallel region.
template <class Tile, class... Arguments>
void run_on(Tile* made, Totals& totals, Arguments&&... arguments) {
  const std::unique_ptr<Tile> tile(made);
  if (tile)
    tile->run(arguments...);
  else
    totals.error = DEQ_NO_MEMORY;
}

template <class T>
class Samples {
 public:
  using Queue = std::atomic<int64_t>;

  Samples(const DeqProblem& p, Totals& totals)
      : p_(p),
        k_(kernels<T>()),
        totals_(totals),
        padded_((p.width + k_.lanes - 1) / k_.lanes * k_.lanes),
        native_(p.type == DEQ_FLOAT32 || p.type == DEQ_FLOAT64),
        // Linear in the injection up to a positive factor: rescaling by a power of two changes no bit of the path, and
        // keeps every square in range.
        rescaled_(p.mask.data != nullptr || is_homogeneous(p.activation)),
        ends_(!p.reflected && (p.mask.data != nullptr || p.activation == kRelu)) {}

  int64_t padded() const { return padded_; }
  // Whether samples are multiplied by what brings them near 1.
  bool rescales() const { return rescaled_; }

  // Takes the next `n` samples at once: threads that fill their tiles one sample at a time would wait for each other's counter,
  // and a row is read faster behind the one before it.
  void reserve(Queue& queue, int64_t n) {
    n = take(queue, n, &next_);
    end_ = next_ + n;
  }

  // The next sample of matrix s, of the reserved ones first, with finite input: its rows in c, d (with a mask) and y (with a
  // start), zero in the padding, multiplied by the power of two `scale`. Returns its flat index s * B + b, or -1 when the queue
  // is empty.
  int64_t take(int64_t s, Queue& queue, T* c, T* d, T* y, double* scale) {
    for (;;) {
      if (next_ == end_) reserve(queue, 1);
      if (next_ == end_) return -1;
      const int64_t b = next_++;
      const int64_t sample = s * p_.batch + b;
      const T largest = read(p_.injection, s, b, c), start = p_.start.data ? read(p_.start, s, b, y) : T(0);
      if (!accepts(sample, largest, start, c)) continue;
      if (p_.mask.data) {
        read(p_.mask, s, b, d);
        if (p_.mask_is_value) k_.derivative_of_value(p_.activation, d, p_.width);
      }
      const Factors by = factors(largest, start, c, d, 1);
      *scale = by.injection;
      if (by.injection != 1) k_.scale(c, static_cast<T>(by.injection), padded_);
      if (p_.start.data && by.start != 1) k_.scale(y, static_cast<T>(by.start), padded_);
      return sample;
    }
  }

  // Up to `most` samples that follow each other: how many, and the first of them.
  int64_t take(Queue& queue, int64_t most, int64_t* first) const {
    *first = queue.fetch_add(most, std::memory_order_relaxed);
    return std::clamp<int64_t>(p_.batch - *first, 0, most);
  }

  // Samples b to b + n of matrix s: where they are, or the rows of `buffer` that they were converted into, padded; `strides` from
  // sample to sample and from element to element.
  const T* block(const DeqView& view, int64_t s, int64_t b, int64_t n, T* buffer, int64_t (&strides)[2]) const {
    if (native_) {
      strides[0] = view.stride[1], strides[1] = p_.width > 1 ? view.stride[2] : 1;
      return static_cast<const T*>(view.data) + offset(view, s, b);
    }
    for (int64_t i = 0; i < n; ++i) load_row<T>(view, p_.type, offset(view, s, b + i), T(1), p_.width, buffer + i * padded_);
    strides[0] = padded_, strides[1] = 1;
    return buffer;
  }

  // Refuses a sample by the largest magnitudes of its injection and of its start, infinity where one is not finite; `row` is
  // scratch then.
  bool accepts(int64_t sample, T largest, T start, T* row) {
    if (std::isfinite(largest) && std::isfinite(start)) return true;
    if (!std::isfinite(largest)) Totals::keep_first(totals_.bad_injection, sample);
    if (!std::isfinite(start)) Totals::keep_first(totals_.bad_start, sample);
    refuse(sample / p_.batch, sample % p_.batch, row);
    return false;
  }

  // The powers of two to multiply a sample's injection and its start by, from the largest magnitudes of both; c and d have their
  // elements `stride` apart.
  struct Factors {
    double injection, start;
  };
  Factors factors(T injection, T start, T* c, const T* d, int64_t stride) const {
    const double scale = scale_of(injection, start);
    if (scale == 1) return {1, 1};
    T values = injection;
    if (ends_) values = largest_of_influence(c, p_.mask.data ? d : nullptr, p_.width, stride);
    if (p_.mask.data && ends_) injection = values;
    // The values would be lost beside a start that has no digit of the injection; 2^-k times it leads to 2^-k times its values.
    // But who asks for one evaluation asks for that of the start itself.
    constexpr int kFar = 32;
    double nearer = 1;
    if (p_.max_iter > 1 && injection > 0 && start > 0)
      nearer = std::ldexp(1.0, std::min(0, std::ilogb(injection) + kFar - std::ilogb(start)));
    T reach = static_cast<T>(start * nearer);
    if (values > 0 && reach > kNear * values) reach = std::ldexp(reach, -kFar);
    double wanted = scale_of(values, reach);
    if (injection > values) wanted = std::min(wanted, most_scale(injection));
    return {wanted, wanted * nearer};
  }

  // Where the sample's result belongs, null if it has to be converted.
  T* native_row(int64_t sample) const {
    return native_ ? static_cast<T*>(p_.out.data) + offset(p_.out, sample / p_.batch, sample % p_.batch) : nullptr;
  }

  // Writes row / scale as the sample's result; false if it left the range of the caller's dtype and was held at its edge.
  bool write(int64_t sample, double scale, const T* row) {
    const int64_t first = offset(p_.out, sample / p_.batch, sample % p_.batch);
    const T factor = static_cast<T>(1 / scale);
    if (native_ && k_.copy_out(row, factor, p_.width, static_cast<T*>(p_.out.data) + first)) return true;
    return store_row<T>(p_.out, p_.type, first, factor, p_.width, row);
  }

  void report(int64_t sample, const Record& record, Verdict verdict) {
    report(sample, record.iteration, static_cast<T>(record.residual()), verdict);
  }
  void report(int64_t sample, int64_t iterations, T residual, Verdict verdict) {
    p_.iterations[sample] = static_cast<int32_t>(iterations);
    static_cast<T*>(p_.residual)[sample] = residual;
    p_.status[sample] = static_cast<uint8_t>(verdict);
    if (verdict != Verdict::kConverged) totals_.failed.fetch_add(1, std::memory_order_relaxed);
  }

 private:
  static int64_t offset(const DeqView& view, int64_t s, int64_t b) { return s * view.stride[0] + b * view.stride[1]; }

  static constexpr T kNear = static_cast<T>(1 << 20);
  double scale_of(T injection, T start) const {
    // Near 1 the squares are in range as they are, and a factor would change no bit of the path; but where there is no injection,
    // iterates shrink until they are lost, and when that is must not tell where they began.
    const T reach = std::max(injection, start);
    if (!rescaled_ || !(reach > 0) || (injection > 0 && reach <= kNear && reach >= 1 / kNear)) return 1;
    constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;
    return std::ldexp(1.0, std::clamp(-std::ilogb(reach), -kLimit, kLimit));
  }

  // Largest magnitude, infinity if any element is not finite.
  T read(const DeqView& view, int64_t s, int64_t b, T* dst) {
    const int64_t first = offset(view, s, b);
    if (native_ && view.stride[2] == 1) return k_.copy_in(static_cast<const T*>(view.data) + first, p_.width, padded_, dst);
    load_row<T>(view, p_.type, first, T(1), p_.width, dst);
    return k_.copy_in(dst, p_.width, padded_, dst);
  }

  // A sample whose input is not finite: refused, or for the adjoint NaN in, NaN out (a loss scaler looks for it).
  void refuse(int64_t s, int64_t b, T* row) {
    const T value = p_.mask.data ? std::numeric_limits<T>::quiet_NaN() : T(0);
    std::fill(row, row + p_.width, value);
    const int64_t first = offset(p_.out, s, b);
    for (int64_t j = 0; j < p_.width; ++j) {
      if (p_.type == DEQ_BFLOAT16) {
        static_cast<uint16_t*>(p_.out.data)[first + j] = to_bfloat16(static_cast<float>(row[j]));
      } else if (p_.type == DEQ_FLOAT16) {
        static_cast<uint16_t*>(p_.out.data)[first + j] = to_float16(static_cast<float>(row[j]));
      } else {
        static_cast<T*>(p_.out.data)[first + j] = row[j];
      }
    }
    Record record = new_record();
    report(s * p_.batch + b, record, static_cast<Verdict>(DEQ_NONFINITE));
  }

  const DeqProblem& p_;
  const Kernels<T>& k_;
  Totals& totals_;
  const int64_t padded_;
  const bool native_, rescaled_;
  const bool ends_;             // an element of the injection may be without influence
  int64_t next_ = 0, end_ = 0;  // the samples that are taken and not yet read
};

}  // namespace deq
