// Loops over contiguous vectors, compiled for several instruction sets in one binary and chosen at load. Sums are taken in
// double: squares of float32 leave its range, and memory, not arithmetic, decides how long they take.
#pragma once
#include <stdint.h>

namespace deq {

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#define DEQ_CLONES
#elif __GNUC__ >= 12
#define DEQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which has no dispatcher for levels, and an "arch=" of another name would be for one maker's CPUs
#define DEQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

constexpr int kLanes = 16;

// residual_loop: sums = |fy - y|^2, |fy|^2, |y|^2, and g = fy - y where g is not null.
#define DEQ_VECTOR_LOOPS(T)                                                               \
  DEQ_CLONES void residual_loop(const T* y, const T* fy, T* g, int64_t n, double* sums) { \
    double a[kLanes] = {}, b[kLanes] = {}, c[kLanes] = {};                                \
    int64_t i = 0;                                                                        \
    for (; i + kLanes <= n; i += kLanes)                                                  \
      for (int l = 0; l < kLanes; ++l) {                                                  \
        const T difference = fy[i + l] - y[i + l];                                        \
        const double step = difference, image = fy[i + l], point = y[i + l];              \
        if (g) g[i + l] = difference;                                                     \
        a[l] += step * step;                                                              \
        b[l] += image * image;                                                            \
        c[l] += point * point;                                                            \
      }                                                                                   \
    for (; i < n; ++i) {                                                                  \
      const T difference = fy[i] - y[i];                                                  \
      const double step = difference, image = fy[i], point = y[i];                        \
      if (g) g[i] = difference;                                                           \
      a[0] += step * step;                                                                \
      b[0] += image * image;                                                              \
      c[0] += point * point;                                                              \
    }                                                                                     \
    sums[0] = sums[1] = sums[2] = 0;                                                      \
    for (int l = 0; l < kLanes; ++l) sums[0] += a[l], sums[1] += b[l], sums[2] += c[l];   \
  }                                                                                       \
  DEQ_CLONES double dot_loop(const T* x, const T* y, int64_t n) {                         \
    double a[kLanes] = {}, sum = 0;                                                       \
    int64_t i = 0;                                                                        \
    for (; i + kLanes <= n; i += kLanes)                                                  \
      for (int l = 0; l < kLanes; ++l) a[l] += static_cast<double>(x[i + l]) * y[i + l];  \
    for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];                           \
    for (int l = 0; l < kLanes; ++l) sum += a[l];                                         \
    return sum;                                                                           \
  }                                                                                       \
  DEQ_CLONES void add_loop(T* out, const T* x, const T* y, int64_t n) {                   \
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];                                 \
  }                                                                                       \
  DEQ_CLONES void scale_loop(T* out, T a, const T* x, int64_t n) {                        \
    for (int64_t i = 0; i < n; ++i) out[i] = a * x[i];                                    \
  }                                                                                       \
  DEQ_CLONES void axpy_loop(T* out, T a, const T* x, int64_t n) {                         \
    for (int64_t i = 0; i < n; ++i) out[i] += a * x[i];                                   \
  }                                                                                       \
  DEQ_CLONES void damped_loop(T* y, const T* fy, T beta, int64_t n) {                     \
    for (int64_t i = 0; i < n; ++i) y[i] += beta * (fy[i] - y[i]);                        \
  }

}  // namespace deq
