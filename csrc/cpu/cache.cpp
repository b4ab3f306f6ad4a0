#include "cache.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <optional>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "trace.h"

namespace deq {
namespace {

// Two forms (W and its transpose) of the weights in use always stay; more only within the budget.
constexpr int64_t kBudgetBytes = 256 << 20;
constexpr size_t kAlwaysKept = 2;
// The list is searched from its start at every solve. Bounded by its bytes alone it held thousands of narrow weights after some
// minutes of training, and five sixths of the time went into the search.
constexpr size_t kMostKept = 64;

struct Digest {
  uint64_t word[2];
  bool operator==(const Digest& o) const { return word[0] == o.word[0] && word[1] == o.word[1]; }
};

// What is alike in all weights that can take each other's place.
struct Form {
  int64_t weights, width;
  int32_t type, transposed;
  const void* kernels;
  bool operator==(const Form& o) const {
    return weights == o.weights && width == o.width && type == o.type && transposed == o.transposed && kernels == o.kernels;
  }
};

// The memory of one form, or of what was there before.
struct Held {
  std::shared_ptr<Packed> packed;
  bool current = false;
};

struct Entry {
  Form form;
  std::optional<Digest> content;  // of all of W, if that was read
  std::optional<Digest> glance;   // of a sample of it, where W is large
  const void* source;             // where W lay: new content there replaces the old
  Held held[3];                   // by DeqPrecision, the native one packed
};

std::mutex mutex;
std::list<Entry> entries;  // most recently used first

uint64_t mixed(uint64_t h) {
  h = (h ^ (h >> 29)) * 0xBF58476D1CE4E5B9ull;
  return h ^ (h >> 32);
}

// Order-sensitive hash of contiguous bytes.
Digest digest(const char* data, int64_t bytes, void (*absorb)(uint64_t*, const void*, int64_t)) {
  uint64_t lanes[kHashLanes], rest[kHashLanes] = {};
  constexpr int64_t kBlock = sizeof lanes;
  for (int i = 0; i < kHashLanes; ++i) lanes[i] = 0x9E3779B97F4A7C15ull * (i + 1);
  const int64_t blocks = bytes / kBlock;
  absorb(lanes, data, blocks);
  memcpy(rest, data + blocks * kBlock, bytes - blocks * kBlock);
  absorb(lanes, rest, 1);
  uint64_t chains[4] = {static_cast<uint64_t>(bytes), 1, 2, 3};
  for (int i = 0; i < kHashLanes; ++i) chains[i & 3] = mixed(chains[i & 3] ^ lanes[i]);
  return {{mixed(chains[0] ^ mixed(chains[2])), mixed(chains[1] ^ mixed(chains[3]))}};
}

// The digest of a sequence that goes on with one more.
Digest followed(const Digest& d, const Digest& next) {
  return {{mixed(3 * d.word[0] ^ next.word[0]), mixed(3 * d.word[1] ^ next.word[1])}};
}

// A matrix stack as contiguous runs of m elements: the rows, or for a transposed view the columns.
struct Runs {
  const char* data;
  int64_t matrix_stride, run_stride;  // bytes
  int64_t count, bytes;               // runs a matrix, bytes a run
  bool adjacent() const { return run_stride == bytes; }
};

Digest content(const Runs& runs, int64_t weights, int threads, void (*absorb)(uint64_t*, const void*, int64_t)) {
  // Pieces of about 256 KB, so that large weights are read by all threads.
  const int64_t per_piece = std::max<int64_t>(1, (256 << 10) / runs.bytes);
  const int64_t pieces = (runs.count + per_piece - 1) / per_piece, total = weights * pieces;
  auto piece = [&](int64_t i) {
    const int64_t first = i % pieces * per_piece, count = std::min(per_piece, runs.count - first);
    const char* at = runs.data + i / pieces * runs.matrix_stride + first * runs.run_stride;
    if (runs.adjacent()) return digest(at, count * runs.bytes, absorb);
    Digest all{};
    for (int64_t r = 0; r < count; ++r) all = followed(all, digest(at + r * runs.run_stride, runs.bytes, absorb));
    return all;
  };
  if (total == 1) return piece(0);  // without a team of one thread and its two system calls
  std::vector<Digest> digests(total);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < total; ++i) digests[i] = piece(i);
  return digest(reinterpret_cast<const char*>(digests.data()), total * sizeof(Digest), absorb);
}

// A sample of all runs, kGlances pieces of one cache line: where it is another than it was, W has changed, and its content need
// not be read. That costs as much as 0.3 of packing, and a training step takes a new W forward and backward: 9 % of one at m =
// 1024 with 4 samples, 6 % at 2048 with 16 and at 256 with one. Nothing where W is so small that reading it costs as little.
constexpr int64_t kGlances = 64, kGlanceBytes = 64, kLeastGlanced = 128 << 10;

std::optional<Digest> glance(const Runs& runs, int64_t weights, void (*absorb)(uint64_t*, const void*, int64_t)) {
  if (weights * runs.count * runs.bytes < kLeastGlanced || runs.bytes < kGlanceBytes || weights * runs.count < kGlances)
    return std::nullopt;
  char sample[kGlances * kGlanceBytes];
  const int64_t total = weights * runs.count, places = runs.bytes / kGlanceBytes;
  for (int64_t i = 0; i < kGlances; ++i) {
    const int64_t run = i * total / kGlances, place = 37 * i % places;  // no column is left out
    memcpy(sample + i * kGlanceBytes,
           runs.data + run / runs.count * runs.matrix_stride + run % runs.count * runs.run_stride + place * kGlanceBytes,
           kGlanceBytes);
  }
  return digest(sample, sizeof sample, absorb);
}

// W in the precision computed in, rows contiguous.
template <class T>
std::vector<T> gathered(const DeqProblem& p) {
  std::vector<T> copy(p.weights * p.width * p.width);
  for (int64_t s = 0; s < p.weights; ++s)
    for (int64_t i = 0; i < p.width; ++i)
      load_row<T>(p.W, p.type, s * p.W.stride[0] + i * p.W.stride[1], T(1), p.width, &copy[(s * p.width + i) * p.width]);
  return copy;
}

int64_t first_bad_element(const DeqProblem& p) {
  for (int64_t s = 0; s < p.weights; ++s)
    for (int64_t i = 0; i < p.width; ++i)
      for (int64_t j = 0; j < p.width; ++j)
        if (!std::isfinite(element(p.W.data, p.type, s * p.W.stride[0] + i * p.W.stride[1] + j * p.W.stride[2])))
          return (s * p.width + i) * p.width + j + 1;
  return 0;
}

constexpr int64_t kHugePage = 2 << 20;

// Panels are handed on in pieces of so many bytes: half of a 1 MB L2.
constexpr int64_t kHotBytes = 512 << 10;

// Calls piece(s, first, last) for the panels of every matrix in pieces that stay in the L2 cache; whether all returned true.
template <class Piece>
bool for_panels(int64_t weights, int64_t m, int64_t panels, int64_t panel_bytes, int threads, const Piece& piece) {
  const int64_t groups = threads > 1 && m >= 256 ? std::min<int64_t>(panels, threads) : 1;
  const int64_t together = std::max<int64_t>(1, kHotBytes / panel_bytes);
  bool all = true;
#pragma omp parallel for num_threads(threads) reduction(&& : all) if (threads > 1 && groups * weights > 1)
  for (int64_t i = 0; i < weights * groups; ++i) {
    const int64_t s = i / groups, last = panels * (i % groups + 1) / groups;
    for (int64_t first = panels * (i % groups) / groups; first < last; first += together)
      all = piece(s, first, std::min(first + together, last)) && all;
  }
  return all;
}

// Of all forms.
int64_t bytes_of(const Entry& entry) {
  int64_t bytes = 0;
  for (const Held& held : entry.held)
    if (held.packed) bytes += held.packed->bytes;
  return bytes;
}

// Memory for a form that is not current. False when out of memory.
bool reserve(Held& held, int64_t weights, int64_t matrix_bytes) {
  const bool fits = held.packed && held.packed->matrix_bytes == matrix_bytes && held.packed->bytes == matrix_bytes * weights;
  if (fits && held.packed.use_count() == 1) {
    std::atomic_thread_fence(std::memory_order_acquire);  // who let go of it last, in another thread, has read it
    return true;
  }
  held.packed = std::make_shared<Packed>();
  held.packed->data = allocate(matrix_bytes * weights);
  held.packed->matrix_bytes = matrix_bytes;
  held.packed->bytes = matrix_bytes * weights;
  if (!held.packed->data) held.packed = nullptr;
  return held.packed != nullptr;
}

}  // namespace

void* allocate(int64_t bytes) {
  const int64_t align = bytes >= kHugePage ? kHugePage : 64;
  void* data = aligned_alloc(align, (std::max<int64_t>(bytes, 1) + align - 1) / align * align);
  if (data) prefer_huge_pages(data, bytes);
  return data;
}

void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), from = (start + kHugePage - 1) / kHugePage * kHugePage,
                  to = (start + bytes) / kHugePage * kHugePage;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Packed::~Packed() { free(data); }

template <class T>
Weights packed_weights(const DeqProblem& p, int threads, const Derived* derived) {
  const Kernels<T>& k = kernels<T>();
  const int64_t m = p.width, size = element_bytes(p.type);
  const bool native = size == static_cast<int64_t>(sizeof(T));
  const bool rows = p.W.stride[2] == 1 || m == 1, columns = p.W.stride[1] == 1;
  std::vector<T> copy;  // of 16-bit weights, and of views with no contiguous direction
  int64_t stride[3] = {p.W.stride[0], p.W.stride[1], p.W.stride[2]};
  const T* w = static_cast<const T*>(p.W.data);
  Runs runs{static_cast<const char*>(p.W.data), stride[0] * size, stride[rows ? 1 : 2] * size, m, m * size};
  if (m == 1) runs.run_stride = runs.bytes;
  auto gather = [&] {
    copy = gathered<T>(p);
    w = copy.data();
    stride[0] = m * m;
    stride[1] = m;
    stride[2] = 1;
  };
  if (!rows && !columns) {
    gather();
    const int64_t bytes = m * static_cast<int64_t>(sizeof(T));
    runs = Runs{reinterpret_cast<const char*>(w), m * bytes, bytes, m, bytes};
  }
  const Form form{p.weights, m, p.type, !rows && columns, &k};
  const std::optional<Digest> sample = glance(runs, p.weights, k.absorb);
  auto lies_here = [&](const Entry& e) { return e.source == p.W.data && e.form == form; };
  auto is_another = [&] {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = std::find_if(entries.begin(), entries.end(), lies_here);
    return it != entries.end() && it->glance && !(*it->glance == *sample);
  };
  std::optional<Digest> whole;
  if (!sample || !is_another()) whole = content(runs, p.weights, threads, k.absorb);

  const int64_t matrix_bytes = packed_elements<T>(k, m) * static_cast<int64_t>(sizeof(T));
  const int64_t panels = (m + k.panel - 1) / k.panel, panel_bytes = k.panel * m * static_cast<int64_t>(sizeof(T));
  auto matrix = [](const Packed& packed, int64_t s) { return static_cast<char*>(packed.data) + s * packed.matrix_bytes; };

  std::lock_guard<std::mutex> lock(mutex);
  auto found = std::find_if(entries.begin(), entries.end(),
                            [&](const Entry& e) { return whole && e.form == form && e.content && *e.content == *whole; });
  const bool is_known = found != entries.end();
  if (is_known) {
    entries.splice(entries.begin(), entries, found);
  } else {
    // In the memory of what lay here before, for kernels of any type.
    found = std::find_if(entries.begin(), entries.end(),
                         [&](const Entry& e) { return e.source == p.W.data && e.form.transposed == form.transposed; });
    Entry entry{form, whole, sample, p.W.data, {}};
    if (found != entries.end()) {
      for (int i = 0; i < 3; ++i) entry.held[i].packed = std::move(found->held[i].packed);
      entries.erase(found);
    }
    entries.push_front(std::move(entry));
  }
  Entry& entry = entries.front();
  Held &plain = entry.held[DEQ_NATIVE], *other = derived ? &entry.held[derived->form] : nullptr;
  const bool straight = derived && derived->straight && (!is_known || derived->stays) && native && (rows || columns);
  const bool packs = !straight && !plain.current, derives = other && !other->current;
  Weights result;
  auto fail = [&] {
    entries.pop_front();
    return result;
  };
  if (packs && !reserve(plain, p.weights, matrix_bytes)) return fail();
  if (derives && !reserve(*other, p.weights, derived->matrix_bytes)) return fail();
  if (packs || derives) {
    const Range range(Span::kPack, m);
    if (packs && !native && copy.empty()) gather();
    const bool finite = for_panels(p.weights, m, panels, panel_bytes, threads, [&](int64_t s, int64_t first, int64_t last) {
      const T* from = w + s * stride[0];
      char* to = derives ? matrix(*other->packed, s) : nullptr;
      if (straight) return derived->straight(from, stride[1], stride[2], to, first, last);
      T* packed = reinterpret_cast<T*>(matrix(*plain.packed, s));
      if (packs && !k.pack(from, stride[1], stride[2], m, packed, first, last)) return false;
      if (derives) derived->fill(packed, to, first, last);
      return true;
    });
    if (!finite) {
      result.bad_element = first_bad_element(p);
      return fail();
    }
    plain.current = plain.current || packs;
    if (other) other->current = true;
  }
  if (plain.current) result.packed = plain.packed;
  if (other) result.derived = other->packed;
  int64_t bytes = 0;
  size_t kept = 0;
  for (auto it = entries.begin(); it != entries.end();) {
    bytes += bytes_of(*it);
    it = ++kept > kAlwaysKept && (bytes > kBudgetBytes || kept > kMostKept) ? entries.erase(it) : std::next(it);
  }
  return result;
}

template Weights packed_weights<float>(const DeqProblem&, int, const Derived*);
template Weights packed_weights<double>(const DeqProblem&, int, const Derived*);

bool fingerprint(const DeqView& view, const int64_t (&size)[3], int64_t element_bytes, int threads, uint64_t (&result)[2]) {
  result[0] = result[1] = 0;
  if (size[0] * size[1] * size[2] == 0) return true;
  const bool rows = view.stride[2] == 1 || size[2] == 1, columns = view.stride[1] == 1 || size[1] == 1;
  if (!rows && !columns) return false;
  const int run = rows ? 2 : 1, across = rows ? 1 : 2;
  const Runs runs{static_cast<const char*>(view.data), view.stride[0] * element_bytes, view.stride[across] * element_bytes,
                  size[across], size[run] * element_bytes};
  const Digest d = content(runs, size[0], threads, kernels<float>().absorb);
  result[0] = rows ? d.word[0] : mixed(d.word[0]);
  result[1] = d.word[1];
  return true;
}

int64_t cache_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t bytes = 0;
  for (const Entry& e : entries) bytes += bytes_of(e);
  return bytes;
}

int64_t clear_cache() {
  const int64_t bytes = cache_bytes();
  std::lock_guard<std::mutex> lock(mutex);
  entries.clear();
  return bytes;
}

}  // namespace deq
