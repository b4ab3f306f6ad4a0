// The delta engine: the row engine's tile of sample slots, where most evaluations are low-precision steps on increments.
//
// Every sample decides from its own numbers when to go back to float32 (an anchor), and only anchors are judged: a sample is
// converged on a float32 residual, by the rule of the row engine. One that gains nothing from a run of steps goes on in float32
// alone. Integer sums are exact in any order and the other sums run in the same order in every tile shape, so that a sample's
// answer does not depend on its batch mates.
#include "delta.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "../judge.h"
#include "samples.h"
#include "segments.h"
#include "threads.h"
#include "trace.h"

namespace deq {
namespace {

constexpr int kMaxTile = 64;
// Most of a 1 MB L2 for the rows of a tile: the panels of W that stream through are a quarter as large as in float32.
constexpr int64_t kTileBytes = 768 << 10;
// Rows start this many bytes apart modulo 4096, so that the rows of a tile do not share cache sets.
constexpr int64_t kRowSkew = 64;
// Rounding of W leaves about this share of the increments in y, and a correction this share of that: smaller increments than
// what is left gain nothing.
constexpr double kPollution[] = {0, 1e-2, 2e-3}, kRest[] = {0, 1.0 / 254, 1.0 / 512};
// An anchor is expected to pass if the residual to come is this share of the one to leave at.
constexpr double kSafety = 0.85;
// Anchors skip the products with zeros where less than this share of the rows' elements is not zero: 1.25 x the dense kernel for
// 64 rows at m = 256, 512 and 1024, but 0.89 x for (1024, 4) and 0.73 x for (2048, 16) on Zen 4.
constexpr double kSkipBelow = 0.65;
constexpr int kSkipRows = 16;
constexpr int64_t kSkipUpTo = 1024;
// Steps to come for which a sample is handed over: what accelerated float32 evaluations on the Cayley map cost instead.
constexpr double kMostSteps = 100;
constexpr int kMaxRun = 64;  // steps before an anchor is due in any case
// Increments are expected to shrink like the last one, with this allowance; a wrong guess costs digits or is cut off, never lost.
constexpr double kHeadroom = 1.3, kLeastRatio = 0.1, kMostRatio = 4;

thread_local Arena rows_arena;

enum class Next : uint8_t { kStep, kCorrectedStep, kAnchor };

struct alignas(64) Slot {
  DeltaRow row;
  DeltaRow rest;  // of the corrections: its x is the part of row.x that they have covered
  Record record;
  float* c;
  int64_t sample;
  double scale;      // the sample was multiplied by this power of two
  double step2;      // |f(x) - x|^2 at the evaluation before
  double ratio2[2];  // of step2, over the last two evaluations
  double size;       // of the increments since the last anchor or correction, the sum of their norms
  double corrected;  // the same since the last anchor, up to the last correction
  int run;           // steps since the last anchor
  Next next;
  bool native;         // float32 evaluations only
  bool best_is_first;  // the best iterate is the value at zero, and not yet written
  bool is_slow;        // contracts slowly or grows: hand it over, where the caller has better means
};

class Tile {
 public:
  Tile(const DeqProblem& p, const DeltaKernels& low, const Packed& packed, const Packed& increments, Totals& totals)
      : p_(p),
        k_(kernels<float>()),
        low_(low),
        samples_(p, totals),
        packed_(packed),
        increments_(increments),
        totals_(totals),
        m_(p.width),
        padded_(samples_.padded()),
        rule_(make_rule(p.tol, p.max_iter, p.criterion, p.width, false)),
        segments_(m_, padded_),
        map_(map_of(p)),
        hands_over_(p.acceleration == DEQ_ON_DEMAND) {}

  // Solves samples of matrix s taken from `queue`, as `sharing` threads do, until it is empty; the team shares the steps.
  void run(int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    matrix_ = s;
    if (!reserve(sharing, team.members())) {
      totals_.error = DEQ_NO_MEMORY;
      return;
    }
    Slot* active[kMaxTile];
    int n = 0;
    for (; n < size_ && fill(slots_[n], queue); ++n) active[n] = &slots_[n];
    while (n > 0) {
      evaluate(active, n, team);
      for (int a = 0; a < n;) {
        Slot& slot = *active[a];
        const bool goes_on = slot.next == Next::kAnchor ? anchored(slot) : stepped(slot);
        if (goes_on || fill(slot, queue))
          ++a;
        else
          active[a] = active[--n];
      }
    }
    totals_.add(work_);
    rows_arena.trim();
  }

 private:
  static DeltaMap map_of(const DeqProblem& p) {
    if (p.mask.data) return p.reflected ? DeltaMap::kReflectedMask : DeltaMap::kMask;
    if (p.activation == kRelu) return p.reflected ? DeltaMap::kReflectedRelu : DeltaMap::kRelu;
    return DeltaMap::kByRow;
  }

  bool reserve(int sharing, int members) {
    constexpr int64_t kFloat = sizeof(float);
    const int64_t sums = 3 * 64 * segments_.count;
    const int64_t stride = padded_ * kFloat + kRowSkew, half = (padded_ * low_.element_bytes + 63) / 64 * 64;
    const int64_t rows = p_.mask.data ? 5 : 4, per_slot = rows * stride + 3 * half + sums;
    const int64_t words = (m_ + 63) / 64;
    const int64_t share = (p_.batch + sharing - 1) / sharing, fit = kTileBytes / per_slot / k_.rows * k_.rows;
    size_ = static_cast<int>(std::min<int64_t>({kMaxTile, std::max<int64_t>(2 * k_.rows, fit), share}));
    char* at = static_cast<char*>(rows_arena.get(size_ * (per_slot + words * 8 + members * kSkipWidth * kFloat) + 3 * stride));
    if (!at) return false;
    auto take = [&](int64_t bytes) {
      at += bytes;
      return at - bytes;
    };
    for (int i = 0; i < size_; ++i) {
      Slot& slot = slots_[i];
      slot.row = DeltaRow{};
      slot.row.sums = reinterpret_cast<float*>(take(sums));
      slot.row.y = reinterpret_cast<float*>(take(stride));
      slot.row.x = reinterpret_cast<float*>(take(stride));
      slot.c = reinterpret_cast<float*>(take(stride));
      d_[i] = p_.mask.data ? reinterpret_cast<float*>(take(stride)) : nullptr;
      slot.row.d = d_[i];
      slot.row.increment = take(half);
      slot.row.next = take(half);
      slot.rest = DeltaRow{};
      slot.rest.y = slot.row.y;
      slot.rest.sums = slot.row.sums;
      slot.rest.x = reinterpret_cast<float*>(take(stride));
      slot.rest.next = slot.rest.increment = take(half);
    }
    value_ = reinterpret_cast<float*>(take(stride));
    state_ = reinterpret_cast<float*>(take(stride));
    ones_ = reinterpret_cast<float*>(take(stride));
    std::fill(ones_, ones_ + padded_, 1.0f);
    total_ = reinterpret_cast<float*>(take(size_ * members * kSkipWidth * kFloat));
    nonzeros_ = reinterpret_cast<uint64_t*>(take(size_ * words * 8));
    return true;
  }

  // One evaluation of every active slot: the steps together, the anchors together.
  void evaluate(Slot* const* active, int n, Team& team) {
    DeltaRow *steps[kMaxTile], *corrections[kMaxTile];
    const float *x[kMaxTile], *c[kMaxTile], *ones[kMaxTile];
    float *y[kMaxTile], *sums[kMaxTile];
    int step_count = 0, correction_count = 0, anchors = 0;
    for (int a = 0; a < n; ++a) {
      Slot& slot = *active[a];
      if (slot.next == Next::kAnchor) {
        x[anchors] = slot.row.x;
        c[anchors] = slot.c;
        ones[anchors] = ones_;
        y[anchors] = slot.row.y;
        sums[anchors++] = slot.row.sums;
        continue;
      }
      steps[step_count++] = &slot.row;
      if (slot.next == Next::kCorrectedStep) corrections[correction_count++] = &slot.rest;
    }
    const char* low = static_cast<const char*>(increments_.data) + matrix_ * increments_.matrix_bytes;
    const float* w = static_cast<const float*>(packed_.data) + matrix_ * (packed_.matrix_bytes / 4);
    // The float32 step with the mask 1 is y = W x + c; its sums are not used.
    const Step<float> anchor{x, y, c, ones, sums, nullptr, w, m_, kIdentity, 0, 0, padded_, nonzeros_, total_};
    const int64_t dense = anchors * m_;
    const int64_t nonzeros = anchors >= kSkipRows && m_ <= kSkipUpTo ? k_.find_nonzeros(anchor, anchors) : dense;
    const bool skips = static_cast<double>(nonzeros) < kSkipBelow * static_cast<double>(dense);
    work_.native_rows += anchors;
    work_.native_products += (skips ? nonzeros : dense) * m_;
    work_.native_sweeps += anchors > 0;
    work_.increment_rows += step_count;
    work_.increment_sweeps += step_count > 0;
    work_.correction_rows += correction_count;
    work_.correction_sweeps += correction_count > 0;
    const auto compute_anchors = skips ? k_.skip_step : k_.step;
    const Range range(anchors > 0 ? Span::kAnchor : Span::kStep, n);
    team.share([&](int segment, int member) {
      const int64_t from = segments_.start[segment], to = segments_.start[segment + 1];
      if (correction_count > 0)
        low_.step(DeltaStep{corrections, low + increments_.matrix_bytes / 2, m_, DeltaMap::kByRow, segment, from, to},
                  correction_count);
      if (step_count > 0) low_.step(DeltaStep{steps, low, m_, map_, segment, from, to}, step_count);
      if (anchors == 0) return;
      Step<float> part = anchor;
      part.segment = segment;
      part.from = from;
      part.to = to;
      part.total += member * size_ * kSkipWidth;
      compute_anchors(part, anchors);
    });
    if (map_ == DeltaMap::kByRow) return;
    for (int i = 0; i < step_count; ++i) low_.add_up(*steps[i], segments_.count);
  }

  // f at the slot's y: returns the state, leaves act(y) or d y in value_, and sets the row's sums.
  float* respond(Slot& slot) {
    k_.first(p_.activation, slot.row.y, slot.row.d, value_, m_);
    if (!p_.reflected) {
      low_.measure(slot.row, value_, nullptr, padded_);
      return value_;
    }
    std::copy(value_, value_ + padded_, state_);
    low_.measure(slot.row, state_, slot.row.y, padded_);
    return state_;
  }

  // Takes the next sample of the queue that is not done at once; false when there is none.
  bool fill(Slot& slot, std::atomic<int64_t>& queue) {
    float* d = d_[&slot - slots_];
    while ((slot.sample = samples_.take(matrix_, queue, slot.c, d, slot.row.x, &slot.scale)) >= 0) {
      slot.record = new_record();
      slot.native = slot.is_slow = slot.best_is_first = false;
      slot.run = 0;
      slot.ratio2[0] = slot.ratio2[1] = 1;
      slot.step2 = INFINITY;
      if (p_.start.data) {
        slot.next = Next::kAnchor;
        return true;
      }
      // At zero y is the injection: no product.
      std::copy(slot.c, slot.c + padded_, slot.row.y);
      std::fill(slot.row.x, slot.row.x + padded_, 0.0f);
      if (anchored(slot)) return true;
    }
    return false;
  }

  // After a float32 evaluation of y: judges it and prepares what comes next; false when the sample is done.
  bool anchored(Slot& slot) {
    DeltaRow& row = slot.row;
    float* state = respond(slot);
    double step2 = row.step2, size2 = row.size2;
    if (!in_range<float>(size2)) {
      step2 = distance(state, row.x, m_);
      size2 = size_of(state, m_);
      slot.native = true;  // the sums of a step have no such second chance
    }
    const double start2 = slot.record.iteration == 0 ? size_of(row.x, m_) : 0.0;
    if (slot.run > 0) {
      // The contraction is what the steps showed; against them the residual of an anchor holds what they had left in y.
      // Slow is what was slow twice, and an estimated error is that of the slower.
      slot.record.step2[0] = step2 / std::min(slot.ratio2[0], slot.ratio2[1]);
      slot.record.step2[1] = slot.record.step2[0] / std::max(slot.ratio2[0], slot.ratio2[1]);
    }
    Verdict verdict = judge(rule_, slot.record, step2, size2, start2);
    const bool is_best = slot.record.best_at == slot.record.iteration;
    slot.native = slot.native || (!is_best && slot.run > 0);
    if (verdict == Verdict::kContinue && hands_over_ && (slot.native || slot.is_slow)) verdict = Verdict::kMaxIter;
    if (verdict != Verdict::kContinue) {
      finish(slot, verdict, is_best);
      return false;
    }
    if (is_best) {
      // The value at zero is made again if nothing better comes: no row is written for what is soon written over.
      slot.best_is_first = slot.record.iteration == 1 && !p_.start.data;
      if (!slot.best_is_first) samples_.write(slot.sample, slot.scale, value_);
    } else if (slot.run > 0) {
      slot.record.best_at = slot.record.iteration;  // what the steps did not gain is not the sample's failure
    }
    slot.step2 = step2;
    slot.run = 0;
    slot.size = std::sqrt(step2);
    slot.corrected = 0;
    if (slot.native || slot.record.iteration + 1 >= rule_.max_iter) {
      std::copy(state, state + padded_, row.x);
      slot.next = Next::kAnchor;
      return true;
    }
    std::copy(row.x, row.x + padded_, slot.rest.x);
    row.set_next_scale(row.largest / 127.0);
    low_.feed(row, state, padded_);
    expect(slot, slot.ratio2[0]);
    slot.next = Next::kStep;
    return true;
  }

  // After a step: its increment has been fed; is the next evaluation another step or an anchor? Always true.
  bool stepped(Slot& slot) {
    DeltaRow& row = slot.row;
    if (map_ == DeltaMap::kByRow) {
      float* state = respond(slot);
      row.set_next_scale(row.largest / 127.0);
      low_.feed(row, state, padded_);
    }
    ++slot.record.iteration;
    ++slot.run;
    slot.ratio2[1] = slot.ratio2[0];
    slot.ratio2[0] = std::max(row.step2 / slot.step2, 1e-12);
    slot.step2 = row.step2;
    slot.size += std::sqrt(row.step2);
    expect(slot, slot.ratio2[0]);
    slot.is_slow = hands_over_ && is_hopeless(slot);
    slot.next = slot.is_slow ? Next::kAnchor : next_of(slot);
    if (slot.next == Next::kCorrectedStep) {
      low_.measure(slot.rest, row.x, nullptr, padded_);
      slot.rest.set_next_scale(slot.rest.largest / 127.0);
      slot.rest.scale = slot.rest.next_scale;
      low_.feed(slot.rest, row.x, padded_);
      slot.corrected += slot.size;
      slot.size = std::sqrt(row.step2);
    }
    return true;
  }

  Next next_of(const Slot& slot) const {
    const double step2 = slot.row.step2, size2 = slot.row.size2;
    if (!(step2 < INFINITY) || !(size2 <= slot.record.limit2)) return Next::kAnchor;
    if (slot.run >= kMaxRun || slot.record.iteration + 1 >= rule_.max_iter) return Next::kAnchor;
    const double expected2 = step2 * std::min(slot.ratio2[0], 1.0);
    const double q2 = std::min(slot.ratio2[0], slot.ratio2[1]);
    double leave2 = q2 > kSlowContraction * kSlowContraction ? rule_.tol2 : rule_.leave2;
    if (rule_.criterion == DEQ_ERROR_ESTIMATE) {
      const double q = std::sqrt(std::max(slot.ratio2[0], slot.ratio2[1])), r = q < 1 ? rule_.tol * (1 - q) / q : 0;
      leave2 = r * r;
    }
    if (expected2 <= kSafety * kSafety * leave2 * size2) return Next::kAnchor;
    const double pollution = kPollution[p_.precision];
    if (step2 > pollution * pollution * slot.size * slot.size) return Next::kStep;
    const double rest = pollution * kRest[p_.precision] * (slot.corrected + slot.size);
    return rest * rest <= leave2 * size2 ? Next::kCorrectedStep : Next::kAnchor;
  }

  // Growing, or so slow that another means is cheaper than the steps to come.
  bool is_hopeless(const Slot& slot) const {
    const double least2 = std::min(slot.ratio2[0], slot.ratio2[1]);
    if (least2 >= 1) return slot.run > 2;
    if (slot.record.iteration < kSlowAfter || least2 <= kSlowContraction * kSlowContraction) return false;
    return std::log(rule_.tol2 * slot.row.size2 / slot.row.step2) < kMostSteps * std::log(least2);
  }

  // The increment just written becomes the one to read, and the scale of the one after it is set.
  void expect(Slot& slot, double ratio2) {
    DeltaRow& row = slot.row;
    std::swap(row.increment, row.next);
    const double cut = row.largest - 127.0 * row.next_scale, ratio = std::clamp(std::sqrt(ratio2), kLeastRatio, kMostRatio);
    row.scale = row.next_scale;
    row.set_next_scale(kHeadroom / 127 * std::max(row.largest * ratio, cut));
  }

  void finish(Slot& slot, Verdict verdict, bool is_best) {
    if (!is_best && slot.best_is_first) {
      k_.first(p_.activation, slot.c, slot.row.d, value_, m_);
      is_best = true;
    }
    // Otherwise the output row already holds the best iterate. One that left the range of the caller's dtype has diverged.
    if (is_best && !samples_.write(slot.sample, slot.scale, value_)) verdict = Verdict::kDiverged;
    samples_.report(slot.sample, slot.record, verdict);
  }

  const DeqProblem& p_;
  const Kernels<float>& k_;
  const DeltaKernels& low_;
  Samples<float> samples_;
  const Packed &packed_, &increments_;
  Totals& totals_;
  const int64_t m_, padded_;
  const Rule rule_;
  const Segments segments_;
  const DeltaMap map_;
  const bool hands_over_;
  int64_t matrix_ = 0;
  int size_ = 0;
  DeqWork work_{};
  float *value_ = nullptr, *state_ = nullptr, *ones_ = nullptr, *total_ = nullptr;
  uint64_t* nonzeros_ = nullptr;
  float* d_[kMaxTile];
  Slot slots_[kMaxTile];
};

constexpr double kLeastFlops = 4e6;

}  // namespace

bool delta_serves(const DeqProblem& p) {
  constexpr int64_t kLargestWidth = 1 << 16;  // above, the sum of 255 x 127 over k could leave int32
  return p.precision != DEQ_NATIVE && p.type != DEQ_FLOAT64 && p.acceleration != DEQ_ANDERSON && p.width <= kLargestWidth &&
         delta_kernels(p.precision);
}

int32_t delta_solve(const DeqProblem& p) {
  const DeltaKernels& low = *delta_kernels(p.precision);
  const Segments segments(p.width, (p.width + low.lanes - 1) / low.lanes * low.lanes);
  const Division division = divide(p, segments.count, kLeastFlops);
  std::shared_ptr<const Packed> packed = packed_weights<float>(p, division.threads);
  if (!packed) return DEQ_NO_MEMORY;
  *p.report = DeqReport{0, packed->bad_element, 0, 0};
  if (packed->bad_element) return DEQ_OK;
  std::shared_ptr<const Packed> increments = delta_planes(p, low, *packed, division.threads);
  if (!increments) return DEQ_NO_MEMORY;
  Totals totals;
  run_divided(p, segments.count, division, [&](int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    std::make_unique<Tile>(p, low, *packed, *increments, totals)->run(s, queue, sharing, team);
  });
  last_work = totals.work;
  p.report->failed = totals.failed;
  p.report->bad_injection = totals.bad_injection;
  p.report->bad_start = totals.bad_start;
  return totals.error;
}

}  // namespace deq
