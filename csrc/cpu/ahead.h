// Reading ahead of what is computed.
#pragma once
#include <stdint.h>

namespace {

// Asks for some rows of W line by line, in the order in which they lie: what the hardware then fetches ahead by itself.
template <class T>
class Ahead {
 public:
  Ahead(const T* w, int64_t run, int64_t stride, int64_t rows)
      : at_(w), end_(w + run), run_(run), skip_(stride - run), left_(rows) {}
  template <int kLines>
  inline __attribute__((always_inline)) void ask() {
    if (left_ == 0) return;
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
    at_ += kLines * kLine;
    if (at_ < end_) return;
    at_ = end_ + skip_;
    end_ = at_ + run_;
    --left_;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T *at_, *end_;
  int64_t run_, skip_, left_;
};

}  // namespace
