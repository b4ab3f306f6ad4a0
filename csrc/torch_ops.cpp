// Registers the compiled kernels with PyTorch's dispatcher; the only file that knows of torch.
//
// Every operator writes into tensors that its caller allocated, so nothing here allocates and its fake is empty. What the C
// interface trusts (shapes, dtypes, strides) is checked here: a wrong call raises RuntimeError and never crashes.
#include <dlfcn.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "structured.h"
#include "torch_abi.h"

namespace {

#define DEQ_FUNCTION(name, arguments) int32_t(*name) arguments = nullptr;
#define DEQ_DTYPE(name) int32_t name = -1;
struct Torch {
  DEQ_TORCH_FUNCTIONS(DEQ_FUNCTION)
  struct Dtypes {
    DEQ_TORCH_DTYPES(DEQ_DTYPE)
  } dtype;
} torch_;
#undef DEQ_FUNCTION
#undef DEQ_DTYPE

// Where a message is about: "deq::solve_: W".
struct Place {
  const char* op;
  const char* argument;
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(std::string("deq::") + op + ": " + argument + " " + what);
  }
};

std::string tuple(const int64_t* values, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

std::string dtype_name(int32_t dtype) {
#define DEQ_NAME(name) \
  if (dtype == torch_.dtype.name) return #name;
  DEQ_TORCH_DTYPES(DEQ_NAME)
#undef DEQ_NAME
  return "torch's dtype number " + std::to_string(dtype);
}

// A tensor argument taken off the boxed stack; owns its handle. The constructor does not throw, so that a kernel which has
// taken all its arguments frees all of them whichever check fails; a tensor that cannot be read fits no shape.
class Tensor {
 public:
  Tensor(const char* op, const char* name, StableIValue boxed) noexcept : place_{op, name} {
    memcpy(&handle_, &boxed, sizeof handle_);
    if (torch_.aoti_torch_get_sizes(handle_, &sizes_) || torch_.aoti_torch_get_strides(handle_, &strides_) ||
        torch_.aoti_torch_get_dtype(handle_, &dtype_) || torch_.aoti_torch_get_dim(handle_, &dim_))
      dim_ = -1;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { torch_.aoti_torch_delete_tensor_object(handle_); }

  const Place& place() const { return place_; }
  int64_t dim() const { return dim_; }
  int32_t dtype() const { return dtype_; }
  const int64_t* sizes() const { return sizes_; }
  template <class T>
  T* data() const {
    void* data = nullptr;
    if (torch_.aoti_torch_get_data_ptr(handle_, &data)) place_.fail("has no memory to read");
    return static_cast<T*>(data);
  }
  bool empty() const {
    for (int64_t i = 0; i < dim_; ++i)
      if (sizes_[i] == 0) return true;
    return false;
  }
  // As (S, rows, m), where a tensor of two dimensions is the S = 1 without its dimension.
  DeqView view() const {
    const int64_t* stride = strides_;
    return dim_ == 2 ? DeqView{data<void>(), {0, stride[0], stride[1]}}
                     : DeqView{data<void>(), {stride[0], stride[1], stride[2]}};
  }

  void expect_dim(int64_t expected, const char* meaning) const {
    if (dim_ != expected) place_.fail(std::string("must be ") + meaning + "; got shape " + tuple(sizes_, dim_));
  }
  void expect_dtype(int32_t expected) const {
    if (dtype_ != expected) place_.fail("must be " + dtype_name(expected) + "; got " + dtype_name(dtype_));
  }
  // `shape` with its leading S, or for a problem with one unstacked W without it.
  template <size_t N>
  void expect_shape(const int64_t (&shape)[N], bool stacked = true) const {
    const int64_t *expected = shape + !stacked, count = static_cast<int64_t>(N) - !stacked;
    if (dim_ != count || memcmp(sizes_, expected, count * sizeof *expected) != 0)
      place_.fail("must have shape " + tuple(expected, count) + "; got " + tuple(sizes_, dim_));
  }
  void expect_contiguous() const {
    if (empty()) return;
    int64_t stride = 1;
    for (int64_t i = dim_ - 1; i >= 0; --i) {
      if (sizes_[i] > 1 && strides_[i] != stride) place_.fail("must be contiguous; got strides " + tuple(strides_, dim_));
      stride *= sizes_[i];
    }
  }
  // An output (S, B, m): elements of a row side by side, rows apart.
  void expect_separate_rows() const {
    if (empty()) return;
    const int64_t drop = dim_ == 2, size[] = {drop ? 1 : sizes_[0], sizes_[1 - drop], sizes_[2 - drop]};
    const DeqView rows = view();
    const int64_t* stride = rows.stride;
    const bool side_by_side = size[2] == 1 || stride[2] == 1;
    const bool b_inside =
        (size[1] == 1 || stride[1] >= size[2]) && (size[0] == 1 || stride[0] >= (size[1] - 1) * stride[1] + size[2]);
    const bool s_inside =
        (size[0] == 1 || stride[0] >= size[2]) && (size[1] == 1 || stride[1] >= (size[0] - 1) * stride[0] + size[2]);
    if (!side_by_side || !(b_inside || s_inside))
      place_.fail("must have contiguous rows that do not overlap; got strides " + tuple(strides_, dim_));
  }

 private:
  Place place_;
  AtenTensorHandle handle_;
  int64_t dim_ = -1;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;  // borrowed from the tensor
  int32_t dtype_ = -1;
};

int32_t integer(const Place& place, StableIValue boxed, int64_t low, int64_t high) {
  const auto value = static_cast<int64_t>(boxed);
  if (value < low || value > high)
    place.fail("must lie in " + std::to_string(low) + ".." + std::to_string(high) + "; got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

double tolerance(const Place& place, StableIValue boxed) {
  double value;
  memcpy(&value, &boxed, sizeof value);
  if (!(value >= 0)) place.fail("must not be negative or NaN; got " + std::to_string(value));
  return value;
}

DeqType type_of(const Place& place, int32_t dtype) {
  if (dtype == torch_.dtype.float32) return DEQ_FLOAT32;
  if (dtype == torch_.dtype.float64) return DEQ_FLOAT64;
  if (dtype == torch_.dtype.bfloat16) return DEQ_BFLOAT16;
  if (dtype == torch_.dtype.float16) return DEQ_FLOAT16;
  place.fail("must be float32, float64, bfloat16 or float16; got " + dtype_name(dtype));
}

int32_t torch_threads() {
  uint32_t threads = 1;
  if (torch_.torch_get_num_threads(&threads)) throw std::runtime_error("deq: torch_get_num_threads failed");
  return static_cast<int32_t>(threads);
}

// The sizes S, B, m and the type of a problem, from W (S, m, m) and the injection (S, B, m), or (m, m) and (B, m).
DeqProblem problem_of(const Tensor& W, const Tensor& injection) {
  DeqProblem p{};
  const bool stacked = W.dim() == 3;
  if (!stacked) W.expect_dim(2, "(m, m) or (S, m, m)");
  injection.expect_dim(W.dim(), stacked ? "(S, B, m)" : "(B, m)");
  const int64_t* size = injection.sizes();
  p.weights = stacked ? size[0] : 1, p.batch = size[stacked], p.width = size[1 + stacked];
  p.type = type_of(injection.place(), injection.dtype());
  W.expect_shape({p.weights, p.width, p.width}, stacked);
  W.expect_dtype(injection.dtype());
  p.W = W.view();
  p.injection = injection.view();
  p.threads = torch_threads();
  return p;
}

// One more tensor of the injection's shape.
DeqView batch_of(const DeqProblem& p, const Tensor& W, const Tensor& tensor) {
  tensor.expect_shape({p.weights, p.batch, p.width}, W.dim() == 3);
  tensor.expect_dtype(W.dtype());
  return tensor.view();
}

// A starting point; without elements it stands for zero.
DeqView start_of(const DeqProblem& p, const Tensor& W, const Tensor& start) {
  start.expect_dim(W.dim(), "of the injection's shape, or of its dimensions without elements to start at zero");
  return start.empty() ? DeqView{} : batch_of(p, W, start);
}

DeqView output_of(const DeqProblem& p, const Tensor& W, const Tensor& tensor) {
  const DeqView view = batch_of(p, W, tensor);
  tensor.expect_separate_rows();
  return view;
}

// Where a call reports, and the pieces of the buffer that says what every sample did, laid out as deq/stats.py tells.
void set_outcome(DeqProblem& p, const Tensor& stats, const Tensor& report) {
  const int64_t n = p.weights * p.batch, residual = p.type == DEQ_FLOAT64 ? sizeof(double) : sizeof(float);
  stats.expect_shape({n * static_cast<int64_t>(residual + sizeof(int32_t) + sizeof(uint8_t))});
  stats.expect_dtype(torch_.dtype.uint8);
  stats.expect_contiguous();
  report.expect_shape({static_cast<int64_t>(sizeof(DeqReport) / sizeof(int64_t))});
  report.expect_dtype(torch_.dtype.int64);
  report.expect_contiguous();
  char* at = stats.data<char>();
  if (reinterpret_cast<uintptr_t>(at) % residual)
    stats.place().fail("must begin at a multiple of " + std::to_string(residual) + " bytes");
  p.residual = at;
  p.iterations = reinterpret_cast<int32_t*>(at + n * residual);
  p.status = reinterpret_cast<uint8_t*>(at + n * (residual + sizeof(int32_t)));
  p.report = report.data<DeqReport>();
}

// How the iteration is run; `options` are the last seven arguments.
void set_options(DeqProblem& p, const char* op, const StableIValue* options) {
  p.acceleration = integer({op, "acceleration"}, options[0], DEQ_PLAIN, DEQ_ON_DEMAND);
  p.depth = integer({op, "depth"}, options[1], 0, INT32_MAX);
  p.criterion = integer({op, "criterion"}, options[2], DEQ_RESIDUAL, DEQ_ERROR_ESTIMATE);
  p.tol = tolerance({op, "tol"}, options[3]);
  p.max_iter = integer({op, "max_iter"}, options[4], 1, INT32_MAX);
  p.precision = integer({op, "precision"}, options[5], DEQ_NATIVE, DEQ_BFLOAT16_INCREMENTS);
  p.reflected = integer({op, "reflected"}, options[6], 0, 1);
}

void run(const char* op, int32_t (*kernel)(const DeqProblem*), const DeqProblem& p) {
  switch (const int32_t error = kernel(&p)) {
    case DEQ_OK:
      return;
    case DEQ_BAD_ARGUMENT:
      throw std::runtime_error(std::string("deq::") + op + ": an argument is out of range (activation " +
                               std::to_string(p.activation) + ", depth " + std::to_string(p.depth) + ", width " +
                               std::to_string(p.width) + ")");
    case DEQ_NO_MEMORY:
      throw std::runtime_error(std::string("deq::") + op + ": not enough memory");
    default:
      throw std::runtime_error(std::string("deq::") + op + ": failed with code " + std::to_string(error));
  }
}

constexpr const char* kSolve =
    "solve_(Tensor W, Tensor c, Tensor z0, Tensor(a!) z, Tensor(b!) stats, Tensor(c!) report, int activation, "
    "int acceleration, int depth, int criterion, float tol, int max_iter, int precision, int reflected) -> ()";

void solve(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "solve_";
  const Tensor W(op, "W", stack[0]), c(op, "c", stack[1]), z0(op, "z0", stack[2]), z(op, "z", stack[3]);
  const Tensor stats(op, "stats", stack[4]), report(op, "report", stack[5]);
  DeqProblem p = problem_of(W, c);
  p.start = start_of(p, W, z0);
  p.out = output_of(p, W, z);
  set_outcome(p, stats, report);
  p.activation = integer({op, "activation"}, stack[6], 0, INT32_MAX);
  set_options(p, op, stack + 7);
  run(op, deq_cpu_solve, p);
}

constexpr const char* kMaskedLinear =
    "masked_linear_(Tensor A, Tensor g, Tensor d, Tensor u0, Tensor(a!) u, Tensor(b!) stats, Tensor(c!) report, int value_of, "
    "int acceleration, int depth, int criterion, float tol, int max_iter, int precision, int reflected) -> ()";

void masked_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "masked_linear_";
  const Tensor A(op, "A", stack[0]), g(op, "g", stack[1]), d(op, "d", stack[2]), u0(op, "u0", stack[3]);
  const Tensor u(op, "u", stack[4]), stats(op, "stats", stack[5]), report(op, "report", stack[6]);
  DeqProblem p = problem_of(A, g);
  p.mask = batch_of(p, A, d);
  p.start = start_of(p, A, u0);
  p.out = output_of(p, A, u);
  set_outcome(p, stats, report);
  const int32_t value_of = integer({op, "value_of"}, stack[7], -1, INT32_MAX);
  p.mask_is_value = value_of >= 0;
  p.activation = value_of >= 0 ? value_of : 0;
  set_options(p, op, stack + 8);
  run(op, deq_cpu_solve, p);
}

constexpr const char* kDerivative = "derivative_(Tensor W, Tensor c, Tensor z, Tensor(a!) d, int activation) -> ()";

void derivative(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "derivative_";
  const Tensor W(op, "W", stack[0]), c(op, "c", stack[1]), z(op, "z", stack[2]), d(op, "d", stack[3]);
  DeqProblem p = problem_of(W, c);
  p.start = batch_of(p, W, z);
  p.out = output_of(p, W, d);
  p.activation = integer({op, "activation"}, stack[4], 0, INT32_MAX);
  run(op, deq_cpu_derivative, p);
}

constexpr const char* kOuter = "outer_(Tensor left, Tensor right, Tensor(a!) out) -> ()";

void outer(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "outer_";
  const Tensor left(op, "left", stack[0]), right(op, "right", stack[1]), out(op, "out", stack[2]);
  const bool stacked = left.dim() == 3;
  if (!stacked) left.expect_dim(2, "(B, m) or (S, B, m)");
  const int64_t* size = left.sizes();
  DeqOuter p{};
  p.weights = stacked ? size[0] : 1, p.batch = size[stacked], p.width = size[1 + stacked];
  p.type = type_of(left.place(), left.dtype());
  right.expect_shape({p.weights, p.batch, p.width}, stacked);
  out.expect_shape({p.weights, p.width, p.width}, stacked);
  right.expect_dtype(left.dtype());
  out.expect_dtype(left.dtype());
  out.expect_contiguous();
  if (out.empty()) return;
  p.left = left.view(), p.right = right.view();
  p.out = out.data<void>();
  p.threads = torch_threads();
  for (DeqView* rows : {&p.left, &p.right})
    if (p.width == 1 || p.batch == 0) rows->stride[2] = 1;
  if (p.left.stride[2] != 1) left.place().fail("must have contiguous rows");
  if (p.right.stride[2] != 1) right.place().fail("must have contiguous rows");
  if (deq_cpu_outer(&p)) left.place().fail("must be float32 or float64; got " + dtype_name(left.dtype()));
}

constexpr const char* kInvert = "invert_(Tensor(a!) A) -> ()";

void invert(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor A("invert_", "A", stack[0]);
  A.expect_dim(2, "(n, n)");
  const int64_t n = A.sizes()[0];
  A.expect_shape({n, n});
  if (n == 0) return;
  const DeqView view = A.view();
  if (n > 1 && (view.stride[2] != 1 || view.stride[1] < n)) A.place().fail("must have contiguous rows that do not overlap");
  if (deq_cpu_invert(view.data, std::max(view.stride[1], n), n, type_of(A.place(), A.dtype())))
    A.place().fail("must be float32 or float64; got " + dtype_name(A.dtype()));
}

constexpr const char* kFingerprint = "fingerprint(Tensor W, Tensor(a!) out) -> ()";

void fingerprint(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "fingerprint";
  const Tensor W(op, "W", stack[0]), out(op, "out", stack[1]);
  if (W.dim() != 3) W.expect_dim(2, "(rows, columns) or (S, rows, columns)");
  out.expect_shape({2});
  out.expect_dtype(torch_.dtype.int64);
  out.expect_contiguous();
  const int64_t *shape = W.sizes(), stacked = W.dim() == 3;
  const int64_t size[3] = {stacked ? shape[0] : 1, shape[stacked], shape[1 + stacked]};
  const DeqView view = W.view();
  if (deq_cpu_fingerprint(&view, size, type_of(W.place(), W.dtype()), torch_threads(), out.data<uint64_t>()))
    W.place().fail("must have contiguous rows or columns");
}

constexpr const char* kPackTriangle =
    "pack_triangle_(Tensor W, Tensor(a!) packed, Tensor(b!) diagonal, int strict, int reversed) -> ()";

void pack_triangle(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "pack_triangle_";
  const Tensor W(op, "W", stack[0]), packed(op, "packed", stack[1]), diagonal(op, "diagonal", stack[2]);
  W.expect_dim(2, "(m, m)");
  const int64_t m = W.sizes()[0];
  W.expect_shape({m, m});
  if (m == 0) W.place().fail("must not be empty");
  packed.expect_shape({deq_cpu_triangle_elements(m)});
  diagonal.expect_shape({m});
  for (const Tensor* out : {&packed, &diagonal}) {
    out->expect_dtype(W.dtype());
    out->expect_contiguous();
  }
  const DeqView view = W.view();
  if (deq_cpu_pack_triangle(&view, m, type_of(W.place(), W.dtype()), integer({op, "strict"}, stack[3], 0, 1),
                            integer({op, "reversed"}, stack[4], 0, 1), torch_threads(), packed.data<void>(),
                            diagonal.data<void>()))
    W.place().fail("must be float32 or float64; got " + dtype_name(W.dtype()));
}

// A (B, width) tensor of the dtype of c with contiguous rows.
DeqView rows_of(const Tensor& tensor, const Tensor& c, int64_t batch, int64_t width) {
  tensor.expect_shape({batch, width});
  tensor.expect_dtype(c.dtype());
  const DeqView view = tensor.view();
  if (width > 1 && batch > 0 && view.stride[2] != 1) tensor.place().fail("must have contiguous rows");
  return view;
}

constexpr const char* kSubstitute =
    "substitute_(Tensor packed, Tensor diagonal, Tensor c, Tensor mask, Tensor(a!) z, Tensor(b!) derivative, "
    "Tensor(c!) residual, int activation, int reversed) -> ()";

void substitute(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "substitute_";
  const Tensor packed(op, "packed", stack[0]), diagonal(op, "diagonal", stack[1]), c(op, "c", stack[2]);
  const Tensor mask(op, "mask", stack[3]), z(op, "z", stack[4]), derivative(op, "derivative", stack[5]);
  const Tensor residual(op, "residual", stack[6]);
  DeqSubstitution p{};
  c.expect_dim(2, "(B, m)");
  p.batch = c.sizes()[0], p.width = c.sizes()[1];
  p.type = type_of(c.place(), c.dtype());
  p.threads = torch_threads();
  diagonal.expect_shape({p.width});
  residual.expect_shape({p.batch});
  if (!packed.empty()) {
    packed.expect_shape({deq_cpu_triangle_elements(p.width)});
    p.packed = packed.data<void>();
  }
  for (const Tensor* flat : {&packed, &diagonal, &residual}) {
    flat->expect_dtype(c.dtype());
    flat->expect_contiguous();
  }
  const auto rows = [&](const Tensor& tensor) { return rows_of(tensor, c, p.batch, p.width); };
  p.injection = rows(c);
  if (z.dim() == 2) z.expect_separate_rows();
  p.out = rows(z);
  if (mask.dim() != 1) p.mask = rows(mask);
  if (derivative.dim() != 1) {
    p.derivative = rows(derivative);
    derivative.expect_separate_rows();
  }
  p.diagonal = diagonal.data<void>();
  p.residual = residual.data<void>();
  p.activation = integer({op, "activation"}, stack[7], -1, INT32_MAX);
  p.reversed = integer({op, "reversed"}, stack[8], 0, 1);
  if (p.batch == 0) return;
  switch (deq_cpu_substitute(&p)) {
    case DEQ_OK:
      return;
    case DEQ_NO_MEMORY:
      throw std::runtime_error("deq::substitute_: not enough memory");
    default:
      throw std::runtime_error("deq::substitute_: an argument is out of range (activation " + std::to_string(p.activation) +
                               ", width " + std::to_string(p.width) + "), or the diagonal admits more than one solution");
  }
}

constexpr const char* kReduced =
    "reduced_(Tensor P, Tensor Q, Tensor diagonal, Tensor c, Tensor mask, Tensor q, Tensor(a!) following, Tensor(b!) size, "
    "Tensor(c!) z, int activation) -> ()";

// The problem that both operators share.
DeqReduced reduced_problem(const Tensor& P, const Tensor& Q, const Tensor& diagonal, const Tensor& c, const Tensor& mask,
                           const Tensor& q, const Tensor& following, const Tensor& size) {
  DeqReduced p{};
  c.expect_dim(2, "(B, m)");
  q.expect_dim(2, "(B, r)");
  p.batch = c.sizes()[0], p.width = c.sizes()[1], p.rank = q.sizes()[1];
  p.type = type_of(c.place(), c.dtype());
  p.threads = torch_threads();
  P.expect_shape({(p.width + 7) / 8, p.rank, 8});
  Q.expect_shape({(p.width + 7) / 8, p.rank, 8});
  diagonal.expect_shape({p.width});
  size.expect_shape({p.batch});
  for (const Tensor* flat : {&P, &Q, &diagonal, &size}) {
    flat->expect_dtype(c.dtype());
    flat->expect_contiguous();
  }
  p.injection = rows_of(c, c, p.batch, p.width);
  if (mask.dim() != 1) p.mask = rows_of(mask, c, p.batch, p.width);
  p.q = rows_of(q, c, p.batch, p.rank);
  p.following = rows_of(following, c, p.batch, p.rank);
  following.expect_separate_rows();
  p.P = P.data<void>(), p.Q = Q.data<void>(), p.diagonal = diagonal.data<void>(), p.size = size.data<void>();
  return p;
}

void check_reduced(const char* op, const DeqReduced& p, int32_t error) {
  if (error)
    throw std::runtime_error(std::string("deq::") + op + ": an argument is out of range (activation " +
                             std::to_string(p.activation) + ", rank " + std::to_string(p.rank) +
                             "), the diagonal admits more than one solution, or no memory is left");
}

void reduced(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "reduced_";
  const Tensor P(op, "P", stack[0]), Q(op, "Q", stack[1]), diagonal(op, "diagonal", stack[2]), c(op, "c", stack[3]);
  const Tensor mask(op, "mask", stack[4]), q(op, "q", stack[5]), following(op, "following", stack[6]), size(op, "size", stack[7]);
  const Tensor z(op, "z", stack[8]);
  DeqReduced p = reduced_problem(P, Q, diagonal, c, mask, q, following, size);
  if (z.dim() != 1) {
    p.out = rows_of(z, c, p.batch, p.width);
    z.expect_separate_rows();
  }
  p.activation = integer({op, "activation"}, stack[9], 0, INT32_MAX);
  if (p.batch > 0) check_reduced(op, p, deq_cpu_reduced(&p));
}

constexpr const char* kReducedIterate =
    "reduced_iterate_(Tensor P, Tensor Q, Tensor diagonal, Tensor c, Tensor mask, Tensor gram, Tensor(a!) q, "
    "Tensor(b!) following, Tensor(c!) residual, Tensor(d!) iterations, int activation, float tol, float leave, float slow, "
    "int max_iter) -> ()";

void reduced_iterate(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "reduced_iterate_";
  const Tensor P(op, "P", stack[0]), Q(op, "Q", stack[1]), diagonal(op, "diagonal", stack[2]), c(op, "c", stack[3]);
  const Tensor mask(op, "mask", stack[4]), gram(op, "gram", stack[5]), q(op, "q", stack[6]), following(op, "following", stack[7]);
  const Tensor residual(op, "residual", stack[8]), iterations(op, "iterations", stack[9]);
  DeqReducedIteration it{};
  it.problem = reduced_problem(P, Q, diagonal, c, mask, q, following, residual);
  q.expect_separate_rows();
  gram.expect_shape({it.problem.rank, it.problem.rank});
  gram.expect_dtype(torch_.dtype.float64);
  gram.expect_contiguous();
  iterations.expect_shape({it.problem.batch});
  iterations.expect_dtype(torch_.dtype.int32);
  iterations.expect_contiguous();
  it.gram = gram.data<double>();
  it.iterations = iterations.data<int32_t>();
  it.problem.activation = integer({op, "activation"}, stack[10], 0, INT32_MAX);
  it.tol = tolerance({op, "tol"}, stack[11]);
  it.leave = tolerance({op, "leave"}, stack[12]);
  it.slow = tolerance({op, "slow"}, stack[13]);
  it.max_iter = integer({op, "max_iter"}, stack[14], 1, INT32_MAX);
  if (it.problem.batch > 0) check_reduced(op, it.problem, deq_cpu_reduced_iterate(&it));
}

void* torch_symbol(const char* name) {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? dlsym(library, name) : nullptr;
}

}  // namespace

// Version of the package that this library was built for.
DEQ_API const char* deq_version(void) { return DEQ_VERSION; }

// Registers the operators; call once, after `import torch`. Returns null, or what went wrong.
DEQ_API const char* deq_register(void) {
#define DEQ_LOAD(name, arguments)                                             \
  torch_.name = reinterpret_cast<decltype(torch_.name)>(torch_symbol(#name)); \
  if (!torch_.name) return "torch has no " #name;
  DEQ_TORCH_FUNCTIONS(DEQ_LOAD)
#undef DEQ_LOAD
#define DEQ_LOAD(name)                                             \
  if (void* number = torch_symbol("aoti_torch_dtype_" #name))      \
    torch_.dtype.name = reinterpret_cast<int32_t (*)()>(number)(); \
  else                                                             \
    return "torch has no aoti_torch_dtype_" #name;
  DEQ_TORCH_DTYPES(DEQ_LOAD)
#undef DEQ_LOAD

  TorchLibraryHandle schemas = nullptr, cpu = nullptr;  // kept for the life of the process: deleting them unregisters
  if (torch_.aoti_torch_library_init_fragment("deq", __FILE__, __LINE__, &schemas) ||
      torch_.aoti_torch_library_init_impl("deq", "CPU", __FILE__, __LINE__, &cpu))
    return "torch refused the operator namespace deq";
  const struct {
    const char *name, *schema;
    BoxedKernel kernel;
  } operators[] = {
      {"solve_", kSolve, solve},
      {"masked_linear_", kMaskedLinear, masked_linear},
      {"derivative_", kDerivative, derivative},
      {"outer_", kOuter, outer},
      {"invert_", kInvert, invert},
      {"fingerprint", kFingerprint, fingerprint},
      {"pack_triangle_", kPackTriangle, pack_triangle},
      {"substitute_", kSubstitute, substitute},
      {"reduced_", kReduced, reduced},
      {"reduced_iterate_", kReducedIterate, reduced_iterate},
  };
  for (const auto& op : operators)
    if (torch_.aoti_torch_library_def(schemas, op.schema) || torch_.aoti_torch_library_impl(cpu, op.name, op.kernel))
      return "torch refused an operator's schema or kernel";
  return nullptr;
}
