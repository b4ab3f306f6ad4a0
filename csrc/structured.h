// C interface of the kernels for weights of known structure, in the conventions of kernels.h. All views are float32 or float64,
// with contiguous rows.
#pragma once
#include <stdint.h>

#include "kernels.h"

// z = act(W z + c) by one forward substitution, or with `mask` u = s * (W u + g) (injection holds g); W lower triangular.
// For a diagonal W, `packed` is null and every element is solved on its own.
struct DeqSubstitution {
  int64_t batch, width;  // B, m
  int32_t type;          // DEQ_FLOAT32 or DEQ_FLOAT64
  int32_t activation;    // of the solve; of the mask where that holds act(x) instead of s, else -1
  int32_t reversed;      // 1: outputs are counted from the last to the first, W is the transpose of one packed that way
  int32_t threads;
  const void* packed;         // deq_cpu_triangle_elements(m) elements, see deq_cpu_pack_triangle; null for a diagonal W
  const void* diagonal;       // (m,), in the order of the outputs solved
  struct DeqView injection;   // (1, B, m)
  struct DeqView mask;        // (1, B, m), data null for a solve
  struct DeqView out;         // (1, B, m)
  struct DeqView derivative;  // (1, B, m), receives act'(W z + c) of a solve; data null if not wanted
  // (B,) ||f(z) - z|| / ||f(z)|| from the sums at hand; infinity where z leaves the range of the type (held at its largest
  // number), NaN where the injection is not finite.
  void* residual;
};

// DEQ_BAD_ARGUMENT if any diagonal element d admits more than one root of z = act(d z + x): 1 - d act' must be positive.
DEQ_API int32_t deq_cpu_substitute(const struct DeqSubstitution* problem);

// One evaluation for W = diag(d) + P Q^T in R^r: z(q) is the root of z = act(d z + P q + c), or with `mask` e * (P q + c).
struct DeqReduced {
  int64_t batch, width, rank;  // B, m, r
  int32_t type;                // DEQ_FLOAT32 or DEQ_FLOAT64
  int32_t activation;
  int32_t threads;
  const void *P, *Q;         // ceil(m / 8) panels of (r, 8) elements: 8 rows of the factor, transposed; zero beyond row m
  const void* diagonal;      // (m,)
  struct DeqView injection;  // (1, B, m), finite
  struct DeqView mask;       // (1, B, m), data null for a solve
  struct DeqView q;          // (1, B, r)
  struct DeqView following;  // (1, B, r), receives Q^T z; with `out` holds it
  // (B,), receives ||z||, or with `out` the residual ||f(z) - z|| / ||f(z)|| of z(q); NaN where squares left the range of the
  // type.
  void* size;
  struct DeqView out;  // (1, B, m), data null, or receives z(Q^T z(q)): the last evaluation
};

DEQ_API int32_t deq_cpu_reduced(const struct DeqReduced* problem);

// The plain iteration q <- Q^T z(q) of every sample from its q, in place, until the bound r of its residual is at most `leave`,
// or at most `tol` and falling slowly; a sample that gains less than a factor of `slow` twice, or whose squares leave the range
// of the type, is left where it is. Afterwards `following` holds Q^T z(q) and `size` holds r.
struct DeqReducedIteration {
  struct DeqReduced problem;
  const double* gram;  // (r, r): |f(z(q)) - z(q)|^2 is at most d^T gram d with d = Q^T z(q) - q
  double tol, leave, slow;
  int32_t max_iter;
  int32_t* iterations;  // (B,)
};

DEQ_API int32_t deq_cpu_reduced_iterate(const struct DeqReducedIteration* iteration);

// packed <- the lower triangle of (m, m) `matrix` (without its diagonal if strict), panels of 8 outputs; with `reversed` that of
// the transpose with rows and columns counted from the end. `diagonal` receives its m diagonal elements in that order.
DEQ_API int64_t deq_cpu_triangle_elements(int64_t width);
DEQ_API int32_t deq_cpu_pack_triangle(const struct DeqView* matrix, int64_t width, int32_t type, int32_t strict, int32_t reversed,
                                      int32_t threads, void* packed, void* diagonal);
