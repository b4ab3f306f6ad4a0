// Packed weights, kept between calls and found again by content.
#pragma once
#include <stdint.h>

#include <functional>
#include <memory>

#include "../kernels.h"

namespace deq {

// S matrices of one form.
struct Packed {
  void* data = nullptr;  // each of `matrix_bytes`, aligned to 64 bytes
  int64_t matrix_bytes = 0, bytes = 0;
  ~Packed();
};

// Another form of the weights, by DeqPrecision, made of the panels of the packed ones while those are in the cache of the core.
struct Derived {
  int form;
  int64_t matrix_bytes;  // of one matrix
  // Writes what belongs to the panels [first, last) of one packed matrix.
  std::function<void(const void* packed, char* to, int64_t first, int64_t last)> fill;
  // The same of one matrix as the caller has it, of elements in the precision computed in, its rows or its columns contiguous;
  // strides in elements. False if one is not finite. With it new weights like that are not packed, nor with `stays` known ones.
  std::function<bool(const void* w, int64_t row_stride, int64_t column_stride, char* to, int64_t first, int64_t last)> straight;
  bool stays;
};

struct Weights {
  std::shared_ptr<const Packed> packed, derived;
  int64_t bad_element = 0;  // 1 + flat index of the first non-finite element of W; no form of it is made
};

// The packed form of the (S, m, m) view W for the kernels in use, from the cache or made now with `threads` threads, and with
// `derived` that form too, kept with it; null where out of memory. Weights that are new have no packed form if the derived one is
// made straight of them: it is made when they are found again, unless they stay in place.
//
// The key is the content itself (a 128-bit fingerprint, one read of W: about a third of the price of packing), not an address
// or a version counter: writing through .data, views, freed and reused memory can never bring back old weights. Weights that are
// seen to have changed by a sample of them are packed at once, without a key; the second call after that, if they stay as they
// are, packs them with one.
template <class T>
Weights packed_weights(const DeqProblem& problem, int threads, const Derived* derived = nullptr);

// 128 bits of the content of `view`, see deq_cpu_fingerprint; false if neither its rows nor its columns are contiguous.
bool fingerprint(const DeqView& view, const int64_t (&size)[3], int64_t element_bytes, int threads, uint64_t (&result)[2]);

int64_t cache_bytes();
int64_t clear_cache();

// Aligned to 64 bytes (huge pages where the size allows); freed with free().
void* allocate(int64_t bytes);
// Memory that nobody has touched yet comes in huge pages where the system has them: 16 MB of a gradient that was allocated for
// this call then take 12.2 instead of 13.8 ms to backward at m = 2048 with 16 samples.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace deq
