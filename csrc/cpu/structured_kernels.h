// What one instruction set offers for weights of known structure: scalar roots and substitution, as a table of function
// pointers like kernels.h. Samples lie in the lanes of the vectors: substitution needs one output after the other, and every
// one of them for all samples at once.
#pragma once
#include <stdint.h>

namespace deq {

// Outputs a panel of the packed triangle. The panel p holds, for every k < 8 p + 8, the weights of its 8 outputs side by side.
constexpr int64_t kPanel = 8;

inline int64_t triangle_panels(int64_t m) { return (m + kPanel - 1) / kPanel; }
inline int64_t triangle_offset(int64_t panel) { return kPanel * kPanel * (panel * (panel + 1) / 2); }
inline int64_t triangle_elements(int64_t m) { return triangle_offset(triangle_panels(m)); }

// What the scalar equations z = act(d z + x) of a weight's diagonal d need, m values each, padded to whole panels.
template <class T>
struct Scalars {
  const T* d;        // the diagonal
  const T* inverse;  // 1 / (1 - d)
  const T* other;    // leaky_relu: 1 / (1 - 0.01 d); smooth activations: a lower bound of 1 - d act'
};

// One tile of samples, one a lane; rows are outputs k = 0 .. m, padded to whole panels, `samples` elements each.
template <class T>
struct Lanes {
  T* x;           // injection in, solution out
  T* mask;        // s of u = s * (x + A u), or null; with `writes_derivative` receives act' of the solution
  T* sums;        // 2 rows: |f(z) - z|^2 and |f(z)|^2 of every sample, in units of `unit`
  const T* unit;  // row of powers of two that keep the squares in range
  const T* packed;
  Scalars<T> scalars;
  int64_t width;
  int samples;  // one or two vectors
  int32_t activation;
  bool writes_derivative;
};

// One sample of a diagonal weight: z = act(d z + x) for every element of a row padded with zeros.
template <class T>
struct Row {
  const T* x;
  T* z;
  T* derivative;  // or null
  Scalars<T> scalars;
  int64_t width;
  int32_t activation;
  T unit;
};

// One block of outputs of W = diag(d) + P Q^T for a tile of samples, one a lane: z from q, and its share of Q^T z.
template <class T>
struct Reduced {
  T* x;            // injection, (outputs, samples)
  const T* mask;   // e of z = e * (P q + x), or null: z = act(d z + P q + x)
  const T* q;      // (r, samples)
  T* following;    // (r, samples), receives += Q^T z
  T* size;         // row of samples, receives += |z|^2
  const T *P, *Q;  // panels of 8 outputs, [panel][k < r][8], zero beyond the width
  Scalars<T> scalars;
  int64_t outputs, rank;
  int samples;
  int32_t activation;
};

// The last evaluation of such a block: z(q) is judged by f(z(q)) = act(d z + P q' + x), with q' = Q^T z(q), and z(q') is
// returned.
template <class T>
struct Last {
  Reduced<T> at;  // following holds q'; size and Q are not used
  T* out;         // injection again, z(q') out
  T* sums;        // 2 rows of samples, receive += |f(z) - z|^2 and |f(z)|^2
};

template <class T>
struct StructuredKernels {
  int lanes;    // elements a vector
  int samples;  // samples of the largest tile
  // packed <- the lower triangle of w (any strides, negative ones too), panels [first, last).
  void (*pack)(const T* w, int64_t row_stride, int64_t column_stride, int64_t m, bool strict, T* packed, int64_t first,
               int64_t last);
  void (*substitute)(const Lanes<T>&);
  // x[k][b] = rows[b * row_stride + k] for n samples, zero in the rest; `reversed` counts k from the end. largest[b] = max |x|,
  // infinity if any is not finite.
  void (*load)(const T* rows, int64_t row_stride, int n, int64_t m, bool reversed, int samples, T* x, T* largest);
  // rows[b * row_stride + k] = x[k][b].
  void (*store)(const T* x, int n, int64_t m, bool reversed, int samples, T* rows, int64_t row_stride);
  // x[k][b] *= factor[b]; largest[b] as in load.
  void (*scale)(T* x, const T* factor, int64_t m, int samples, T* largest);
  // Returns |f(z) - z|^2 and |f(z)|^2 in units of `unit`.
  void (*diagonal)(const Row<T>&, double* step2, double* size2);
  void (*reduce)(const Reduced<T>&);
  void (*last)(const Last<T>&);
};

template <class T>
const StructuredKernels<T>* portable_structured();
template <class T>
const StructuredKernels<T>* avx2_structured();
template <class T>
const StructuredKernels<T>* avx512_structured();

// The table in use.
template <class T>
const StructuredKernels<T>& structured_kernels();

}  // namespace deq
