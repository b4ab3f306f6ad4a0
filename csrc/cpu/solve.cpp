// The row engine: one call solves the whole batch.
//
// Every thread owns a tile of sample slots. A slot holds one sample's iterate, injection and, if needed, its Anderson window;
// all slots of a tile take one step together, so that every panel of W is read once for the tile. A sample that is done
// leaves at once and the slot is refilled from a shared queue. Threads with tiles of their own never wait for each other; where
// there are few samples of a wide matrix, all threads share the steps of one tile (threads.h).
#include <algorithm>
#include <atomic>
#include <utility>

#include "../anderson.h"
#include "../kernels.h"
#include "cache.h"
#include "delta.h"
#include "guarded.h"
#include "lane_engine.h"
#include "look.h"
#include "norms.h"
#include "samples.h"
#include "segments.h"
#include "threads.h"
#include "trace.h"
#include "zeros.h"

namespace deq {

thread_local DeqWork last_work{};

namespace {

constexpr int kLookEvery = 16;  // steps after which rows that had too few zeros are looked at again
// A W far beyond the L2 cache is read faster without gaps; that takes some rows to make up for (2048 x 4: 0.8 x, x 16: 1.2 x).
constexpr int kSkipRows = 8;
constexpr int64_t kSkipWidest = 1024;

thread_local Arena rows_arena, window_arena, result_arena;

template <class T>
struct alignas(64) Slot {
  Record record;  // with the flags, all that the common iteration touches: one cache line
  bool saved;     // the output row holds the best iterate
  bool accelerated;
  bool has_unit;  // other than 1
  T *buffer[2], *pre[2];
  T *c, *d, *sums;
  int64_t sample;  // flat index s * B + b
  double scale;    // the sample was multiplied by this power of two
  Unit unit;
  int depth, window, newest;          // Anderson: pairs to hold, those held, ring position of the newest
  int exponent;                       // steps in the window are multiplied by this power of two
  double gram[kMaxDepth][kMaxDepth];  // by ring position
};

template <class T>
class Tile {
 public:
  Tile(const DeqProblem& p, const Packed& packed, Totals& totals)
      : p_(p),
        k_(kernels<T>()),
        samples_(p, totals),
        packed_(packed),
        totals_(totals),
        m_(p.width),
        padded_(samples_.padded()),
        rule_(make_rule(p.tol, p.max_iter, p.criterion, p.width, sizeof(T) == 8)),
        segments_(m_, padded_),
        depth_(std::min<int>(std::max(p.depth, 1), kMaxDepth)),
        may_skip_(!p.reflected && (p.mask.data || p.activation == kRelu)) {}

  // Solves samples of matrix s taken from `queue`, as `sharing` threads do, until it is empty; the team shares the steps.
  void run(int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    matrix_ = s;
    if (!reserve(sharing, team.members())) {
      totals_.error = DEQ_NO_MEMORY;
      return;
    }
    // Position a of the arrays belongs to slot at[a]; row[current] is what the next step reads.
    T *row[2][kMaxTile], *pre[2][kMaxTile], *c[kMaxTile], *d[kMaxTile], *sums[kMaxTile];
    double totals[2 * kMaxTile];
    int at[kMaxTile], n = 0;
    samples_.reserve(queue, size_);
    for (; n < size_ && fill(slots_[n], queue); ++n) {
      const Slot<T>& slot = slots_[at[n] = n];
      row[0][n] = slot.buffer[0];
      row[1][n] = slot.buffer[1];
      pre[0][n] = slot.pre[0];
      pre[1][n] = slot.pre[1];
      c[n] = slot.c;
      d[n] = slot.d;
      sums[n] = slot.sums;
    }
    const T* w = static_cast<const T*>(packed_.data) + s * (packed_.matrix_bytes / static_cast<int64_t>(sizeof(T)));
    while (n > 0) {
      evaluate(Step<T>{row[current_], row[1 - current_], c, p_.mask.data ? d : nullptr, sums, totals, w, m_, p_.activation, 0, 0,
                       padded_, nonzeros_, total_, p_.reflected ? pre[1 - current_] : nullptr},
               n, team);
      current_ = 1 - current_;
      for (int a = 0; a < n;) {
        Slot<T>& slot = slots_[at[a]];
        const double step2 = totals[2 * a], size2 = totals[2 * a + 1];
        if (goes_on(slot, step2, size2) || advance(slot, step2, size2) || fill(slot, queue)) {
          ++a;
          continue;
        }
        if (a == --n) break;  // the last position takes the free one
        at[a] = at[n];
        row[0][a] = row[0][n];
        row[1][a] = row[1][n];
        pre[0][a] = pre[0][n];
        pre[1][a] = pre[1][n];
        c[a] = c[n];
        d[a] = d[n];
        sums[a] = sums[n];
        totals[2 * a] = totals[2 * n];
        totals[2 * a + 1] = totals[2 * n + 1];
      }
    }
    totals_.add(work_);
    rows_arena.trim();
    window_arena.trim();
  }

 private:
  bool reserve(int sharing, int members) {
    const int64_t stride = padded_ + kRowSkew / static_cast<int64_t>(sizeof(T));
    const int rows = 3 + (p_.mask.data ? 1 : 0) + (p_.reflected ? 2 : 0);
    const int held = rows + (p_.acceleration == DEQ_ANDERSON ? 2 * depth_ : 0);  // a window is read as often as the rows
    const int64_t share = (p_.batch + sharing - 1) / sharing;
    size_ = static_cast<int>(std::min(tile_size(k_, held, stride), share));
    const int64_t sums = 2 * k_.lanes * segments_.count, per_slot = rows * stride + sums;
    result_ = p_.reflected ? static_cast<T*>(result_arena.get(padded_ * static_cast<int64_t>(sizeof(T)))) : nullptr;
    if (p_.reflected && !result_) return false;
    const int64_t words = (m_ + 63) / 64 * static_cast<int64_t>(sizeof(uint64_t) / sizeof(T));
    T* at = static_cast<T*>(rows_arena.get(size_ * (per_slot + members * kSkipWidth + words) * static_cast<int64_t>(sizeof(T))));
    if (!at) return false;
    for (int i = 0; i < size_; ++i, at += per_slot) {
      slots_[i].sums = at;
      slots_[i].buffer[0] = at + sums;
      slots_[i].buffer[1] = at + sums + stride;
      slots_[i].c = at + sums + 2 * stride;
      T* more = at + sums + 3 * stride;
      slots_[i].d = p_.mask.data ? std::exchange(more, more + stride) : nullptr;
      for (T*& pre : slots_[i].pre) pre = p_.reflected ? std::exchange(more, more + stride) : nullptr;
    }
    total_ = at;
    nonzeros_ = reinterpret_cast<uint64_t*>(at + size_ * members * kSkipWidth);
    stride_ = stride;
    window_ = nullptr;
    return true;
  }

  // One application of the map to n rows, without the products with zeros where there are enough of them.
  void evaluate(const Step<T>& step, int n, Team& team) {
    const bool looks = may_skip_ && (n >= kSkipRows || m_ <= kSkipWidest) && --looks_again_ <= 0;
    const auto compute = zeros_.choose(k_, step, n, looks, team);
    const Range range(Span::kStep, n);
    team.share([&](int segment, int member) {
      Step<T> part = step;
      part.segment = segment;
      part.from = segments_.start[segment];
      part.to = segments_.start[segment + 1];
      part.total += member * size_ * kSkipWidth;
      part.found = zeros_.found(segment);
      compute(part, n);
    });
    work_.native_rows += n;
    work_.native_products += zeros_.finish() * m_;
    ++work_.native_sweeps;
    if (looks && !zeros_.skipped()) looks_again_ = kLookEvery;
    k_.add_up(step, n, segments_.count);
  }

  // Takes the next sample of the queue that is not done at once; false when there is none.
  bool fill(Slot<T>& slot, std::atomic<int64_t>& queue) {
    T* y = slot.buffer[current_];
    while ((slot.sample = samples_.take(matrix_, queue, slot.c, slot.d, y, &slot.scale)) >= 0) {
      slot.record = new_record();
      slot.unit = Unit();
      slot.saved = slot.has_unit = false;
      slot.accelerated = p_.acceleration == DEQ_ANDERSON;
      slot.window = 0;
      slot.depth = depth_;
      slot.exponent = 0;
      if (p_.start.data) {
        if (p_.reflected) std::copy(y, y + padded_, slot.pre[current_]);  // handed out if not even f(y) is finite
        return true;
      }
      // From zero the first evaluation is act(c): no product. Its step and its size are the same.
      double size2 = k_.first(p_.activation, slot.c, slot.d, y, m_), step2 = size2;
      if (p_.reflected) {
        std::copy(slot.c, slot.c + padded_, slot.pre[current_]);
        for (int64_t j = 0; j < m_; ++j) y[j] += y[j] - slot.c[j];
        step2 = size2 = size_of(y, m_);
      }
      if (!squares_in_range<T>(size2)) measure(slot, y, nullptr, &step2, &size2);
      const Verdict verdict = judge(rule_, slot.record, step2, size2, 0.0);
      if (verdict == Verdict::kContinue) return true;
      finish(slot, verdict, y);
    }
    return false;
  }

  // The common iteration, apart from advance(): nothing to decide, nothing to write.
  bool goes_on(Slot<T>& slot, double step2, double size2) {
    if (slot.accelerated || slot.has_unit || !squares_in_range<T>(size2) || !progresses(rule_, slot.record, step2, size2))
      return false;
    slot.saved = false;
    return true;
  }

  // Judges the evaluation just made and prepares the next iterate; false when the sample is done.
  bool advance(Slot<T>& slot, double step2, double size2) {
    T *f = slot.buffer[current_], *y = slot.buffer[1 - current_];
    if (!squares_in_range<T>(size2, step2) || slot.has_unit) measure(slot, f, y, &step2, &size2);
    const double start2 = slot.record.iteration == 0 ? size_of(y, m_, slot.unit.value()) : 0.0, before2 = slot.record.step2[1];
    const Verdict verdict = judge(rule_, slot.record, step2, size2, start2);
    const bool is_best = slot.record.best_at == slot.record.iteration;
    if (is_best) {
      slot.saved = false;
    } else if (!slot.saved) {
      // The previous evaluation was the best: f of it is the iterate just left, or the newest of the window.
      const T* best = slot.accelerated && slot.window ? window_row(slot, slot.newest, 0) : y;
      samples_.write(slot.sample, slot.scale, result(slot, 1 - current_, best));
      slot.saved = true;
    }
    if (verdict != Verdict::kContinue) {
      finish(slot, verdict, is_best ? f : nullptr);
      return false;
    }
    if (p_.acceleration == DEQ_ON_DEMAND && !slot.accelerated) slot.accelerated = is_slow(slot.record, before2);
    if (slot.accelerated) accelerate(slot, f, y);
    return true;
  }

  void measure(Slot<T>& slot, const T* f, const T* y, double* step2, double* size2) {
    slot.unit.measure(slot.record, !samples_.rescales(), f, y, m_, step2, size2);
    slot.has_unit = !slot.unit.is_one();
  }

  // What is handed out for f(y): itself, or for the reflected map the value at its pre-activation.
  const T* result(const Slot<T>& slot, int which, const T* f) {
    if (!p_.reflected) return f;
    k_.first(p_.activation, slot.pre[which], slot.d, result_, m_);
    return result_;
  }

  // `best` null: the output row already holds the best iterate.
  void finish(Slot<T>& slot, Verdict verdict, const T* best) {
    // One that left the range of the caller's dtype has diverged.
    if (best && !samples_.write(slot.sample, slot.scale, result(slot, current_, best))) verdict = Verdict::kDiverged;
    samples_.report(slot.sample, slot.record, verdict);
  }

  // Row `ring` of the slot's window: part 0 holds f(y), part 1 f(y) - y.
  T* window_row(const Slot<T>& slot, int ring, int part) {
    return window_ + (((&slot - slots_) * depth_ + ring) * 2 + part) * stride_;
  }

  // Anderson: replaces f by the mixture of the window. One new row of the Gram matrix; the rest is remembered.
  void accelerate(Slot<T>& slot, T* f, const T* y) {
    const Range range(Span::kAnderson, std::min(slot.window + 1, depth_));
    if (!window_) {
      window_ = static_cast<T*>(window_arena.get(size_ * depth_ * 2 * stride_ * static_cast<int64_t>(sizeof(T))));
      if (!window_) {
        totals_.error = DEQ_NO_MEMORY;
        return;
      }
    }
    fit_window(slot);
    slot.newest = slot.window ? (slot.newest + 1) % depth_ : 0;
    slot.window = std::min(slot.window + 1, slot.depth);
    k_.residual(f, y, window_row(slot, slot.newest, 0), window_row(slot, slot.newest, 1), padded_);
    if (slot.exponent) k_.scale(window_row(slot, slot.newest, 1), std::ldexp(T(1), slot.exponent), padded_);
    int ring[kMaxDepth];
    const T *F[kMaxDepth], *G[kMaxDepth];
    for (int i = 0; i < slot.window; ++i) {
      ring[i] = (slot.newest - i + depth_) % depth_;
      F[i] = window_row(slot, ring[i], 0);
      G[i] = window_row(slot, ring[i], 1);
    }
    double dots[kMaxDepth];
    k_.dots(G[0], G, slot.window, padded_, dots);
    for (int i = 0; i < slot.window; ++i) slot.gram[slot.newest][ring[i]] = slot.gram[ring[i]][slot.newest] = dots[i];
    if (slot.window == 2 && p_.acceleration == DEQ_ON_DEMAND)
      slot.depth = useful_depth(dots[1], dots[0], slot.gram[ring[1]][ring[1]], depth_);
    double gram[kMaxDepth][kMaxDepth], weights[kMaxDepth];
    for (int i = 0; i < slot.window; ++i)
      for (int j = 0; j < slot.window; ++j) gram[i][j] = slot.gram[ring[i]][ring[j]];
    for (int count = slot.window; count > 1; --count) {
      if (!anderson_weights(gram, count, 10 * rule_.eps, weights)) continue;
      T w[kMaxDepth];
      for (int i = 0; i < count; ++i) w[i] = static_cast<T>(weights[i]);
      k_.mix(F, w, count, padded_, f);
      return;
    }
  }

  // Takes the steps in the window to where the products with one as long as the last are in the range of T: of an activation that
  // is not homogeneous they are as small or as large as the sample.
  void fit_window(Slot<T>& slot) {
    const int exponent = exponent_of_steps<T>(slot.record.step2[0], slot.unit.value()), shift = exponent - slot.exponent;
    slot.exponent = exponent;
    if (!shift) return;
    for (int i = 0; i < slot.window; ++i) {
      const int ring = (slot.newest - i + depth_) % depth_;
      k_.scale(window_row(slot, ring, 1), std::ldexp(T(1), shift), padded_);
      for (int j = 0; j < slot.window; ++j) {
        double& product = slot.gram[ring][(slot.newest - j + depth_) % depth_];
        product = std::ldexp(product, 2 * shift);
      }
    }
  }

  const DeqProblem& p_;
  const Kernels<T>& k_;
  Samples<T> samples_;
  const Packed& packed_;
  Totals& totals_;
  const int64_t m_, padded_;
  const Rule rule_;
  const Segments segments_;
  const int depth_;
  const bool may_skip_;
  int64_t matrix_ = 0, stride_ = 0;
  int size_ = 0, current_ = 0;
  DeqWork work_{};
  int looks_again_ = 0;  // steps until the zeros are counted again
  Zeros<T> zeros_;
  T *window_ = nullptr, *total_ = nullptr, *result_ = nullptr;
  uint64_t* nonzeros_ = nullptr;
  Slot<T> slots_[kMaxTile];
};

template <class T>
int32_t solve(const DeqProblem& p) {
  const int64_t lanes = kernels<T>().lanes;
  const Segments segments(p.width, (p.width + lanes - 1) / lanes * lanes);
  const Division division = divide(p, segments.count);
  const Weights weights = packed_weights<T>(p, division.threads);
  *p.report = DeqReport{0, weights.bad_element, 0, 0};
  if (weights.bad_element) return DEQ_OK;
  if (!weights.packed) return DEQ_NO_MEMORY;
  Totals totals;
  run_divided(p, segments.count, division, [&](int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    run_on(new (std::nothrow) Tile<T>(p, *weights.packed, totals), totals, s, queue, sharing, team);
  });
  return totals.report(p);
}

template <class T>
int32_t derivative(const DeqProblem& p) {
  const Kernels<T>& k = kernels<T>();
  const int64_t m = p.width, padded = (m + k.lanes - 1) / k.lanes * k.lanes;
  constexpr double kWorth = 1e6;  // flops: 10 microseconds, once
  const bool is_worth = 2.0 * p.weights * p.batch * m * m >= kWorth;
  const int threads = is_worth ? static_cast<int>(std::min<int64_t>(std::max(p.threads, 1), p.weights * p.batch)) : 1;
  const Weights weights = packed_weights<T>(p, threads);
  if (weights.bad_element) return DEQ_BAD_ARGUMENT;
  if (!weights.packed) return DEQ_NO_MEMORY;
  const Packed& packed = *weights.packed;
  const int64_t tiles = (p.batch + k.rows - 1) / k.rows;
  std::atomic<int32_t> error{DEQ_OK};
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < p.weights * tiles; ++i) {
    const int64_t s = i / tiles, first = i % tiles * k.rows;
    const int n = static_cast<int>(std::min<int64_t>(k.rows, p.batch - first));
    T* memory = static_cast<T*>(rows_arena.get(3 * n * padded * static_cast<int64_t>(sizeof(T))));
    if (!memory) {
      error = DEQ_NO_MEMORY;
      continue;
    }
    const T *z[kMaxTile], *c[kMaxTile];
    T* out[kMaxTile];
    for (int r = 0; r < n; ++r) {
      T* row = memory + 3 * r * padded;
      auto read = [&](const DeqView& view, T* dst) {
        load_row<T>(view, p.type, s * view.stride[0] + (first + r) * view.stride[1], T(1), m, dst);
        std::fill(dst + m, dst + padded, T(0));
        return dst;
      };
      z[r] = read(p.start, row);
      c[r] = read(p.injection, row + padded);
      out[r] = row + 2 * padded;
    }
    const T* w = static_cast<const T*>(packed.data) + s * (packed.matrix_bytes / static_cast<int64_t>(sizeof(T)));
    k.derivative(Step<T>{z, out, c, nullptr, nullptr, nullptr, w, m, p.activation, 0, 0, padded}, n);
    for (int r = 0; r < n; ++r) store_row<T>(p.out, p.type, s * p.out.stride[0] + (first + r) * p.out.stride[1], T(1), m, out[r]);
    rows_arena.trim();
  }
  return error;
}

// What every call has.
bool has_form(const DeqProblem* p) {
  return p && p->weights >= 0 && p->batch >= 0 && p->width >= 1 && p->type >= DEQ_FLOAT32 && p->type <= DEQ_FLOAT16 &&
         p->activation >= 0 && p->activation < kActivations;
}

bool well_formed(const DeqProblem* p) {
  return has_form(p) && p->max_iter >= 1 && p->report && !(p->mask.data && p->mask_is_value && !has_of_value(p->activation));
}

}  // namespace
}  // namespace deq

int32_t deq_cpu_solve(const DeqProblem* p) {
  if (!deq::well_formed(p)) return DEQ_BAD_ARGUMENT;
  *p->report = DeqReport{0, 0, 0, 0};
  deq::last_work = DeqWork{};
  if (p->weights * p->batch == 0) return DEQ_OK;
  if (p->largest_weight > 0 && deq::is_larger(*p, p->largest_weight)) {
    p->report->bad_weight = -1;
    std::fill_n(p->iterations, p->weights * p->batch, 0);  // who counts work counts none
    return DEQ_OK;
  }
  return deq::guarded([&] {
    if (deq::delta_serves(*p)) return deq::delta_solve(*p);
    if (deq::lanes_serve(*p)) return deq::lane_solve(*p);
    return p->type == DEQ_FLOAT64 ? deq::solve<double>(*p) : deq::solve<float>(*p);
  });
}

void deq_cpu_last_work(DeqWork* work) { *work = deq::last_work; }

int32_t deq_cpu_derivative(const DeqProblem* p) {
  if (!deq::has_form(p)) return DEQ_BAD_ARGUMENT;
  if (p->weights * p->batch == 0) return DEQ_OK;
  return deq::guarded([&] { return p->type == DEQ_FLOAT64 ? deq::derivative<double>(*p) : deq::derivative<float>(*p); });
}
