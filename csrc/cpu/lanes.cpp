// The lane engine: the row engine's slots as the lanes of vectors, for narrow weights.
//
// Every thread owns a group of as many samples as a vector has lanes. A step of the group costs what it costs for one sample, and
// nothing is done sample by sample but what is out of the ordinary: reading and writing rows, the first evaluation, the common
// judgement, Anderson's Gram matrix, its equations and its mixture are vectors too. A sample that is done keeps its lane, and its
// numbers, until some more are: they leave and others enter together. Lanes do not touch each other, so that a sample's answer
// does not depend on its batch mates. What the two engines do to a sample is the same; their residuals are summed in another
// order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../anderson.h"
#include "../kernels.h"
#include "cache.h"
#include "lane_engine.h"
#include "lane_intake.h"
#include "norms.h"
#include "samples.h"
#include "threads.h"
#include "trace.h"

namespace deq {
namespace {

thread_local Arena lanes_arena;

// With so few samples left of a group their products are formed row by row.
constexpr int kFewRows = 4;
constexpr int64_t kFewFrom = 24;

template <class T>
class LaneGroup {
 public:
  LaneGroup(const DeqProblem& p, const Packed& packed, Totals& totals)
      : p_(p),
        k_(kernels<T>()),
        lane_(*k_.lane()),
        samples_(p, totals),
        intake_(p, samples_),
        packed_(packed),
        totals_(totals),
        m_(p.width),
        lanes_(lane_.lanes),
        rule_(make_rule(p.tol, p.max_iter, p.criterion, p.width, sizeof(T) == 8)),
        sweeps_(!p.reflected && (p.mask.data ? !p.start.data : p.activation == kRelu)),
        all_(~uint64_t{0} >> (64 - p.width)),
        depth_(std::min<int>(std::max(p.depth, 1), kMaxDepth)),
        reach2_(1 / (rule_.eps * rule_.eps * rule_.eps * rule_.eps)) {}

  // Solves samples of matrix s taken from `queue`, as `sharing` threads do, until it is empty.
  void run(int64_t s, std::atomic<int64_t>& queue, int sharing) {
    matrix_ = s;
    if (!reserve()) {
      totals_.error = DEQ_NO_MEMORY;
      return;
    }
    most_ = static_cast<int>(std::min<int64_t>(lanes_, (p_.batch + sharing - 1) / sharing));
    enter(queue);
    while (live_) {
      step();
      current_ = 1 - current_;
      const LaneNews news = lane_.look(records_, alive_, step2_, size2_, static_cast<T>(rule_.tol2), static_cast<T>(rule_.leave2),
                                       static_cast<T>(reach2_));
      for (uint32_t rest = news.other; rest; rest &= rest - 1)
        if (const int lane = __builtin_ctz(rest); !advance(lane)) set_live(lane, false);
      for (uint32_t rest = news.converged; rest; rest &= rest - 1) set_live(__builtin_ctz(rest), false);
      done_ |= news.converged;
      uint32_t fresh = 0;
      // The pre-activations of a reflected map are not kept.
      if (done_ && (p_.reflected || !live_)) leave();
      if (most_ - __builtin_popcount(live_) >= (lanes_ + 3) / 4 || !live_) {
        leave();
        fresh = enter(queue);
      }
      if (const uint32_t now = accelerated_ & live_ & ~fresh) accelerate(now);
    }
    totals_.add(work_);
    lanes_arena.trim();
  }

 private:
  static uint32_t bit(int lane) { return uint32_t{1} << lane; }

  // Columns of the group, then rows: an injection a lane, what the products of a few rows need, one to gather in, and one a lane.
  bool reserve() {
    const bool accelerates = p_.acceleration != DEQ_PLAIN;
    const int64_t column = m_ * lanes_, padded = samples_.padded();
    const int64_t columns = 3 + (p_.mask.data ? 1 : 0) + (p_.reflected ? 2 : 0) + (accelerates ? 2 * depth_ : 0);
    const int64_t rows = 2 * lanes_ + 2 * kFewRows + 3, sums = 2 * lanes_ * kFewRows;
    const int64_t elements = columns * column + intake_.elements() + rows * padded + sums + m_ * m_;
    T* at = static_cast<T*>(lanes_arena.get(elements * static_cast<int64_t>(sizeof(T))));
    if (!at) return false;
    std::fill(at, at + elements - (accelerates ? 2 * depth_ * column : 0), T(0));
    auto take = [&](int64_t count) {
      at += count;
      return at - count;
    };
    z_[0] = take(column);
    z_[1] = take(column);
    c_ = take(column);
    d_ = p_.mask.data ? take(column) : nullptr;
    for (T*& pre : pre_) pre = p_.reflected ? take(column) : nullptr;
    intake_.use(take(intake_.elements()));
    for (int i = 0; i < lanes_; ++i) c_rows_[i] = take(padded);
    for (int i = 0; i < kFewRows; ++i) {
      z_rows_[i] = take(padded);
      x_rows_[i] = take(padded);
      ones_rows_[i] = at;
    }
    std::fill(take(padded), at + padded, T(1));
    for (T*& row : ones_rows_) row = at - padded;
    row_ = take(padded);
    other_ = take(padded);
    rows_ = take(lanes_ * padded);
    for (int i = 0; i < kFewRows; ++i) sums_[i] = take(2 * lanes_);
    for (int i = 0; accelerates && i < depth_; ++i) {
      windows_.f[i] = take(column);
      windows_.g[i] = take(column);
    }
    w_ = static_cast<const T*>(packed_.data) + matrix_ * (packed_.matrix_bytes / static_cast<int64_t>(sizeof(T)));
    if (sweeps_) flatten(take(m_ * m_));
    live_ = done_ = accelerated_ = gathered_ = 0;
    std::fill(alive_, alive_ + lanes_, T(0));
    newest_ = 0;
    nonzero_ = 0;
    return true;
  }

  // The panels of the packed weight side by side.
  void flatten(T* to) {
    flat_ = to;
    const T* from = w_;
    for (int64_t j = 0; j < m_; j += k_.panel) {
      const int64_t stride = std::min<int64_t>(samples_.padded() - j, k_.panel), columns = std::min<int64_t>(m_ - j, stride);
      for (int64_t k = 0; k < m_; ++k, from += stride) std::copy(from, from + columns, to + k * m_ + j);
    }
  }

  void set_live(int lane, bool live) {
    live_ = live ? live_ | bit(lane) : live_ & ~bit(lane);
    alive_[lane] = live ? T(1) : T(0);
    windows_.held[lane] = 0;
  }

  void gather(const T* column, int lane, T* row) const {
    for (int64_t j = 0; j < m_; ++j) row[j] = column[j * lanes_ + lane];
  }
  void scatter(const T* row, int lane, T* column) const {
    for (int64_t j = 0; j < m_; ++j) column[j * lanes_ + lane] = row[j];
  }

  // One evaluation of the map in every lane.
  void step() {
    const T* z = z_[current_];
    T *out = z_[1 - current_], *x = p_.reflected ? pre_[1 - current_] : out;
    const int count = __builtin_popcount(live_);
    const Range range(Span::kStep, count);
    const bool by_row = count <= std::min(kFewRows, lanes_ / 4) && m_ >= kFewFrom;
    work_.native_rows += count;
    ++work_.native_sweeps;
    if (sweeps_ && !by_row) {
      const int64_t inputs = __builtin_popcountll(nonzero_);
      work_.native_products += lanes_ * inputs * (d_ ? inputs : m_);
      nonzero_ = lane_.sweep(LaneSweep<T>{flat_, z, c_, d_, out, m_, nonzero_, alive_, live_ | done_, step2_, size2_});
      return;
    }
    work_.native_products += (by_row ? count : lanes_) * m_ * m_;
    nonzero_ = all_;
    if (by_row) {
      int lane[kFewRows], n = 0;
      const T* c[kFewRows];
      for (uint32_t rest = live_; rest; rest &= rest - 1, ++n) {
        lane[n] = __builtin_ctz(rest);
        c[n] = c_rows_[lane[n]];
        if (!(gathered_ & bit(lane[n]))) gather(c_, lane[n], c_rows_[lane[n]]);
        gathered_ |= bit(lane[n]);
        gather(z, lane[n], z_rows_[n]);
      }
      // With the mask 1 it is W z + c.
      k_.step(Step<T>{z_rows_, x_rows_, c, ones_rows_, sums_, nullptr, w_, m_, kIdentity, 0, 0, samples_.padded()}, n);
      for (int i = 0; i < n; ++i) scatter(x_rows_[i], lane[i], x);
    } else {
      lane_.product(LaneProduct<T>{w_, z, c_, x, m_});
    }
    lane_.map(LaneMap<T>{x, z, d_, out, m_, p_.activation, p_.reflected != 0, step2_, size2_, alive_});
  }

  // Puts samples of the queue into free lanes; returns those that it filled.
  uint32_t enter(std::atomic<int64_t>& queue) {
    uint32_t entered = 0;
    for (int open = most_ - __builtin_popcount(live_); open > 0 && intake_.read(matrix_, queue, most_);) {
      LaneMove<T> from;
      std::fill(from, from + lanes_, -1);
      uint32_t now = 0;
      for (int lane = 0; lane < most_ && intake_.waiting; ++lane) {
        if (live_ & bit(lane)) continue;
        const int place = __builtin_ctz(intake_.waiting);
        intake_.waiting &= intake_.waiting - 1;
        if (!begin(lane, place)) continue;
        from[lane] = place;
        now |= bit(lane);
        --open;
      }
      if (!now) continue;
      lane_.move(intake_.c, from, m_, c_);
      lane_.move(intake_.y, from, m_, z_[current_]);
      if (sweeps_ && d_) lane_.move(intake_.y, from, m_, z_[1 - current_]);  // of elements left out both must be zero
      nonzero_ |= intake_.nonzero;
      if (d_) lane_.move(intake_.d, from, m_, d_);
      // A start is handed out if not even its evaluation is finite.
      if (p_.reflected) lane_.move(p_.start.data ? intake_.y : intake_.c, from, m_, pre_[current_]);
      entered |= now;
    }
    gathered_ &= ~entered;
    return entered;
  }

  // The sample at this place of the intake begins in a lane; false if it is done at once.
  bool begin(int lane, int place) {
    LaneSlot& slot = slots_[lane];
    slot = intake_.slots[place];
    slot.record = new_record();
    slot.saved = false;
    slot.depth = depth_;
    exponent_[lane] = 0;
    windows_.factor[lane] = T(1);
    accelerated_ = p_.acceleration == DEQ_ANDERSON ? accelerated_ | bit(lane) : accelerated_ & ~bit(lane);
    if (!p_.start.data) {
      double size2 = slot.start2, step2 = size2;
      slot.start2 = 0;
      if (!squares_in_range<T>(size2)) {
        gather(intake_.y, place, row_);
        slot.unit.measure(slot.record, !samples_.rescales(), row_, static_cast<T*>(nullptr), m_, &step2, &size2);
      }
      const Verdict verdict = judge(rule_, slot.record, step2, size2, 0.0);
      if (verdict != Verdict::kContinue) {
        finish(slot, place, verdict, {intake_.y, intake_.c, intake_.d});
        return false;
      }
    }
    set_live(lane, true);
    remember(lane);
    return true;
  }

  // The samples that are done leave with the current iterate.
  void leave() {
    if (!done_) return;
    const bool together = !p_.reflected && __builtin_popcount(done_) > lanes_ / 8;
    const int64_t padded = samples_.padded();
    if (together) lane_.rows(z_[current_], m_, rows_, padded);
    for (; done_; done_ &= done_ - 1) {
      const int lane = __builtin_ctz(done_);
      const LaneSlot& slot = slots_[lane];
      const bool fits = together ? samples_.write(slot.sample, slot.scale, rows_ + lane * padded) : write(slot, lane, newest());
      const T residual = std::sqrt(records_.best_step2[lane] / records_.best_size2[lane]);
      samples_.report(slot.sample, slot.record.iteration + unseen(lane), residual,
                      fits ? Verdict::kConverged : Verdict::kDiverged);
    }
  }

  // Judges the evaluation just made in a lane; false when its sample is done.
  bool advance(int lane) {
    LaneSlot& slot = slots_[lane];
    recall(lane);
    T *f = z_[current_], *y = z_[1 - current_];
    double step2 = static_cast<double>(step2_[lane]), size2 = static_cast<double>(size2_[lane]);
    if (!squares_in_range<T>(size2, step2) || !slot.unit.is_one()) {
      gather(f, lane, row_);
      gather(y, lane, other_);
      slot.unit.measure(slot.record, !samples_.rescales(), row_, other_, m_, &step2, &size2);
      if (slot.record.iteration == 0 && p_.start.data) slot.start2 = size_of(other_, m_, slot.unit.value());
    }
    const double before2 = slot.record.step2[1];
    const Verdict verdict = judge(rule_, slot.record, step2, size2, slot.start2);
    const bool is_best = slot.record.best_at == slot.record.iteration;
    if (is_best) {
      slot.saved = false;
    } else if (!slot.saved) {
      // The previous evaluation was the best: f of it is the iterate just left, or the newest of the window.
      write(slot, lane, {windows_.held[lane] > 0 ? windows_.f[newest_] : y, pre_[1 - current_], d_});
      slot.saved = true;
    }
    if (verdict != Verdict::kContinue) {
      is_best ? finish(slot, lane, verdict, newest()) : report(slot, verdict);
      return false;
    }
    if (p_.acceleration == DEQ_ON_DEMAND && !(accelerated_ & bit(lane)) && is_slow(slot.record, before2))
      accelerated_ |= bit(lane);
    if (accelerated_ & bit(lane)) fit_window(lane);
    remember(lane);
    return true;
  }

  // The columns that look() works on, from the record and back.
  void remember(int lane) {
    const Record& record = slots_[lane].record;
    records_.step2[lane] = static_cast<T>(record.step2[0]);
    records_.before2[lane] = static_cast<T>(record.step2[1]);
    records_.best_step2[lane] = static_cast<T>(record.best_step2);
    records_.best_size2[lane] = static_cast<T>(record.best_size2);
    records_.limit2[lane] = static_cast<T>(record.limit2);
    // A slow one is looked at until it is accelerated, the others only if they gain nothing.
    const bool watched = p_.acceleration == DEQ_ON_DEMAND && !(accelerated_ & bit(lane));
    records_.slowest[lane] = watched ? static_cast<T>(kSlowContraction * kSlowContraction) : T(1);
    records_.first2[lane] = static_cast<T>(slots_[lane].start2);
    const bool always = p_.criterion != DEQ_RESIDUAL || !slots_[lane].unit.is_one() || exponent_[lane] != 0 ||
                        (record.iteration == 0 && slots_[lane].start2 > 0 && !squares_in_range<T>(slots_[lane].start2));
    left_[lane] = always ? 0 : static_cast<int>(std::min<int64_t>(rule_.max_iter - record.iteration, kUnseen));
    records_.left[lane] = static_cast<T>(left_[lane]);
  }
  int unseen(int lane) const { return left_[lane] - static_cast<int>(records_.left[lane]); }
  void recall(int lane) {
    Record& record = slots_[lane].record;
    const int steps = unseen(lane);
    if (steps == 0) return;
    slots_[lane].saved = false;
    if (record.iteration == 0) record.limit2 = reach2_ * static_cast<double>(records_.first2[lane]);
    record.best_at = record.iteration += steps;
    record.step2[0] = static_cast<double>(records_.step2[lane]);
    record.step2[1] = static_cast<double>(records_.before2[lane]);
    record.best_step2 = static_cast<double>(records_.best_step2[lane]);
    record.best_size2 = static_cast<double>(records_.best_size2[lane]);
  }

  // Where an evaluation is: f(y), with the reflected map its pre-activation, and with a mask the derivative.
  struct Evaluation {
    const T *value, *pre, *d;
  };
  Evaluation newest() const { return {z_[current_], pre_[current_], d_}; }

  // Hands out a lane: its value, or for the reflected map the value at its pre-activation.
  bool write(const LaneSlot& slot, int lane, const Evaluation& at) {
    gather(p_.reflected ? at.pre : at.value, lane, row_);
    if (p_.reflected) {
      if (at.d) gather(at.d, lane, other_);
      k_.first(p_.activation, row_, at.d ? other_ : nullptr, row_, m_);
    }
    return samples_.write(slot.sample, slot.scale, row_);
  }
  void report(const LaneSlot& slot, Verdict verdict) { samples_.report(slot.sample, slot.record, verdict); }

  // One that left the range of the caller's dtype has diverged.
  void finish(const LaneSlot& slot, int lane, Verdict verdict, const Evaluation& best) {
    report(slot, write(slot, lane, best) ? verdict : Verdict::kDiverged);
  }

  // Anderson: in these lanes f is replaced by the mixture of the window.
  void accelerate(uint32_t now) {
    const Range range(Span::kAnderson, __builtin_popcount(now));
    newest_ = (newest_ + 1) % depth_;
    int count = 0;
    for (uint32_t rest = now; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest), held = std::min(static_cast<int>(windows_.held[lane]) + 1, slots_[lane].depth);
      windows_.held[lane] = static_cast<T>(held);
      count = std::max(count, held);
    }
    int order[kMaxDepth];
    for (int i = 0; i < count; ++i) order[i] = (newest_ - i + depth_) % depth_;
    T *f = z_[current_], *y = z_[1 - current_];
    lane_.take(windows_, order, count, f, y, m_);
    for (uint32_t rest = p_.acceleration == DEQ_ON_DEMAND ? now : 0; rest; rest &= rest - 1)
      if (const int lane = __builtin_ctz(rest); windows_.held[lane] == 2)
        slots_[lane].depth = useful_depth(static_cast<double>(windows_.gram[order[0]][order[1]][lane]),
                                          static_cast<double>(windows_.gram[order[0]][order[0]][lane]),
                                          static_cast<double>(windows_.gram[order[1]][order[1]][lane]), depth_);
    if (count > 1) lane_.mix(windows_, order, count, static_cast<T>(10 * rule_.eps), f, m_);
    if (!d_) nonzero_ = all_;
  }

  // Takes the lane's steps in the window to where the products with one as long as the last are in the range of T: of an
  // activation that is not homogeneous they are as small or as large as the sample.
  void fit_window(int lane) {
    const LaneSlot& slot = slots_[lane];
    const int exponent = exponent_of_steps<T>(slot.record.step2[0], slot.unit.value()), shift = exponent - exponent_[lane];
    if (!shift) return;
    exponent_[lane] = exponent;
    windows_.factor[lane] = std::ldexp(T(1), exponent);
    if (windows_.held[lane] == 0) return;
    for (int i = 0; i < depth_; ++i) {
      for (int64_t j = 0; j < m_; ++j) {
        T& step = windows_.g[i][j * lanes_ + lane];
        step = std::ldexp(step, shift);
      }
      for (int k = 0; k < depth_; ++k) windows_.gram[i][k][lane] = std::ldexp(windows_.gram[i][k][lane], 2 * shift);
    }
  }

  static constexpr int64_t kUnseen = 1 << 20;  // an integer in every T

  const DeqProblem& p_;
  const Kernels<T>& k_;
  const LaneKernels<T>& lane_;
  Samples<T> samples_;
  LaneIntake<T> intake_;
  const Packed& packed_;
  Totals& totals_;
  const int64_t m_;
  const int lanes_;
  const Rule rule_;
  const bool sweeps_;   // product and map at once
  const uint64_t all_;  // a bit for every element
  const int depth_;
  const double reach2_;  // limit2 of a Record over the size that it follows from
  int64_t matrix_ = 0;
  int current_ = 0, newest_ = 0;
  int most_ = 0;          // lanes in use
  uint64_t nonzero_ = 0;  // elements that sweeps need
  DeqWork work_{};
  uint32_t live_ = 0, accelerated_ = 0;
  uint32_t done_ = 0;      // converged, and still in their lanes
  uint32_t gathered_ = 0;  // their injections are in c_rows_
  const T *w_ = nullptr, *flat_ = nullptr;
  T *z_[2], *pre_[2], *c_, *d_, *row_, *other_, *rows_;
  T *c_rows_[kMostLanes], *z_rows_[kFewRows], *x_rows_[kFewRows], *ones_rows_[kFewRows], *sums_[kFewRows];
  LaneRecords<T> records_{};
  LaneWindows<T> windows_{};
  alignas(64) T step2_[kMostLanes], size2_[kMostLanes], alive_[kMostLanes];
  int left_[kMostLanes];
  int exponent_[kMostLanes] = {};  // of windows_.factor
  LaneSlot slots_[kMostLanes];
};

template <class T>
int32_t solve(const DeqProblem& p) {
  const Division division = divide(p, 1);
  const Weights weights = packed_weights<T>(p, division.threads);
  *p.report = DeqReport{0, weights.bad_element, 0, 0};
  if (weights.bad_element) return DEQ_OK;
  if (!weights.packed) return DEQ_NO_MEMORY;
  Totals totals;
  run_divided(p, 1, division, [&](int64_t s, std::atomic<int64_t>& queue, int sharing, Team&) {
    run_on(new (std::nothrow) LaneGroup<T>(p, *weights.packed, totals), totals, s, queue, sharing);
  });
  return totals.report(p);
}

}  // namespace

bool lanes_serve(const DeqProblem& p) {
  return p.width <= kLaneVectors * (p.type == DEQ_FLOAT64 ? kernels<double>().lanes : kernels<float>().lanes);
}

int32_t lane_solve(const DeqProblem& p) { return p.type == DEQ_FLOAT64 ? solve<double>(p) : solve<float>(p); }

}  // namespace deq
