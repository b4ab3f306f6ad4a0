// The delta engine: the row engine's tile of sample slots, where most evaluations are low-precision steps on increments.
//
// Every sample decides from its own numbers when to go back to float32 (an anchor), and is judged there by the rule of the row
// engine, or at a step that a bound shows to be within the tolerance as well (delta.h). One that gains nothing from a run of
// steps goes on in float32 alone. Integer sums are exact in any order and the other sums run in the same order in every tile
// shape, so that a sample's answer does not depend on its batch mates.
#include "delta.h"

#include <algorithm>
#include <atomic>

#include "../reliable.h"
#include "delta_slots.h"
#include "kernels.h"
#include "norms.h"
#include "samples.h"
#include "scales.h"
#include "segments.h"
#include "sweep.h"
#include "threads.h"
#include "trace.h"
#include "zeros.h"

namespace deq {
namespace {

// Rounding of W leaves about this share of the increments in y, and a correction this share of that: smaller increments than
// what is left gain nothing.
constexpr double kPollution[] = {0, 1e-2, 2e-3}, kRest[] = {0, 1.0 / 256, 1.0 / 512};
// Anchors of so many rows may leave out the products with zeros: 1.25 to 1.35 x the dense kernel for 64 rows at m = 256 to 4096
// and 1.1 x for 16 at 2048, but 0.85 x for (2048, 8) and 0.7 x for (1024, 4) on Zen 4, of W that is not in the cache.
constexpr int kSkipRows = 16;
constexpr int64_t kSkipAnyRows = 256;  // W of 256 KB is in the L2 cache, whoever reads it
// Anchors of fewer rows wait for others; where W is narrower than kWide and in the L2 cache anyway, only for so many. Zen 4,
// spectral radius 1, one thread: 1.14 x as fast at 1024 x 4, 1.18 at 2048 x 8, 1.15 at 2048 x 64, 1.03 at 1024 x 16 and at 128 x
// 256, where waiting for kManyAnchors gains as much, but loses 3 % with two threads.
constexpr int64_t kWide = 512;
constexpr int kManyAnchors = 32, kFewAnchors = 16;
constexpr double kSteepest = 1.13;  // derivative of an activation: gelu's
thread_local Arena rows_arena;

class Tile {
 public:
  // W is in place where it is not packed, its rows or its columns contiguous.
  Tile(const DeqProblem& p, const DeltaKernels& low, const Packed* packed, const Packed& increments, Totals& totals)
      : p_(p),
        k_(kernels<float>()),
        low_(low),
        samples_(p, totals),
        packed_(packed),
        increments_(increments),
        totals_(totals),
        m_(p.width),
        padded_(samples_.padded()),
        call_{make_rule(p.tol, p.max_iter, p.criterion, p.width, false), kPollution[p.precision], kRest[p.precision],
              p.acceleration == DEQ_ON_DEMAND},
        scales_(p.width),
        segments_(m_, padded_),
        sweep_(m_, padded_),
        map_(map_of(p)),
        steepest_(p.activation == kRelu && !p.mask.data ? 1
                  : p.reflected                         ? 2 * kSteepest - 1
                                                        : kSteepest) {}

  // Solves samples of matrix s taken from `queue`, as `sharing` threads do, until it is empty; the team shares the steps.
  void run(int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    matrix_ = s;
    left_out_ = low_.left_out(static_cast<const char*>(increments_.data) + s * increments_.matrix_bytes, m_);
    left_out_.low *= steepest_, left_out_.corrected *= steepest_;  // of f, where that is of W x
    if (!slots_.reserve(rows_arena, p_, low_, packed_, padded_, segments_.count, sharing, team.members())) {
      totals_.error = DEQ_NO_MEMORY;
      return;
    }
    DeltaSlot* active[kMaxTile];
    int n = 0;
    samples_.reserve(queue, slots_.size);
    for (; n < slots_.size && fill(slots_.at[n], queue); ++n) active[n] = &slots_.at[n];
    while (n > 0) {
      const bool waits = anchors_wait(active, n);
      evaluate(active, n, waits, team);
      for (int a = 0; a < n;) {
        DeltaSlot& slot = *active[a];
        if (waits && slot.next == Next::kAnchor) {
          ++a;
          continue;
        }
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
  // Whether the slots that want an anchor wait for more of them, while others take steps: W is read for all anchors at once. No
  // answer shows it.
  bool anchors_wait(DeltaSlot* const* active, int n) const {
    const auto anchors = std::count_if(active, active + n, [](const DeltaSlot* slot) { return slot->next == Next::kAnchor; });
    const auto steps = n - anchors;
    return m_ >= kWide ? steps > 0 && anchors < kManyAnchors : steps >= kFewAnchors && anchors < kFewAnchors;
  }

  static DeltaMap map_of(const DeqProblem& p) {
    if (p.mask.data) return p.reflected ? DeltaMap::kReflectedMask : DeltaMap::kMask;
    if (p.activation == kRelu) return p.reflected ? DeltaMap::kReflectedRelu : DeltaMap::kRelu;
    return DeltaMap::kByRow;
  }

  // Rows that take the same kind of step, and what those of them that are corrected before it have accumulated.
  struct Group {
    DeltaRow *rows[kMaxTile], *corrections[kMaxTile];
    int count = 0, corrected = 0;
  };

  // One evaluation of every active slot, except those whose anchor waits: the steps together, the sweeps together, the anchors
  // together.
  void evaluate(DeltaSlot* const* active, int n, bool waits, Team& team) {
    Group steps, sweeps[3];  // the latter by Old
    const float *x[kMaxTile], *c[kMaxTile], *ones[kMaxTile];
    float *y[kMaxTile], *sums[kMaxTile];
    int anchors = 0, rows = n;
    for (int a = 0; a < n; ++a) {
      DeltaSlot& slot = *active[a];
      if (slot.next == Next::kAnchor) {
        if (waits) {
          --rows;
          continue;
        }
        x[anchors] = slot.row.x;
        c[anchors] = slot.c;
        ones[anchors] = slots_.ones;
        y[anchors] = slot.row.y;
        sums[anchors++] = slot.row.sums;
        continue;
      }
      Group& group = slot.progress.sweeps ? sweeps[static_cast<int>(slot.old)] : steps;
      group.rows[group.count++] = &slot.row;
      if (slot.next == Next::kCorrectedStep) group.corrections[group.corrected++] = &slot.rest;
    }
    const float* w = packed_ ? static_cast<const float*>(packed_->data) + matrix_ * (packed_->matrix_bytes / 4) : nullptr;
    // The float32 step with the mask 1 is y = W x + c; its sums are not used.
    const Step<float> anchor{x, y, c, ones, sums, nullptr, w, m_, kIdentity, 0, 0, padded_, slots_.nonzeros, slots_.total};
    const bool may_skip = packed_ && anchors > 0 && (anchors >= kSkipRows || m_ <= kSkipAnyRows);
    const auto compute_anchors = zeros_.choose(k_, anchor, anchors, may_skip, team);
    if (slots_.lanes && anchors > 0) low_.spread(x, anchors, padded_, slots_.lanes);
    count(steps);
    for (const Group& group : sweeps) count(group);
    const Range range(anchors > 0 ? Span::kAnchor : Span::kStep, rows);
    const int stages = sweeps[0].count + sweeps[1].count + sweeps[2].count > 0 ? sweep_.stages : 1, pieces = segments_.count;
    for (int stage = 0; stage < stages; ++stage)
      team.share([&](int piece, int member) {
        if (stage == 0) {
          const int64_t from = segments_.start[piece], to = segments_.start[piece + 1];
          advance(steps, DeltaStep{.piece = piece, .from = from, .to = to}, member);
          if (anchors > 0) {
            Step<float> part = anchor;
            part.segment = piece;
            part.from = from;
            part.to = to;
            part.total += member * slots_.size * kSkipWidth;
            part.found = zeros_.found(piece);
            if (packed_)
              compute_anchors(part, anchors);
            else
              low_.affine(in_place(x, y, c, from, to), anchors);
          }
        }
        for (int old = 0; old < 3; ++old)
          advance(sweeps[old],
                  DeltaStep{.old = static_cast<Old>(old),
                            .stage = stage,
                            .piece = piece,
                            .fresh = sweep_.start[stage],
                            .from = sweep_.piece(stage, piece, pieces),
                            .to = sweep_.piece(stage, piece + 1, pieces)},
                  member);
      });
    work_.native_rows += anchors;
    work_.native_products += zeros_.finish() * m_;
    work_.native_sweeps += anchors > 0;
    add_up(steps);
    for (const Group& group : sweeps) add_up(group);
  }

  // y = W x + c in some columns, with W in place.
  Affine in_place(const float* const* x, float* const* y, const float* const* c, int64_t from, int64_t to) const {
    const DeqView& W = p_.W;
    const float* w = static_cast<const float*>(W.data) + matrix_ * W.stride[0];
    return {x, y, c, slots_.partial, slots_.lanes, w, W.stride[slots_.lanes ? 1 : 2], m_, from, to};
  }

  // The step of a group in some columns.
  void advance(const Group& group, DeltaStep step, int member) {
    if (group.count == 0) return;
    step.weights = static_cast<const char*>(increments_.data) + matrix_ * increments_.matrix_bytes;
    step.width = m_;
    // A correction is of what the steps before have added up to, and comes before this step's map.
    if (group.corrected > 0) {
      const DeltaStep correction{.rows = group.corrections,
                                 .weights = static_cast<const char*>(step.weights) + increments_.matrix_bytes / 2,
                                 .width = m_,
                                 .piece = step.piece,
                                 .from = step.from,
                                 .to = step.to};
      low_.step(correction, group.corrected);
    }
    step.rows = group.rows;
    step.map = map_;
    low_.step(step, group.count);
    if (map_ != DeltaMap::kByRow) return;
    for (int i = 0; i < group.count; ++i) low_.settle(step, *group.rows[i], respond(*group.rows[i], step.from, step.to, member));
  }

  void count(const Group& group) {
    work_.increment_rows += group.count;
    work_.increment_sweeps += group.count > 0;
    work_.correction_rows += group.corrected;
    work_.correction_sweeps += group.corrected > 0;
  }

  void add_up(const Group& group) {
    for (int i = 0; i < group.count; ++i) low_.add_up(*group.rows[i], segments_.count);
  }

  // f at the row's y in the columns [from, to): leaves act(y) or d y in the member's value, returns the state, both by column.
  const float* respond(const DeltaRow& row, int64_t from, int64_t to, int member) {
    float *value = slots_.value[member], *state = slots_.state[member];
    k_.first(p_.activation, row.y + from, row.d ? row.d + from : nullptr, value + from, std::min(to, m_) - from);
    if (!p_.reflected) return value;
    for (int64_t j = from; j < to; ++j) state[j] = value[j] + (value[j] - row.y[j]);
    return state;
  }
  const float* respond(const DeltaSlot& slot) { return respond(slot.row, 0, padded_, 0); }

  // Takes the next sample of the queue that is not done at once; false when there is none.
  bool fill(DeltaSlot& slot, std::atomic<int64_t>& queue) {
    float* d = slots_.d[&slot - slots_.at];
    while ((slot.sample = samples_.take(matrix_, queue, slot.c, d, slot.row.x, &slot.scale)) >= 0) {
      slot.progress = new_progress();
      slot.is_judged = false;
      slot.best_is_first = false;
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
  bool anchored(DeltaSlot& slot) {
    DeltaRow& row = slot.row;
    const float* state = map_ == DeltaMap::kByRow ? respond(slot) : nullptr;
    low_.measure(row, map_, state, padded_);
    double step2 = row.step2, size2 = row.size2;
    if (!squares_in_range<float>(size2, step2)) {
      state = respond(slot);
      step2 = distance(state, row.x, m_);
      size2 = size_of(state, m_);
      slot.progress.native = true;  // the sums of a step have no such second chance
    }
    Record& record = slot.progress.record;
    const double start2 = record.iteration == 0 && p_.start.data ? size_of(row.x, m_) : 0.0;
    bool is_best;
    const Verdict verdict = judge_anchor<true>(call_, slot.progress, step2, size2, start2, &is_best);
    if (verdict != Verdict::kContinue) {
      finish(slot, verdict, is_best);
      return false;
    }
    if (is_best) {
      // The value at zero is made again if nothing better comes: no row is written for what is soon written over.
      slot.best_is_first = record.iteration == 1 && !p_.start.data;
      if (!slot.best_is_first) write(slot);
    }
    if (anchors_again(call_, slot.progress)) {
      state = respond(slot);
      std::copy(state, state + padded_, row.x);
      slot.next = Next::kAnchor;
      return true;
    }
    slot.next = Next::kStep;
    if (slot.progress.sweeps) {
      slot.old = Old::kNothing;
      std::copy(row.x, row.x + padded_, slot.rest.x);
      Scales::set_first_of_sweeps(row);
      return true;
    }
    slot.old = Old::kAll;
    Scales::set_known(row);
    low_.feed(row, map_, state, slot.rest.x, padded_);
    slot.changed1 = 0;
    scales_.expect(row, slot.progress.ratio2[0], slot.progress.sweeps);
    return true;
  }

  // After a step: its increment has been fed; is the next evaluation another step or an anchor? False when the sample is done.
  bool stepped(DeltaSlot& slot) {
    DeltaRow& row = slot.row;
    if (slot.is_judged && passes(slot)) return false;
    const bool swept = slot.progress.sweeps;
    slot.next = after_step<true>(call_, slot.progress, row.step2, row.size2);
    if (slot.progress.sweeps) slot.old = swept ? Old::kRest : Old::kAll;
    scales_.expect(row, slot.progress.ratio2[0], slot.progress.sweeps);
    if (slot.is_judged) slot.next = Next::kAnchor;
    slot.is_judged = slot.next == Next::kAnchor && !slot.is_judged && may_be_judged(slot);
    if (slot.is_judged) slot.next = Next::kCorrectedStep;
    if (slot.next == Next::kAnchor && map_ == DeltaMap::kRelu) low_.drop_inactive(row, padded_);
    if (slot.next == Next::kCorrectedStep) {
      if (!slot.is_judged) measure_correction(slot);
      low_.feed(slot.rest, DeltaMap::kByRow, row.x, nullptr, padded_);
    }
    return true;
  }

  // Of the increments that no correction has covered, whose scale the next one needs.
  void measure_correction(DeltaSlot& slot) {
    low_.measure(slot.rest, DeltaMap::kByRow, slot.row.x, padded_);
    Scales::set_known(slot.rest);
    slot.rest.scale = slot.rest.next_scale;
    if (!slot.progress.sweeps) slot.changed1 += low_.distance1(slot.rest, slot.row.x, padded_);
  }

  // Whether the anchor that is due may be a corrected step, whose correction is measured then: rounding leaves half a unit out of
  // every element of it.
  bool may_be_judged(DeltaSlot& slot) {
    const DeltaRow& row = slot.row;
    if (!may_be_proven(call_, slot.progress, row.step2, row.size2, left_out_.corrected * slot.changed1)) return false;
    measure_correction(slot);
    slot.left_out = left_out_.corrected * slot.changed1 + left_out_.low * slot.rest.scale / 2 * static_cast<double>(m_);
    return squares_in_range<float>(row.size2) && may_be_proven(call_, slot.progress, row.step2, row.size2, slot.left_out);
  }

  // After a step that is judged: is the sample done?
  bool passes(DeltaSlot& slot) {
    const DeltaRow& row = slot.row;
    Progress progress = slot.progress;
    bool is_best;
    if (!squares_in_range<float>(row.size2) ||
        judge_anchor<true>(call_, progress, row.step2, row.size2, 0, &is_best) != Verdict::kConverged ||
        !is_proven(call_, slot.progress, row.step2, row.size2, slot.left_out))
      return false;
    slot.progress = progress;
    if (map_ == DeltaMap::kByRow) respond(slot);
    finish(slot, Verdict::kConverged, true);
    return true;
  }

  void finish(DeltaSlot& slot, Verdict verdict, bool is_best) {
    // Otherwise the output row already holds the best iterate. One that left the range of the caller's dtype has diverged.
    bool fits = true;
    if (is_best) {
      fits = write(slot);
    } else if (slot.progress.record.best_at == 0) {  // not even the value at the start was finite
      fits = samples_.write(slot.sample, slot.scale, slot.row.x);
    } else if (slot.best_is_first) {
      k_.first(p_.activation, slot.c, slot.row.d, slots_.value[0], m_);
      fits = samples_.write(slot.sample, slot.scale, slots_.value[0]);
    }
    samples_.report(slot.sample, slot.progress.record, fits ? verdict : Verdict::kDiverged);
  }

  // The value at the slot's y becomes its result.
  bool write(const DeltaSlot& slot) {
    if (map_ == DeltaMap::kByRow) return samples_.write(slot.sample, slot.scale, slots_.value[0]);  // respond() has left it there
    float* row = padded_ == m_ && slot.scale == 1 ? samples_.native_row(slot.sample) : nullptr;
    k_.first(p_.activation, slot.row.y, slot.row.d, row ? row : slots_.value[0], m_);
    return row || samples_.write(slot.sample, slot.scale, slots_.value[0]);
  }

  const DeqProblem& p_;
  const Kernels<float>& k_;
  const DeltaKernels& low_;
  Samples<float> samples_;
  const Packed *packed_, &increments_;
  Totals& totals_;
  const int64_t m_, padded_;
  const Reliable call_;
  LeftOut left_out_;  // of the matrix
  const Scales scales_;
  const Segments segments_;
  const Sweep sweep_;
  const DeltaMap map_;
  const double steepest_;  // what a difference in y may grow by in f(y)
  int64_t matrix_ = 0;
  DeqWork work_{};
  Zeros<float> zeros_;  // of the anchors
  DeltaSlots slots_;
};

}  // namespace

bool delta_serves(const DeqProblem& p) {
  constexpr int64_t kLargestWidth = 1 << 16;  // above, the sum of 255 x 127 over k could leave int32
  return p.precision != DEQ_NATIVE && p.type != DEQ_FLOAT64 && p.acceleration != DEQ_ANDERSON && p.width <= kLargestWidth &&
         delta_kernels(p.precision);
}

int32_t delta_solve(const DeqProblem& p) {
  const DeltaKernels& low = *delta_kernels(p.precision);
  const Segments segments(p.width, (p.width + low.lanes - 1) / low.lanes * low.lanes);
  const Division division = divide(p, segments.count);
  const Weights weights = delta_weights(p, low, division.threads);
  *p.report = DeqReport{0, weights.bad_element, 0, 0};
  if (weights.bad_element) return DEQ_OK;
  if (!weights.derived) return DEQ_NO_MEMORY;
  Totals totals;
  run_divided(p, segments.count, division, [&](int64_t s, std::atomic<int64_t>& queue, int sharing, Team& team) {
    run_on(new (std::nothrow) Tile(p, low, weights.packed.get(), *weights.derived, totals), totals, s, queue, sharing, team);
  });
  return totals.report(p);
}

}  // namespace deq
