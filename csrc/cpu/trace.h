// Ranges of what the engine does inside a solve, for tools: NVTX where its headers were at hand when this was compiled and a
// tool is attached, and a list that deq.profiling reads. With neither, a range costs two loads that predict well.
#pragma once
#include <stdint.h>

#include <atomic>

namespace deq {

enum class Span : int32_t { kPack, kStep, kAnchor, kAnderson };

class Trace {
 public:
  // Whether anybody listens.
  static bool is_on() { return on_.load(std::memory_order_relaxed); }
  static void begin(Span span, int64_t payload);
  static void end();

 private:
  friend struct TraceControl;
  static inline std::atomic<bool> on_{false};
};

// The time from here to the end of the scope; `payload` is the number of rows, or m where W is packed.
class Range {
 public:
  Range(Span span, int64_t payload) : open_(Trace::is_on()) {
    if (open_) Trace::begin(span, payload);
  }
  ~Range() {
    if (open_) Trace::end();
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  const bool open_;
};

}  // namespace deq
