// C interface of the CUDA kernels, in the conventions of kernels.h; present where the library was built with CUDA. Data and
// scratch lie on the device, calls return once the work is queued on the stream, and nothing waits for the device.
#pragma once
#include <stdint.h>

#include "kernels.h"

enum DeqCudaError : int32_t {
  DEQ_NOT_SUPPORTED = 3,  // the device is too old, or the problem does not fit it
  DEQ_LAUNCH_FAILED = 4,  // deq_cuda_why() says what CUDA said
};

enum DeqCudaRegime : int32_t { DEQ_BLOCK = 0, DEQ_GRID = 1 };

// How a problem runs on a device.
struct DeqCudaPlan {
  int32_t regime, kernel;  // DeqCudaRegime, and which of its kernels
  int32_t blocks;          // a weight
  int32_t threads;         // a block
  int64_t shared;          // bytes of dynamic shared memory a block
  int64_t scratch;         // bytes of device memory that a solve needs
};

// Chooses kernel and grid for S weights of width m and B samples each. `regime` -1: whichever serves. DEQ_NOT_SUPPORTED where
// none does; deq_cuda_why() says why.
DEQ_API int32_t deq_cuda_plan(int64_t weights, int64_t batch, int64_t width, int32_t device, int32_t regime,
                              struct DeqCudaPlan* plan);

// The kernel of a regime that holds one W of this width on so many multiprocessors with `shared` bytes a block, or -1: what a
// plan is made from, for any device.
DEQ_API int32_t deq_cuda_kernel(int32_t regime, int64_t width, int64_t batch, int32_t processors, int64_t shared);

// Copies float32 weights W (S, m, m) of any strides to `packed`, rows side by side and one after the other.
DEQ_API int32_t deq_cuda_pack(const struct DeqView* W, int64_t weights, int64_t width, float* packed, int32_t device,
                              void* stream);

// Solves a float32 problem whose W has contiguous rows; `threads` and `precision` are not looked at, `reflected` must be 0,
// and no more than five pairs are mixed whatever `depth` says. `regime`, `kernel` and `blocks` are those of a plan for the same
// sizes and device; `scratch` holds so many bytes. The report lies on the device: -1 in its fields, and in those
// for bad input the least 1 + index found.
DEQ_API int32_t deq_cuda_solve(const struct DeqProblem* problem, int32_t regime, int32_t kernel, int32_t blocks, void* scratch,
                               int64_t bytes, int32_t device, void* stream);

// Takes on the samples that a solve has failed on, in place: `iterations`, `residual`, `status` and `out` are those that the
// solve wrote, and every sample whose status is neither DEQ_CONVERGED nor DEQ_NONFINITE goes on by semi-smooth Newton in float64
// until max_iter evaluations or 60 steps are up; one of an adjoint by its linear system. It is converged only on a residual
// evaluated in float32, and only a smaller residual replaces its own. One block a sample, for at most half a second each.
// `start`, acceleration and criterion are not looked at. The plan says how many blocks, and what scratch they need;
// DEQ_NOT_SUPPORTED where W is too wide.
DEQ_API int32_t deq_cuda_rescue_plan(int64_t weights, int64_t batch, int64_t width, int32_t device, struct DeqCudaPlan* plan);
DEQ_API int32_t deq_cuda_rescue(const struct DeqProblem* problem, int32_t blocks, void* scratch, int64_t bytes, int32_t device,
                                void* stream);

// z = act(T z + c) by one forward substitution, or with `mask` u = s * (T u + c): T is the lower triangle of W, with `upper` its
// upper one, with `strict` without its diagonal. Float32. 1 - d act' must be positive for every diagonal element d.
struct DeqCudaSubstitution {
  int64_t batch, width;      // B, m
  int32_t activation;        // of a solve
  int32_t strict, upper;     // 0 or 1
  struct DeqView W;          // (1, m, m), any strides
  struct DeqView injection;  // (1, B, m)
  struct DeqView mask;       // (1, B, m), data null for a solve
  struct DeqView out;        // (1, B, m), rows contiguous
  // (B,) ||f(z) - z|| / ||f(z)|| from the sums at hand; infinity where z leaves the range of float32 (held at its largest
  // number), NaN where the injection is not finite.
  float* residual;
};

// Bytes of scratch that a substitution needs.
DEQ_API int64_t deq_cuda_substitute_bytes(int64_t batch, int64_t width);
DEQ_API int32_t deq_cuda_substitute(const struct DeqCudaSubstitution* problem, void* scratch, int64_t bytes, int32_t device,
                                    void* stream);

// Measures a constant of the device, and waits for it. Seconds: "grid_barrier" (cooperative groups), "flag_barrier" (a flag a
// block), "word_exchange" (data and flag in one word: 64 words a block, read by all), "cluster_barrier" (8 blocks),
// "block_barrier" (512 threads), "graph_chain" (one of a chain of empty kernels). Bytes per second: "broadcast" (all blocks read
// 64 KiB from L2), "shared_reads" (one multiprocessor). FLOP per second: "tensor_core" (mma.sync in bfloat16, all together).
DEQ_API int32_t deq_cuda_measure(const char* name, int32_t device, double* result);

// What went wrong in the last call of this thread that failed, in words.
DEQ_API const char* deq_cuda_why(void);
