// How the threads of a call divide its work: whole matrices, samples of a matrix, or, where there are few samples and a wide
// matrix, the columns of every step.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "../kernels.h"
#include "team.h"

namespace deq {

struct Division {
  enum Kind { kMatrices, kSamples, kColumns } kind;
  int threads;    // worth their start: a parallel region costs microseconds, milliseconds where another process holds a core
  bool is_small;  // so small that a lost core would cost many times what the threads gain
};

// With fewer samples a thread, sharing columns is faster than sharing samples. Two threads against one, Zen 4: 1.9 x at (1024, 1)
// in float32 and int8, 2.0 x at (2048, 3) against 1.5 x by samples, 1.95 x at (1024, 7); from 8 samples on both are the same, and
// in int8 (1024, 4) is 7 % slower. Where another process holds a core, 1.0 to 1.2 times the time of one thread; by samples 2
// to 10.
constexpr int64_t kSamplesPerThread = 4;

// Flops of one step that a thread is started for: 1 microsecond of a solve that has ten or more. Two threads against one, Zen 4,
// whole solves, called in turn / every 4 ms: 1.7 / 1.6 x at (128, 64), 1.5 / 2 x at (128, 20) and 1.3 / 1.5 x at (128, 10) in
// int8, 1.5 / 1.5 x at (64, 50) and 1.3 / 1.4 x at (64, 20) in float32, 1.3 / 1.6 x at (32, 128) in lanes.
constexpr double kLeastFlops = 1e5;
constexpr double kSmallFlops = 4e6;

// `segments` of the columns can be shared.
inline Division divide(const DeqProblem& p, int segments) {
  const double flops = 2.0 * p.weights * p.batch * p.width * p.width;
  const int threads = std::max(p.threads, 1);
  const bool is_small = flops < kSmallFlops, is_lost = threads > 1 && LostCore::is_recent();
  const int worth = is_small && is_lost ? 1 : static_cast<int>(std::clamp<double>(flops / kLeastFlops, 1, threads));
  if (worth > 1 && p.weights > 1 && p.weights >= threads) return {Division::kMatrices, worth, is_small};
  if (threads > 1 && segments > 1 && p.weights < threads && p.batch < kSamplesPerThread * threads) {
    if (is_lost) return {Division::kSamples, 1, is_small};
    return {Division::kColumns, std::min(threads, segments), is_small};
  }
  return {Division::kSamples, static_cast<int>(std::min<int64_t>(worth, p.weights * p.batch)), is_small};
}

// What a thread loses to other processes, in which it could not work: reported when it is done. That it comes late is no loss
// unless it is very late: a thread that slept takes 0.2 ms to come. Its own time costs a system call, 0.35 us: it is asked for
// only after a region that took long.
class Attendance {
 public:
  explicit Attendance(int64_t start) : start_(start), came_(clock_ns()), before_(was_long ? own_time() : 0) {}
  ~Attendance() {
    constexpr int64_t kVeryLate = 1000000;
    const int64_t end = clock_ns(), late = came_ - start_, spent = end - start_;
    const int64_t lost = was_long ? end - came_ - (own_time() - before_) : 0;
    LostCore::report(lost + (late > kVeryLate ? late : 0), spent);
    was_long = spent > LostCore::kOrdinary;
  }

 private:
  static int64_t own_time() { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }
  static inline thread_local bool was_long = false;
  const int64_t start_, came_, before_;
};

// Calls solve(s, queue, sharing, team) so that all samples of all matrices are solved: `sharing` threads take samples of matrix
// s from the queue at the same time, and the team shares the steps of each.
template <class Solve>
void run_divided(const DeqProblem& p, int segments, Division division, const Solve& solve) {
  const int threads = division.threads;
  int64_t start = clock_ns();
  auto attend = [&](std::optional<Attendance>& attendance) {
    if (division.is_small) attendance.emplace(start);
  };
  if (division.kind == Division::kMatrices) {
#pragma omp parallel num_threads(threads)
    {
      std::optional<Attendance> attendance;
      attend(attendance);
#pragma omp for schedule(dynamic) nowait
      for (int64_t s = 0; s < p.weights; ++s) {
        std::atomic<int64_t> queue{0};
        Team alone(segments, 1);
        solve(s, queue, 1, alone);
      }
    }
    return;
  }
  for (int64_t s = 0; s < p.weights; ++s, start = clock_ns()) {
    std::atomic<int64_t> queue{0};
    if (threads == 1) {  // a parallel region of one would cost two system calls
      Team alone(segments, 1);
      solve(s, queue, 1, alone);
    } else if (division.kind == Division::kSamples) {
#pragma omp parallel num_threads(threads)
      {
        std::optional<Attendance> attendance;
        attend(attendance);
        Team alone(segments, 1);
        solve(s, queue, threads, alone);
      }
    } else {
      // The first to come leads, so that nobody waits for a thread that has not come yet, or never will.
      Team team(segments, threads);
      std::atomic<int> come{0};
      int64_t worked = 0;
#pragma omp parallel num_threads(threads)
      {
        const int member = come.fetch_add(1, std::memory_order_relaxed);
        if (member > 0) {
          team.help(member);
        } else {
          const int64_t before = clock_ns(CLOCK_THREAD_CPUTIME_ID);
          solve(s, queue, 1, team);
          worked = clock_ns(CLOCK_THREAD_CPUTIME_ID) - before;
          team.close();
        }
      }
      // The region begins and ends when every thread has been there.
      const int64_t spent = clock_ns() - start;
      LostCore::report(spent - worked, spent);
    }
  }
}

}  // namespace deq
