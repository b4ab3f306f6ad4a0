// The lane engine's intake: samples read, checked, scaled and evaluated for the first time, as many at once as a vector has
// lanes.
#pragma once
#include "../anderson.h"
#include "lanes.h"
#include "norms.h"
#include "samples.h"

namespace deq {

// What the engine knows of a sample beside its columns.
struct LaneSlot {
  Record record;
  bool saved;      // the output row holds the best iterate
  int depth;       // Anderson: pairs to hold
  int64_t sample;  // flat index s * B + b
  double scale;    // the sample was multiplied by this power of two
  Unit unit;
  double start2;  // |y|^2 of its start, in units of 1
};

template <class T>
double size_of(const T* column, int lane, int lanes, int64_t m) {
  double sum = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double value = static_cast<double>(column[j * lanes + lane]);
    sum += value * value;
  }
  return sum;
}

template <class T>
class LaneIntake {
 public:
  using Queue = std::atomic<int64_t>;

  LaneIntake(const DeqProblem& p, Samples<T>& samples)
      : p_(p), k_(kernels<T>()), lane_(*k_.lane()), samples_(samples), m_(p.width), lanes_(lane_.lanes) {}

  // Numbers that it needs to hold.
  int64_t elements() const { return lanes_ * (m_ * (3 + (p_.mask.data ? 1 : 0)) + samples_.padded()); }
  void use(T* memory) {
    auto column = [&] {
      memory += m_ * lanes_;
      return memory - m_ * lanes_;
    };
    c = column(), y = column(), zeros_ = column();
    d = p_.mask.data ? column() : nullptr;
    buffer_ = memory;
    waiting = 0;
    std::fill(ones_, ones_ + lanes_, T(1));
  }

  // Takes up to `most` samples of matrix s from the queue, and on until one of them is to be solved; false when there is none.
  bool read(int64_t s, Queue& queue, int64_t most) {
    while (!waiting) {
      int64_t first;
      const int64_t n = samples_.take(queue, most, &first);
      if (n == 0) return false;
      alignas(64) T largest[kMostLanes], start[kMostLanes] = {}, size2[kMostLanes], factor[kMostLanes], of_start[kMostLanes];
      columns(p_.injection, s, first, n, c);
      lane_.reach(c, m_, largest);
      if (p_.start.data) {
        columns(p_.start, s, first, n, y);
        lane_.reach(y, m_, start);
      }
      if (p_.mask.data) {
        columns(p_.mask, s, first, n, d);
        if (p_.mask_is_value) k_.derivative_of_value(p_.activation, d, m_ * lanes_);
      }
      bool scaled = false;
      std::fill(factor, factor + lanes_, T(1));
      std::fill(of_start, of_start + lanes_, T(1));
      for (int i = 0; i < n; ++i) {
        const int64_t sample = s * p_.batch + first + i;
        if (!samples_.accepts(sample, largest[i], start[i], buffer_)) continue;
        waiting |= uint32_t{1} << i;
        slots[i].sample = sample;
        const auto by = samples_.factors(largest[i], start[i], c + i, d + i, lanes_);
        slots[i].scale = by.injection;
        slots[i].unit = Unit();
        factor[i] = static_cast<T>(by.injection);
        of_start[i] = static_cast<T>(by.start);
        scaled = scaled || factor[i] != 1 || of_start[i] != 1;
      }
      if (scaled) {
        lane_.scale(c, factor, m_);
        if (p_.start.data) lane_.scale(y, of_start, m_);
      }
      // From zero the first evaluation is that of c: no product. Its step and its size are the same.
      const bool is_zero = !p_.start.data;
      lane_.map(LaneMap<T>{is_zero ? c : y, zeros_, is_zero ? d : nullptr, y, m_, is_zero ? p_.activation : kIdentity,
                           is_zero && p_.reflected, factor, size2, ones_});
      nonzero = lane_.nonzero(d ? d : y, m_);
      for (uint32_t rest = waiting; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        double size = static_cast<double>(size2[i]);
        if (!squares_in_range<T>(size)) size = size_of(y, i, lanes_, m_);
        slots[i].start2 = size;
      }
    }
    return true;
  }

  T *c, *y, *d;                // columns: the injections; the first evaluations, or the starts; d null without a mask
  LaneSlot slots[kMostLanes];  // sample, scale and start2, the |y|^2
  uint32_t waiting = 0;        // lanes with samples that nobody has taken yet
  uint64_t nonzero = 0;        // bits of the elements of y, or with a mask of d, that are not zero in every lane

 private:
  void columns(const DeqView& view, int64_t s, int64_t first, int64_t n, T* to) {
    int64_t strides[2];
    const T* from = samples_.block(view, s, first, n, buffer_, strides);
    lane_.columns(from, strides[0], strides[1], n, m_, to);
  }

  const DeqProblem& p_;
  const Kernels<T>& k_;
  const LaneKernels<T>& lane_;
  Samples<T>& samples_;
  const int64_t m_;
  const int lanes_;
  T *zeros_, *buffer_;
  alignas(64) T ones_[kMostLanes];
};

}  // namespace deq
