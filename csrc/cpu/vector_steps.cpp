// Fixed-point steps for functions that are not ours; see vector.h and deq/solvers/generic/torch_steps.py.
//
// Memory traffic is what counts, in units of one state: the plain method 4 (reads y and f(y), writes y; the best image is the
// next point itself), Anderson at depth n 2 n + 4, Broyden with n steps 2 n + 6. A state is cut into pieces that fit the first
// cache, so that what one loop over a piece writes the next one finds there. Sums are taken piece by piece and added in
// order: the result is the same for any number of threads.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <limits>

#include "../anderson.h"
#include "../vector.h"
#include "vector_loops.h"

namespace deq {
namespace {

DEQ_VECTOR_LOOPS(float)
DEQ_VECTOR_LOOPS(double)

// The rule of deq/solvers/generic/rule.py and torch_steps.py.
constexpr int64_t kSlowAfter = 12, kPatience = 128, kPatienceAtFloor = 32;
constexpr double kSlowContraction = 0.8, kFloorEps = 1000.0, kSafeguard = 10.0, kGrown = 1e3, kSmallestPivot = 1e-3,
                 kGramRounding = 1e-14;

constexpr int64_t kPieceBytes = 16384;
constexpr int64_t kElementsPerThread = 32768;  // less than this takes no longer than a parallel region's start

enum Action : int32_t { kNothing, kPlain, kMix, kBroyden, kReturn };
enum Place : int32_t { kSaved, kPoint, kSlot };  // where the best image is: in z, in y, or in a slot of the history

struct Sample {
  double step[2];  // |f(y) - y| of the last two evaluations
  double best, best_residual, limit;
  double mixed;  // norm of the mixed residual
  int64_t best_at, restarted_at;
  int32_t count, head;  // pairs in the history, slot of the newest
  int32_t place, slot;  // of the best image
  int32_t accelerated, action;
  double a[DEQ_MAX_STEP_DEPTH + 1];                               // what the next point is mixed of, by slot; Broyden: then of g
  double b[DEQ_MAX_STEP_DEPTH];                                   // Anderson: of the residuals, where damped
  double* gram() { return reinterpret_cast<double*>(this + 1); }  // (depth, depth) by slot
};

template <class T>
struct Steps {
  DeqSteps& p;
  const int64_t piece = kPieceBytes / static_cast<int64_t>(sizeof(T));
  const int64_t pieces = (p.width + piece - 1) / piece;
  const int64_t sums_each = 3 + 2 * p.depth;  // three norms, dots with the history, dots of Broyden's new step

  Sample& sample(int64_t b) const {
    return *reinterpret_cast<Sample*>(static_cast<char*>(p.samples) + b * deq_cpu_sample_bytes(p.depth));
  }
  T* row(void* base, int64_t b) const { return static_cast<T*>(base) + b * p.width; }
  const T* row(const void* base, int64_t b) const { return static_cast<const T*>(base) + b * p.width; }
  T* row(void* base, int64_t b, int64_t slot) const { return static_cast<T*>(base) + (b * p.depth + slot) * p.width; }
  const T* image(int64_t b) const { return static_cast<const T*>(p.shift ? p.image : p.fy) + b * p.width; }
  double* sums(int64_t b, int64_t part) const { return p.sums + (b * pieces + part) * sums_each; }
  bool is_mixing() const { return p.method == DEQ_STEP_ANDERSON || p.method == DEQ_STEP_AUTO; }
  bool pushes(const Sample& s) const { return is_mixing() && s.accelerated; }

  // Calls work(b, piece, first element, elements) for all pieces of the samples that wanted(b) is true of.
  template <class Wanted, class Work>
  void each_piece(const Wanted& wanted, const Work& work) const {
    const int64_t tasks = p.batch * pieces;
    const int64_t worth = p.batch * p.width / kElementsPerThread;
    const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({p.threads, worth, tasks})));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task / pieces, part = task % pieces;
      if (wanted(b)) work(b, part, part * piece, std::min(piece, p.width - part * piece));
    }
  }

  // Norms, and with a history the residual and its dots with every older one.
  void measure() const {
    each_piece([&](int64_t b) { return p.status[b] == DEQ_RUNNING; },
               [&](int64_t b, int64_t part, int64_t from, int64_t n) {
                 Sample& s = sample(b);
                 double* out = sums(b, part);
                 const T *y = row(p.y, b) + from, *fy = image(b) + from;
                 if (p.shift) add_loop(row(p.image, b) + from, row(p.fy, b) + from, row(p.shift, b) + from, n);
                 if (pushes(s)) {
                   const int32_t slot = (s.head + 1) % p.depth, count = std::min(s.count + 1, p.depth);
                   if (s.place == kSlot && s.slot == slot)
                     memcpy(row(p.z, b) + from, row(p.first, b, slot) + from, n * sizeof(T));
                   T* g = row(p.second, b, slot) + from;
                   residual_loop(y, fy, g, n, out);
                   memcpy(row(p.first, b, slot) + from, fy, n * sizeof(T));
                   for (int32_t i = 0; i < count; ++i) {
                     const int32_t at = (slot - i + p.depth) % p.depth;
                     out[3 + at] = i == 0 ? out[0] : dot_loop(g, row(p.second, b, at) + from, n);
                   }
                 } else if (p.method == DEQ_STEP_BROYDEN) {
                   alignas(64) T g[kPieceBytes / sizeof(T)];
                   residual_loop(y, fy, g, n, out);
                   for (int32_t i = 0; i < s.count; ++i) out[3 + i] = dot_loop(g, row(p.first, b, i) + from, n);
                 } else {
                   residual_loop(y, fy, static_cast<T*>(nullptr), n, out);
                 }
               });
  }

  double total(int64_t b, int64_t which) const {
    double sum = 0;
    for (int64_t part = 0; part < pieces; ++part) sum += sums(b, part)[which];
    return sum;
  }

  // |x - y|, y null for zero, of a row whose squares leave the range of double.
  double careful_norm(const T* x, const T* y) const {
    double largest = 0, sum = 0;
    for (int64_t i = 0; i < p.width; ++i) largest = std::max(largest, fabs(static_cast<double>(y ? x[i] - y[i] : x[i])));
    if (!(largest > 0) || !isfinite(largest)) return largest;
    for (int64_t i = 0; i < p.width; ++i) {
      const double scaled = static_cast<double>(y ? x[i] - y[i] : x[i]) / largest;
      sum += scaled * scaled;
    }
    return largest * sqrt(sum);
  }
  double norm(double square, const T* x, const T* y) const {
    const bool in_range = square > 1e-280 && square < 1e280;
    return in_range || square != square || sizeof(T) == 4 ? sqrt(square) : careful_norm(x, y);
  }

  // What becomes of sample b: its status, its best image and the action that writes its next point.
  void judge(int64_t b) const {
    Sample& s = sample(b);
    const int64_t k = p.evaluations;
    const double eps = std::numeric_limits<T>::epsilon();
    const T *y = row(p.y, b), *fy = image(b);
    const double step = norm(total(b, 0), fy, y), size = norm(total(b, 1), fy, nullptr);
    const double r = step > 0 ? step / size : step;
    const double measure = p.measure == DEQ_MEASURE_ABSOLUTE ? step : r;
    if (k == 1) {
      s.step[0] = s.step[1] = s.best = s.best_residual = INFINITY;
      s.limit = std::max(size, norm(total(b, 2), y, nullptr)) / (eps * eps);
      s.restarted_at = -1;
      s.accelerated = p.method == DEQ_STEP_ANDERSON || p.method == DEQ_STEP_BROYDEN;
    }
    const bool pushed = k > 1 ? pushes(s) : p.method == DEQ_STEP_ANDERSON;
    const int32_t pairs = s.count;  // without this evaluation's
    if (pushed) push(b, s);
    p.iterations[b] = static_cast<int32_t>(k);
    p.norms[2 * b] = step, p.norms[2 * b + 1] = size;

    const bool finite = isfinite(step) && isfinite(size);
    bool converged;
    if (p.measure == DEQ_MEASURE_ERROR) {
      const double q = k > 2 ? std::max(step / s.step[0], s.step[0] / s.step[1]) : INFINITY;
      converged = step == 0 || (q < 1 && r * q <= p.tol * (1 - q));
    } else {
      const bool slow = step > kSlowContraction * s.step[0];
      converged = measure <= p.tol && (measure <= p.leave || slow || k >= p.max_iter);
    }
    converged = converged && finite;
    // The plain method's next point is the image itself: it is copied only once it turns out not to be bettered.
    const bool is_point = !pushed && p.method != DEQ_STEP_BROYDEN && p.damping == 1.0;
    bool keep_point = false;  // y holds the best image and is about to be overwritten
    if (converged || (finite && measure < s.best)) {
      s.best = measure, s.best_residual = r, s.best_at = k;
      p.residual[b] = r;
      s.place = pushed ? kSlot : is_point ? kPoint : kSaved;
      s.slot = s.head;
      if (converged || s.place == kSaved) {
        memcpy(row(p.z, b), fy, p.width * sizeof(T));
        s.place = kSaved;
      }
    } else if (k == 1) {  // nothing to compare with: the start itself
      memcpy(row(p.z, b), y, p.width * sizeof(T));
      p.residual[b] = INFINITY;
    } else if (s.place == kPoint) {
      keep_point = true;
    }

    const int64_t patience = s.best_residual <= kFloorEps * eps ? kPatienceAtFloor : kPatience;
    const bool stalled = k - s.best_at >= patience;
    bool lost = !finite || size > s.limit;
    const bool astray = lost || measure > kSafeguard * s.best;
    const bool back = pairs > 1 && astray && s.restarted_at < s.best_at && !stalled;
    lost = lost && !back;
    uint8_t status = k >= p.max_iter ? uint8_t{DEQ_MAX_ITER} : DEQ_RUNNING;
    if (stalled) status = size > kGrown * eps * eps * s.limit ? DEQ_DIVERGED : DEQ_STALLED;
    if (lost) status = finite ? DEQ_DIVERGED : DEQ_NONFINITE;
    // One that was within the tolerance on its way and came no nearer: what f rounds off may be more than that.
    const bool met = status != DEQ_RUNNING && p.measure != DEQ_MEASURE_ERROR && s.best <= p.tol;
    if (met) p.iterations[b] = static_cast<int32_t>(s.best_at);
    if (converged || met) status = DEQ_CONVERGED;
    p.status[b] = status;

    if (keep_point) {
      memcpy(row(p.z, b), y, p.width * sizeof(T));
      s.place = kSaved;
    }
    s.action = kPlain;
    if (status != DEQ_RUNNING) {
      // f is not asked for what it cannot give: a point without a finite image is left for the best one. The best image of
      // the plain method must reach y or z.
      s.action = finite ? (s.place == kPoint ? kPlain : kNothing) : kReturn;
    } else if (back) {
      s.restarted_at = k;
      s.count = 0;
      s.action = kReturn;
    } else if (pushed && weigh(s, size)) {
      s.action = kMix;
      if (is_known_to_converge(s, size)) {
        p.residual[b] = s.mixed / size;
        p.status[b] = DEQ_CONVERGED;
        s.place = kPoint;
      }
    } else if (p.method == DEQ_STEP_BROYDEN) {
      broyden(b, s);
    }
    if (p.method == DEQ_STEP_AUTO && k >= kSlowAfter && std::min(step / s.step[0], s.step[0] / s.step[1]) > kSlowContraction)
      s.accelerated = 1;
    s.step[1] = s.step[0];
    s.step[0] = step;
  }

  void push(int64_t b, Sample& s) const {
    if (s.place == kSlot && s.slot == (s.head + 1) % p.depth) s.place = kSaved;  // measure() saved it
    s.head = (s.head + 1) % p.depth;
    s.count = std::min(s.count + 1, p.depth);
    double* gram = s.gram();
    for (int32_t i = 0; i < s.count; ++i) {
      const int32_t at = (s.head - i + p.depth) % p.depth;
      gram[s.head * p.depth + at] = gram[at * p.depth + s.head] = total(b, 3 + at);
    }
  }

  // Of an affine f the image of the mixed point is the mix of the images, and its residual that of the residuals.
  bool is_known_to_converge(const Sample& s, double size) const {
    if (!p.affine || p.damping != 1.0 || p.measure == DEQ_MEASURE_ERROR) return false;
    return s.mixed <= p.tol * (p.measure == DEQ_MEASURE_ABSOLUTE ? 1.0 : size);
  }

  // Anderson's weights by slot, and a bound on the norm of the mixed residual; false where the plain step is all that can be
  // trusted.
  bool weigh(Sample& s, double size) const {
    double gram[kMaxDepth][kMaxDepth], a[kMaxDepth];
    const auto slot = [&](int32_t i) { return (s.head - i + p.depth) % p.depth; };
    for (int32_t i = 0; i < s.count; ++i)
      for (int32_t j = 0; j < s.count; ++j) gram[i][j] = s.gram()[slot(i) * p.depth + slot(j)];
    const double regulariser = 10 * static_cast<double>(std::numeric_limits<T>::epsilon());
    int32_t n = s.count;
    while (n > 1 && !anderson_weights(gram, n, regulariser, a)) --n;
    if (n < 2) return false;
    for (int32_t i = 0; i < p.depth; ++i) s.a[i] = s.b[i] = 0;
    for (int32_t i = 0; i < n; ++i) {
      s.a[slot(i)] = a[i];
      s.b[slot(i)] = -(1 - p.damping) * a[i];
    }
    double square = 0, rounded = 0, total = 0;  // the sums' and the elements' rounding is what may be missing
    for (int32_t i = 0; i < n; ++i) {
      for (int32_t j = 0; j < n; ++j) square += a[i] * a[j] * gram[i][j];
      rounded += fabs(a[i]) * sqrt(gram[i][i]);
      total += fabs(a[i]);
    }
    s.mixed =
        sqrt(std::max(square, 0.0) + kGramRounding * rounded * rounded) + 4 * std::numeric_limits<T>::epsilon() * total * size;
    return true;
  }

  // The coefficients of the new step in the old ones and in g, and where it goes.
  void broyden(int64_t b, Sample& s) const {
    const int32_t depth = p.depth, n = s.count;
    double* gram = s.gram();
    if (p.evaluations > 1 && n > 0)
      for (int32_t i = 0; i < n; ++i) gram[s.head * depth + i] = gram[i * depth + s.head] = total(b, 3 + depth + i);
    double last = 0;
    bool trusted = true;
    for (int32_t i = 0; i <= DEQ_MAX_STEP_DEPTH; ++i) s.a[i] = 0;
    for (int32_t j = 0; j < n; ++j) {
      double projection = total(b, 3 + j);
      for (int32_t i = 0; i <= j; ++i) projection += gram[j * depth + i] * s.a[i];
      last = projection / gram[j * depth + j];
      trusted = trusted && isfinite(last);
      if (j + 1 < n) s.a[j + 1] = last;
    }
    const double denominator = 1 - last;
    if (n == 0 || n >= depth || !trusted || !(fabs(denominator) > kSmallestPivot)) {
      for (int32_t i = 0; i < depth; ++i) s.a[i] = 0;
      s.a[depth] = p.damping;
      s.head = 0;
      s.count = 1;
    } else {
      for (int32_t i = 0; i < n; ++i) s.a[i] /= denominator;
      s.a[depth] = 1 / denominator;
      s.head = n;
      s.count = n + 1;
    }
    s.action = kBroyden;
  }

  void write() const {
    each_piece([&](int64_t b) { return sample(b).action != kNothing; },
               [&](int64_t b, int64_t part, int64_t from, int64_t n) {
                 Sample& s = sample(b);
                 T* y = row(p.y, b) + from;
                 const T* fy = image(b) + from;
                 switch (s.action) {
                   case kPlain:
                     if (p.damping == 1.0)
                       memcpy(y, fy, n * sizeof(T));
                     else
                       damped_loop(y, fy, static_cast<T>(p.damping), n);
                     break;
                   case kReturn:
                     memcpy(y, (s.place == kSlot ? row(p.first, b, s.slot) : row(p.z, b)) + from, n * sizeof(T));
                     break;
                   case kMix: {
                     bool begun = false;
                     for (int32_t i = 0; i < p.depth; ++i) {
                       if (s.a[i] == 0) continue;
                       const T* x = row(p.first, b, i) + from;
                       if (begun)
                         axpy_loop(y, static_cast<T>(s.a[i]), x, n);
                       else
                         scale_loop(y, static_cast<T>(s.a[i]), x, n);
                       begun = true;
                       if (s.b[i] != 0) axpy_loop(y, static_cast<T>(s.b[i]), row(p.second, b, i) + from, n);
                     }
                     break;
                   }
                   case kBroyden: {
                     T* step = row(p.first, b, s.head) + from;
                     alignas(64) T sum[kPieceBytes / sizeof(T)];
                     const T factor = static_cast<T>(s.a[p.depth]);
                     for (int64_t i = 0; i < n; ++i) sum[i] = factor * (fy[i] - y[i]);
                     for (int32_t i = 0; i + 1 < s.count; ++i)
                       if (s.a[i] != 0) axpy_loop(sum, static_cast<T>(s.a[i]), row(p.first, b, i) + from, n);
                     memcpy(step, sum, n * sizeof(T));
                     for (int32_t i = 0; i < s.count; ++i)
                       sums(b, part)[3 + p.depth + i] = dot_loop(sum, row(p.first, b, i) + from, n);
                     axpy_loop(y, static_cast<T>(1), sum, n);
                     break;
                   }
                   default:
                     break;
                 }
               });
  }

  void begin() const {
    p.failed = 0;
    memset(p.samples, 0, p.batch * deq_cpu_sample_bytes(p.depth));
    memset(p.status, DEQ_RUNNING, p.batch);
    for (int64_t b = 0; b < p.batch; ++b)
      sample(b).head = -1 + p.depth, sample(b).action = kPlain, sample(b).accelerated = p.method == DEQ_STEP_ANDERSON;
  }

  int64_t advance() const {
    if (p.evaluations == 0) begin();
    ++p.evaluations;
    measure();
    int64_t running = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      if (p.status[b] != DEQ_RUNNING) {
        sample(b).action = kNothing;
        continue;
      }
      judge(b);
      running += p.status[b] == DEQ_RUNNING;
      p.failed += p.status[b] != DEQ_RUNNING && p.status[b] != DEQ_CONVERGED;
    }
    write();
    return running;
  }

  void collect() const {
    for (int64_t b = 0; b < p.batch; ++b) {
      Sample& s = sample(b);
      if (s.place == kSaved) continue;
      memcpy(row(p.z, b), s.place == kPoint ? row(p.y, b) : row(p.first, b, s.slot), p.width * sizeof(T));
      if (p.status[b] != DEQ_RUNNING) s.place = kSaved;
    }
  }
};

bool is_valid(const DeqSteps& p) {
  const bool deep = p.method != DEQ_STEP_PLAIN;
  const int32_t deepest = p.method == DEQ_STEP_BROYDEN ? DEQ_MAX_STEP_DEPTH : kMaxDepth;
  return p.batch >= 0 && p.width > 0 && p.method >= DEQ_STEP_PLAIN && p.method <= DEQ_STEP_BROYDEN &&
         p.measure >= DEQ_MEASURE_RESIDUAL && p.measure <= DEQ_MEASURE_ABSOLUTE &&
         (deep ? p.depth >= 1 && p.depth <= deepest : p.depth == 0) && p.max_iter > 0 &&
         (p.type == DEQ_FLOAT32 || p.type == DEQ_FLOAT64);
}

}  // namespace
}  // namespace deq

using namespace deq;

int64_t deq_cpu_sample_bytes(int32_t depth) { return sizeof(Sample) + sizeof(double) * depth * depth; }

int64_t deq_cpu_step_sums(int64_t batch, int64_t width, int32_t depth) {
  const int64_t piece = kPieceBytes / static_cast<int64_t>(sizeof(double));  // the smaller of the two types' pieces
  return batch * ((width + piece - 1) / piece) * (3 + 2 * depth);
}

int64_t deq_cpu_advance(DeqSteps* steps, const void* fy) {
  if (!is_valid(*steps)) return -1;
  steps->fy = fy;
  return steps->type == DEQ_FLOAT64 ? Steps<double>{*steps}.advance() : Steps<float>{*steps}.advance();
}

void deq_cpu_collect(DeqSteps* steps) {
  if (!is_valid(*steps)) return;
  if (steps->type == DEQ_FLOAT64)
    Steps<double>{*steps}.collect();
  else
    Steps<float>{*steps}.collect();
}

double deq_cpu_norm(const void* x, int64_t count, int32_t type) {
  const double* wide = static_cast<const double*>(x);
  const float* narrow = static_cast<const float*>(x);
  return sqrt(type == DEQ_FLOAT64 ? dot_loop(wide, wide, count) : dot_loop(narrow, narrow, count));
}
