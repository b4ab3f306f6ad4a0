// A x = b in double by one block: LU with partial pivoting, 16 columns at a time, wherever A lies.
#pragma once
#include "device.h"

namespace deq {

constexpr int kLuPanel = 16;  // columns factored before the rest of the matrix is read again
constexpr int kLuWarps = 8;

// What the threads of a block tell each other.
struct LuExchange {
  double value[kLuWarps];
  int64_t index[kLuWarps];
};

template <class Gpu>
DEQ_GPU double block_sum(double value, LuExchange& exchange) {
  const int warps = Gpu::threads() / kWarp;
  DEQ_UNROLL for (int mask = 1; mask < kWarp; mask *= 2) value += Gpu::shuffle_xor(value, mask);
  if (Gpu::thread() % kWarp == 0) exchange.value[Gpu::thread() / kWarp] = value;
  Gpu::sync();
  double sum = 0;
  for (int w = 0; w < warps; ++w) sum += exchange.value[w];
  Gpu::sync();
  return sum;
}

template <class Gpu>
class Lu {
 public:
  // `matrix` is (size, size), its rows `stride` apart, and is overwritten.
  DEQ_GPU Lu(double* matrix, int64_t size, int64_t stride, LuExchange& exchange)
      : a_(matrix), size_(size), stride_(stride), exchange_(exchange) {}

  // b becomes x. False, and b is of no use, if a pivot is zero or not finite.
  DEQ_GPU bool solve(double* b) {
    for (int64_t first = 0; first < size_; first += kLuPanel) {
      const int64_t last = first + kLuPanel < size_ ? first + kLuPanel : size_;
      for (int64_t k = first; k < last; ++k)
        if (!eliminate(k, last, b)) return false;
      finish_rows(first, last);
      Gpu::sync();
      update(first, last);
      Gpu::sync();
    }
    for (int64_t last = size_; last > 0; last = (last - 1) / kLuPanel * kLuPanel)
      substitute((last - 1) / kLuPanel * kLuPanel, last, b);
    return true;
  }

 private:
  DEQ_GPU double& at(int64_t i, int64_t j) const { return a_[i * stride_ + j]; }

  // Column k of the panel that ends at `last`, and b: the largest element below comes to the diagonal.
  DEQ_GPU bool eliminate(int64_t k, int64_t last, double* b) {
    const int64_t p = pivot(k);
    if (p < 0) return false;
    if (p != k) {
      for (int64_t j = Gpu::thread(); j < size_; j += Gpu::threads()) exchange_numbers(at(k, j), at(p, j));
      if (Gpu::thread() == 0) exchange_numbers(b[k], b[p]);
      Gpu::sync();
    }
    const double inverse = 1 / at(k, k);
    for (int64_t i = k + 1 + Gpu::thread(); i < size_; i += Gpu::threads()) {
      const double factor = at(i, k) * inverse;
      at(i, k) = factor;
      for (int64_t j = k + 1; j < last; ++j) at(i, j) -= factor * at(k, j);
      b[i] -= factor * b[k];
    }
    Gpu::sync();
    return true;
  }

  DEQ_GPU static void exchange_numbers(double& a, double& b) {
    const double before = a;
    a = b;
    b = before;
  }

  // The row of the largest element of column k from the diagonal on, or -1 if that is zero or one is not finite.
  DEQ_GPU int64_t pivot(int64_t k) {
    double largest = -1;
    int64_t row = size_;
    for (int64_t i = k + Gpu::thread(); i < size_; i += Gpu::threads()) {
      const double magnitude = at(i, k) == at(i, k) ? fabs(at(i, k)) : INFINITY;
      if (magnitude > largest) largest = magnitude, row = i;
    }
    const auto take = [&](double other, int64_t place) {
      if (other > largest || (other == largest && place < row)) largest = other, row = place;
    };
    DEQ_UNROLL for (int mask = 1; mask < kWarp; mask *= 2) {
      const double other = Gpu::shuffle_xor(largest, mask);
      take(other, Gpu::shuffle_xor(row, mask));
    }
    if (Gpu::thread() % kWarp == 0)
      exchange_.value[Gpu::thread() / kWarp] = largest, exchange_.index[Gpu::thread() / kWarp] = row;
    Gpu::sync();
    for (int w = 0; w < Gpu::threads() / kWarp; ++w) take(exchange_.value[w], exchange_.index[w]);
    Gpu::sync();
    return largest > 0 && largest < INFINITY ? row : -1;
  }

  // The panel's rows right of it.
  DEQ_GPU void finish_rows(int64_t first, int64_t last) const {
    for (int64_t j = last + Gpu::thread(); j < size_; j += Gpu::threads())
      for (int64_t i = first + 1; i < last; ++i) {
        double sum = at(i, j);
        for (int64_t k = first; k < i; ++k) sum -= at(i, k) * at(k, j);
        at(i, j) = sum;
      }
  }

  // What is below and right of the panel, four rows by four columns a thread.
  DEQ_GPU void update(int64_t first, int64_t last) const {
    constexpr int kSide = 4;
    const int64_t side = (size_ - last + kSide - 1) / kSide;
    for (int64_t t = Gpu::thread(); t < side * side; t += Gpu::threads()) {
      const int64_t i = last + t / side * kSide, j = last + t % side * kSide;
      double sum[kSide][kSide] = {};
      for (int64_t k = first; k < last; ++k) {
        double l[kSide], u[kSide];
        DEQ_UNROLL for (int r = 0; r < kSide; ++r) l[r] = at(i + r < size_ ? i + r : size_ - 1, k);
        DEQ_UNROLL for (int c = 0; c < kSide; ++c) u[c] = at(k, j + c < size_ ? j + c : size_ - 1);
        DEQ_UNROLL for (int r = 0; r < kSide; ++r) DEQ_UNROLL for (int c = 0; c < kSide; ++c) sum[r][c] += l[r] * u[c];
      }
      DEQ_UNROLL for (int r = 0; r < kSide; ++r) DEQ_UNROLL for (int c = 0; c < kSide; ++c) if (i + r < size_ && j + c < size_)
          at(i + r, j + c) -= sum[r][c];
    }
  }

  // Unknowns [first, last) from those after them: sums a row by one warp, then the triangle by one thread.
  DEQ_GPU void substitute(int64_t first, int64_t last, double* b) const {
    const int lane = Gpu::thread() % kWarp;
    for (int64_t i = first + Gpu::thread() / kWarp; i < last; i += Gpu::threads() / kWarp) {
      double sum = 0;
      for (int64_t j = last + lane; j < size_; j += kWarp) sum += at(i, j) * b[j];
      DEQ_UNROLL for (int mask = 1; mask < kWarp; mask *= 2) sum += Gpu::shuffle_xor(sum, mask);
      if (lane == 0) b[i] -= sum;
    }
    Gpu::sync();
    if (Gpu::thread() == 0)
      for (int64_t i = last - 1; i >= first; --i) {
        double sum = b[i];
        for (int64_t j = i + 1; j < last; ++j) sum -= at(i, j) * b[j];
        b[i] = sum / at(i, i);
      }
    Gpu::sync();
  }

  double* a_;
  const int64_t size_, stride_;
  LuExchange& exchange_;
};

}  // namespace deq
