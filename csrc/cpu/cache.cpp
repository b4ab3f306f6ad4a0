#include "cache.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "trace.h"

namespace deq {
namespace {

// Two forms (W and its transpose) of the weights in use always stay; more only within the budget.
constexpr int64_t kBudgetBytes = 256 << 20;
constexpr size_t kAlwaysKept = 2;

struct Key {
  uint64_t content[2];
  int64_t weights, width;
  int32_t type, transposed;
  const void* kernels;
  bool operator==(const Key& o) const {
    return content[0] == o.content[0] && content[1] == o.content[1] && weights == o.weights && width == o.width &&
           type == o.type && transposed == o.transposed && kernels == o.kernels;
  }
};

struct Entry {
  Key key;
  const void* source;  // where W lay: new content there replaces the old
  std::shared_ptr<Packed> packed;
};

std::mutex mutex;
std::list<Entry> entries;  // most recently used first

uint64_t mixed(uint64_t h) {
  h = (h ^ (h >> 29)) * 0xBF58476D1CE4E5B9ull;
  return h ^ (h >> 32);
}

struct Digest {
  uint64_t word[2];
};

// Order-sensitive hash of contiguous bytes.
Digest digest(const char* data, int64_t bytes, void (*absorb)(uint64_t*, const void*, int64_t)) {
  uint64_t lanes[kHashLanes], rest[kHashLanes] = {};
  constexpr int64_t kBlock = sizeof lanes;
  for (int i = 0; i < kHashLanes; ++i) lanes[i] = mixed(i + 1);
  const int64_t blocks = bytes / kBlock;
  absorb(lanes, data, blocks);
  memcpy(rest, data + blocks * kBlock, bytes - blocks * kBlock);
  absorb(lanes, rest, 1);
  Digest d{{static_cast<uint64_t>(bytes), 1}};
  for (int i = 0; i < kHashLanes; ++i) d.word[i & 1] = mixed(d.word[i & 1] ^ lanes[i]);
  return d;
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
    std::vector<Digest> parts(count);
    for (int64_t r = 0; r < count; ++r) parts[r] = digest(at + r * runs.run_stride, runs.bytes, absorb);
    return digest(reinterpret_cast<const char*>(parts.data()), count * sizeof(Digest), absorb);
  };
  if (total == 1) return piece(0);  // without a team of one thread and its two system calls
  std::vector<Digest> digests(total);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < total; ++i) digests[i] = piece(i);
  return digest(reinterpret_cast<const char*>(digests.data()), total * sizeof(Digest), absorb);
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

// Packs every matrix; returns false if an element is not finite.
template <class T>
bool pack_all(const DeqProblem& p, const Kernels<T>& k, const T* w, const int64_t (&stride)[3], T* packed, int threads) {
  const int64_t m = p.width, panels = (m + k.panel - 1) / k.panel, elements = packed_elements<T>(k, m);
  const int64_t groups = threads > 1 && m >= 256 ? std::min<int64_t>(panels, threads) : 1;
  bool finite = true;
#pragma omp parallel for num_threads(threads) reduction(&& : finite) if (threads > 1 && groups * p.weights > 1)
  for (int64_t i = 0; i < p.weights * groups; ++i) {
    const int64_t s = i / groups, group = i % groups;
    finite = k.pack(w + s * stride[0], stride[1], stride[2], m, packed + s * elements, panels * group / groups,
                    panels * (group + 1) / groups) &&
             finite;
  }
  return finite;
}

// Of an entry with all its forms.
int64_t bytes_of(const Packed& packed) {
  int64_t bytes = packed.bytes;
  for (const Packed::Form& form : packed.forms)
    if (form.packed) bytes += form.packed->bytes;
  return bytes;
}

std::shared_ptr<Packed> make_packed(int64_t weights, int64_t matrix_bytes) {
  auto packed = std::make_shared<Packed>();
  packed->data = allocate(matrix_bytes * weights);
  packed->bytes = matrix_bytes * weights;
  packed->matrix_bytes = matrix_bytes;
  return packed->data ? packed : nullptr;
}

}  // namespace

void* allocate(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t align = bytes >= kHuge ? kHuge : 64;
  void* data = aligned_alloc(align, (std::max<int64_t>(bytes, 1) + align - 1) / align * align);
#ifdef MADV_HUGEPAGE
  if (data && bytes >= kHuge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

Packed::~Packed() { free(data); }

template <class T>
std::shared_ptr<const Packed> packed_weights(const DeqProblem& p, int threads) {
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
  const Digest d = content(runs, p.weights, threads, k.absorb);
  const Key key{{d.word[0], d.word[1]}, p.weights, m, p.type, !rows && columns, &k};

  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = entries.begin(); it != entries.end(); ++it)
    if (it->key == key) {
      entries.splice(entries.begin(), entries, it);
      return entries.front().packed;
    }

  if (!native && copy.empty()) gather();
  const int64_t matrix_bytes = packed_elements<T>(k, m) * static_cast<int64_t>(sizeof(T));
  std::shared_ptr<Packed> packed;
  for (auto it = entries.begin(); it != entries.end(); ++it)
    if (it->source == p.W.data && it->key.transposed == key.transposed) {
      const bool fits = it->packed->matrix_bytes == matrix_bytes && it->packed->bytes == matrix_bytes * p.weights;
      if (fits && it->packed.use_count() == 1) packed = it->packed;
      entries.erase(it);
      break;
    }
  if (!packed) packed = make_packed(p.weights, matrix_bytes);
  if (!packed) return nullptr;
  for (Packed::Form& form : packed->forms) form.current = false;
  const Range range(Span::kPack, p.width);
  if (!pack_all<T>(p, k, w, stride, static_cast<T*>(packed->data), threads)) {
    auto bad = std::make_shared<Packed>();
    bad->bad_element = first_bad_element(p);
    return bad;
  }
  entries.push_front(Entry{key, p.W.data, packed});
  int64_t bytes = 0;
  size_t kept = 0;
  for (auto it = entries.begin(); it != entries.end();) {
    bytes += bytes_of(*it->packed);
    it = ++kept > kAlwaysKept && bytes > kBudgetBytes ? entries.erase(it) : std::next(it);
  }
  return packed;
}

std::shared_ptr<const Packed> packed_form(const Packed& packed, int form, int64_t weights, int64_t matrix_bytes,
                                          const std::function<void(char*)>& fill) {
  std::lock_guard<std::mutex> lock(mutex);
  Packed::Form& entry = packed.forms[form];
  if (entry.current) return entry.packed;
  const bool fits = entry.packed && entry.packed->matrix_bytes == matrix_bytes && entry.packed->bytes == matrix_bytes * weights;
  if (!fits || entry.packed.use_count() > 1) entry.packed = make_packed(weights, matrix_bytes);
  if (!entry.packed) return nullptr;
  const Range range(Span::kPack, matrix_bytes);
  fill(static_cast<char*>(entry.packed->data));
  entry.current = true;
  return entry.packed;
}

template std::shared_ptr<const Packed> packed_weights<float>(const DeqProblem&, int);
template std::shared_ptr<const Packed> packed_weights<double>(const DeqProblem&, int);

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
  for (const Entry& e : entries) bytes += bytes_of(*e.packed);
  return bytes;
}

int64_t clear_cache() {
  const int64_t bytes = cache_bytes();
  std::lock_guard<std::mutex> lock(mutex);
  entries.clear();
  return bytes;
}

}  // namespace deq
