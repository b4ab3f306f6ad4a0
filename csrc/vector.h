// Steps of a fixed-point solve whose function is not ours: all that happens between two evaluations of f, in one call.
// The definition is deq/solvers/generic/torch_steps.py. No torch, no Python: plain memory and numbers.
#pragma once
#include <stdint.h>

#include "kernels.h"

enum DeqMethod : int32_t { DEQ_STEP_PLAIN = 0, DEQ_STEP_ANDERSON = 1, DEQ_STEP_AUTO = 2, DEQ_STEP_BROYDEN = 3 };
enum DeqMeasure : int32_t { DEQ_MEASURE_RESIDUAL = 0, DEQ_MEASURE_ERROR = 1, DEQ_MEASURE_ABSOLUTE = 2 };
constexpr uint8_t DEQ_RUNNING = 255;        // status of a sample that is not done
constexpr int32_t DEQ_MAX_STEP_DEPTH = 32;  // of Broyden's history; Anderson's is bounded by anderson.h

struct DeqSteps {
  int64_t batch, width;
  int32_t type;     // DEQ_FLOAT32 or DEQ_FLOAT64 of y, z, fy and the history
  int32_t method;   // DeqMethod
  int32_t measure;  // DeqMeasure
  int32_t depth;    // pairs or steps in the history; 0 for the plain method
  int32_t threads;
  int32_t affine;  // whether f is: then the residual of a mix of evaluations is known without evaluating there
  double damping, tol, leave;
  int64_t max_iter;
  int64_t evaluations;  // so far; counted by deq_cpu_advance
  void* y;              // (batch, width) points; overwritten with those where f is wanted next
  void* z;              // (batch, width) best images, complete after deq_cpu_collect
  const void* fy;       // (batch, width) f(y), or f(y) - shift; set by deq_cpu_advance
  const void* shift;    // (batch, width) what f(y) lacks, or null
  void* image;          // (batch, width) for the sum of both; unused without shift
  void* first;          // (batch, depth, width) Anderson: images f(y); Broyden: steps
  void* second;         // (batch, depth, width) Anderson: f(y) - y
  void* samples;        // batch x deq_cpu_sample_bytes(depth), aligned to 8 bytes
  double* sums;         // deq_cpu_step_sums(batch, width, depth) of them
  int32_t* iterations;  // (batch)
  double* residual;     // (batch)
  double* norms;        // (batch, 2) |f(y) - y| and |f(y)| of the last evaluation that was judged
  uint8_t* status;      // (batch) DeqStatus or DEQ_RUNNING
  int64_t failed;       // how many are done without having converged
};

DEQ_API int64_t deq_cpu_sample_bytes(int32_t depth);
DEQ_API int64_t deq_cpu_step_sums(int64_t batch, int64_t width, int32_t depth);
// Judges f(y) for every sample and writes the next y. Returns how many samples are not done, or -1 for bad arguments.
DEQ_API int64_t deq_cpu_advance(struct DeqSteps* steps, const void* fy);
// Brings the best image of every sample into z.
DEQ_API void deq_cpu_collect(struct DeqSteps* steps);
// The 2-norm of `count` elements of a type of DeqSteps: not finite where one of them is not, or where it overflows.
DEQ_API double deq_cpu_norm(const void* x, int64_t count, int32_t type);
