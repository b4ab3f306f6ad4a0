// A team: threads that share every step of one thread, the leader, who does all that lies between the steps.
//
// A step is cut into pieces. The members take them one by one, their own share first (it is warm in their caches), then what is
// left of the others': a member that has lost its core holds up the step only by the piece it has begun. Whoever waits spins for
// some microseconds, which is what a wait takes while all have their cores; then it gives its core to others, and at last sleeps.
// Where another process has taken a core, a wait still takes that process's slice of time (10 ms for a solve of 1 ms): so the
// leader works alone for a while after it.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace deq {

// Nanoseconds, of time passed or of the calling thread at work.
inline int64_t clock_ns(clockid_t clock = CLOCK_MONOTONIC) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Whether a core was lost a short time ago: then leaders work alone, so that losing time again and again costs little of it.
// Common to all calls: it is the machine that is busy.
class LostCore {
 public:
  static constexpr int64_t kOrdinary = 200000;  // ns that a wait may take where nothing was lost

  static bool is_recent() {
    const int64_t until = until_.load(std::memory_order_relaxed);
    if (until == 0) return false;
    if (clock_ns() < until) return true;
    until_.store(0, std::memory_order_relaxed);
    return false;
  }
  // `lost` of `spent` nanoseconds were lost, too many to gain by it.
  static void report(int64_t lost, int64_t spent) {
    if (lost > kOrdinary && lost > spent / 4) until_.store(clock_ns() + 8 * (lost + kAfterwards), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kAfterwards = 10000000;  // OpenMP's threads spin for 8 ms when they are done
  static inline std::atomic<int64_t> until_{0};
};

// A counter that threads wait on.
class alignas(64) Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void add() {
    value_.fetch_add(1);
    if (sleepers_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
  }

  // Returns the value once it is another than `seen`.
  uint32_t await_other_than(uint32_t seen) {
    for (int i = 0; i < kPauses; ++i) {
      if (const uint32_t now = value(); now != seen) return now;
      pause();
    }
    const int64_t end = clock_ns() + kYields;
    do {
      sched_yield();
      if (const uint32_t now = value(); now != seen) return now;
    } while (clock_ns() < end);
    sleepers_.fetch_add(1);
    uint32_t now;
    while ((now = value()) == seen) futex(FUTEX_WAIT_PRIVATE, seen);
    sleepers_.fetch_sub(1);
    return now;
  }

 private:
  static constexpr int kPauses = 100;        // 1 to 4 microseconds
  static constexpr int64_t kYields = 50000;  // ns

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  void futex(int operation, uint32_t value) {
    static_assert(sizeof value_ == sizeof(uint32_t) && std::atomic<uint32_t>::is_always_lock_free);
    syscall(SYS_futex, &value_, operation, value, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> value_{0}, sleepers_{0};
};

class Team {
 public:
  static constexpr int kMostPieces = 16;

  // At most as many members as pieces; a team of one never waits.
  Team(int pieces, int members) : pieces_(pieces), members_(members) {}

  int members() const { return members_; }

  // The leader, member 0: piece(i, member) for every piece i of a step, each by one of the members. Returns when all are done.
  template <class Piece>
  void share(const Piece& piece) {
    if (members_ == 1 || LostCore::is_recent()) {
      for (int i = 0; i < pieces_; ++i) piece(i, 0);
      return;
    }
    run_ = [](const void* p, int i, int member) { (*static_cast<const Piece*>(p))(i, member); };
    piece_ = &piece;
    step_.add();
    const uint32_t step = step_.value(), all = step * static_cast<uint32_t>(pieces_);
    take_pieces(step, 0);
    uint32_t done = done_.value();
    if (done == all) return;
    const int64_t start = clock_ns();
    while (done != all) done = done_.await_other_than(done);
    const int64_t waited = clock_ns() - start;
    LostCore::report(waited, waited);
  }

  // Every other member: takes its part in the leader's steps until close().
  void help(int member) {
    for (uint32_t step = 0;;) {
      step = step_.await_other_than(step);
      if (closed_.load(std::memory_order_relaxed)) return;
      take_pieces(step, member);
    }
  }

  // The leader: there are no more steps.
  void close() {
    closed_.store(true, std::memory_order_relaxed);
    if (members_ > 1) step_.add();
  }

 private:
  // The step in which a piece was last taken. One that is late finds every piece of its step taken.
  struct alignas(64) Taken {
    std::atomic<uint32_t> step{0};
  };

  void take_pieces(uint32_t step, int member) {
    auto take = [&](int i) {
      uint32_t before = step - 1;
      if (taken_[i].step.load(std::memory_order_relaxed) != before) return;
      if (!taken_[i].step.compare_exchange_strong(before, step, std::memory_order_acquire, std::memory_order_relaxed)) return;
      run_(piece_, i, member);
      done_.add();
    };
    const int first = pieces_ * member / members_, last = pieces_ * (member + 1) / members_;
    for (int i = first; i < last; ++i) take(i);
    // The last of the others' first: they begin with their first.
    for (int i = pieces_ - 1; i >= 0; --i)
      if (i < first || i >= last) take(i);
  }

  const int pieces_, members_;
  void (*run_)(const void*, int, int) = nullptr;
  const void* piece_ = nullptr;
  std::atomic<bool> closed_{false};
  Signal step_, done_;
  Taken taken_[kMostPieces];
};

}  // namespace deq
