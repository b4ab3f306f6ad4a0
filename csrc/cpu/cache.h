// Packed weights, kept between calls and found again by content.
#pragma once
#include <stdint.h>

#include <functional>
#include <memory>

#include "../kernels.h"

namespace deq {

struct Packed {
  void* data = nullptr;  // S matrices, each of `matrix_bytes`, aligned to 64 bytes
  int64_t matrix_bytes = 0, bytes = 0;
  int64_t bad_element = 0;  // 1 + flat index of the first non-finite element of W; data is null then
  ~Packed();

  // The same weights in another precision, by DeqPrecision. Guarded by the cache.
  struct Form {
    std::shared_ptr<Packed> packed;
    bool current = false;  // false: memory of earlier weights, to be written over
  };
  mutable Form forms[3];
};

// Another form of the packed weights, made of their panels while those are in the cache of the core.
struct Derived {
  int form;              // its number
  int64_t matrix_bytes;  // of one matrix
  // Writes what belongs to the panels [first, last) of one packed matrix.
  std::function<void(const void* packed, char* to, int64_t first, int64_t last)> fill;
  std::shared_ptr<const Packed> made;  // set by packed_weights; null when out of memory
};

// The packed form of the (S, m, m) view W for the kernels in use, from the cache or made now with `threads` threads; with
// `derived` that too, kept with it.
//
// The key is the content itself (a 128-bit fingerprint, one read of W: about a third of the price of packing), not an address
// or a version counter: writing through .data, views, freed and reused memory can never bring back old weights. Weights that are
// seen to have changed by a sample of them are packed at once, without a key; the second call after that, if they stay as they
// are, packs them with one.
// Null when out of memory.
template <class T>
std::shared_ptr<const Packed> packed_weights(const DeqProblem& problem, int threads, Derived* derived = nullptr);

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
