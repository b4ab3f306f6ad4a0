// C interface of the compiled kernels: pointers, sizes and strides; no torch, no Python.
// Functions return 0, or a DeqError; they never throw and never print.
#pragma once
#include <stdint.h>

#define DEQ_API extern "C" __attribute__((visibility("default")))

enum DeqType : int32_t { DEQ_FLOAT32 = 0, DEQ_FLOAT64 = 1, DEQ_BFLOAT16 = 2, DEQ_FLOAT16 = 3 };
enum DeqAcceleration : int32_t { DEQ_PLAIN = 0, DEQ_ANDERSON = 1, DEQ_ON_DEMAND = 2 };
enum DeqCriterion : int32_t { DEQ_RESIDUAL = 0, DEQ_ERROR_ESTIMATE = 1 };
// What the steps of a float32 or 16-bit solve multiply: native the iterate itself, the others its increments, rounded.
enum DeqPrecision : int32_t { DEQ_NATIVE = 0, DEQ_INT8_INCREMENTS = 1, DEQ_BFLOAT16_INCREMENTS = 2 };
enum DeqStatus : uint8_t { DEQ_CONVERGED = 0, DEQ_MAX_ITER = 1, DEQ_STALLED = 2, DEQ_DIVERGED = 3, DEQ_NONFINITE = 4 };
enum DeqError : int32_t { DEQ_OK = 0, DEQ_BAD_ARGUMENT = 1, DEQ_NO_MEMORY = 2 };

// What the fields of DeqReport say about a finished call.
struct DeqReport {
  int64_t failed;         // samples that did not converge
  int64_t bad_weight;     // 1 + flat index (s * m + i) * m + j of the first NaN or infinity in W, else 0; -1: W is too large
  int64_t bad_injection;  // 1 + flat sample index (s * B + b) of the first non-finite injection, else 0
  int64_t bad_start;      // the same for the starting point
};

// A strided view of (S, rows, m) elements; strides in elements.
struct DeqView {
  void* data;
  int64_t stride[3];
};

// z = act(W z + c), or with `mask` the adjoint u = d * (A u + g) (W holds A, injection holds g).
struct DeqProblem {
  int64_t weights, batch, width;  // S, B, m
  int32_t type;                   // DeqType of every view; halves are computed in float32
  int32_t activation;             // number in deq/activations.py
  struct DeqView W;               // (S, m, m)
  struct DeqView injection;       // (S, B, m)
  struct DeqView start;           // (S, B, m), data null for zero
  struct DeqView mask;            // (S, B, m), data null for a solve
  int32_t mask_is_value;          // 1: mask holds act(x) and d is derived from it; 0: mask holds d itself
  struct DeqView out;             // (S, B, m), rows contiguous; may be the mask
  int32_t* iterations;            // (S, B)
  void* residual;                 // (S, B), float, double for float64
  uint8_t* status;                // (S, B)
  struct DeqReport* report;
  int32_t acceleration, depth, criterion;
  int64_t max_iter;
  double tol;
  int32_t threads;
  // DeqPrecision; native where this CPU, build or problem cannot be served in it. Increments are not accelerated: DEQ_ON_DEMAND
  // ends a sample that contracts slowly or grows as DEQ_MAX_ITER, for the caller to go on with.
  int32_t precision;
  double largest_weight;  // above 0: a W whose rows have a larger root mean square norm is refused, and nothing is solved
  int32_t reflected;  // 1: iterate y = W s + c, s = 2 act(y) - y (or 2 d y - y) and return act(y); start and residual are of s
};

DEQ_API int32_t deq_cpu_solve(const struct DeqProblem* problem);

// What a solve multiplied, counted by the engine itself. A row is one sample's vector times its W.
struct DeqWork {
  int64_t native_rows;      // in float32 or float64
  int64_t native_products;  // multiplications made for them: m x m a row; less where zeros are skipped, more where lanes are idle
  int64_t native_sweeps;    // passes over W for them: once for all rows of a tile
  int64_t increment_rows;   // in the precision of the increments
  int64_t correction_rows;  // with what rounding W for the increments has left out, in the same precision
  int64_t increment_sweeps, correction_sweeps;
};
// Of the calling thread's last deq_cpu_solve; all zero before the first.
DEQ_API void deq_cpu_last_work(struct DeqWork* work);

// out (S, B, m) = act'(W start + injection); uses weights, batch, width, type, activation, W, injection, start, out, threads.
DEQ_API int32_t deq_cpu_derivative(const struct DeqProblem* problem);

// Products of stacked matrices: out[s] = factor left[s] right[s], or with `adds` added to it.
struct DeqProduct {
  int64_t count, rows, inner, columns;
  int32_t type;                     // DEQ_FLOAT32 or DEQ_FLOAT64, of all three
  struct DeqView left, right, out;  // (count, rows, inner), (count, inner, columns) in any strides; rows of out contiguous
  double factor;
  int32_t adds;
  int32_t threads;
};

DEQ_API int32_t deq_cpu_product(const struct DeqProduct* product);

// Inverts a matrix of n x n in place without pivoting, its rows contiguous and `stride` elements apart; for n up to about 100,
// and where every leading block is far from singular. A pivot of zero leaves numbers that are not finite.
DEQ_API int32_t deq_cpu_invert(void* matrix, int64_t stride, int64_t n, int32_t type);

// 128-bit fingerprint of the bits and the order of the elements of `view` (size (S, rows, columns)), whose rows or columns are
// contiguous; the same matrix stored the other way round has another. Reads with `threads` threads.
DEQ_API int32_t deq_cpu_fingerprint(const struct DeqView* view, const int64_t size[3], int32_t type, int32_t threads,
                                    uint64_t fingerprint[2]);

// A range of what the engine did inside a solve: pack (0, payload m), step (1, rows), anchor (2, rows), Anderson (3, pairs, or
// samples where several are taken together); the system's number of the thread, and nanoseconds of CLOCK_MONOTONIC.
struct DeqSpan {
  int32_t kind, thread;
  int64_t payload, start, end;
};
// Starts with an empty list; stop returns how many ranges have ended (a million at most), read copies so many of them.
DEQ_API void deq_trace_start(void);
DEQ_API int64_t deq_trace_stop(void);
DEQ_API int64_t deq_trace_read(struct DeqSpan* spans, int64_t most);
// To be called once: sends the ranges to an NVTX tool, domain "deq". 1 if one is attached and this build has NVTX, else 0.
DEQ_API int32_t deq_trace_attach(void);

// Instruction set in use: "avx512", "avx2" or "portable".
DEQ_API const char* deq_cpu_isa(void);
// 1 if steps of this DeqPrecision go with the instruction set in use, else 0.
DEQ_API int32_t deq_cpu_has_precision(int32_t precision);
// Choose one by name (tests, benchmarks); null or "auto" for the best here. DEQ_BAD_ARGUMENT if this CPU or build lacks it.
DEQ_API int32_t deq_cpu_set_isa(const char* name);
// Packed weights are cached by content; this drops them. Returns the bytes they held.
DEQ_API int64_t deq_cpu_clear_cache(void);
DEQ_API int64_t deq_cpu_cache_bytes(void);
// Fused multiply-add peak of one core, and the micro-kernel alone on (batch, width); GFLOP/s, best of `seconds`.
DEQ_API double deq_cpu_peak_gflops(int32_t type, double seconds);
// What the core reads of `bytes` bytes again and again, GB/s: of the cache that holds them, or of memory. 0 when out of memory.
DEQ_API double deq_cpu_read_gbs(int64_t bytes, double seconds);
DEQ_API double deq_cpu_kernel_gflops(int32_t type, int64_t batch, int64_t width, double seconds);
