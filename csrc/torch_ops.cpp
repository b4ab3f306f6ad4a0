// Registers the CPU kernels with PyTorch's dispatcher; csrc/torch_cuda_ops.cpp registers those of the GPU.
//
// Every operator writes into tensors that its caller allocated, so nothing here allocates and its fake is empty. What the C
// interface trusts (shapes, dtypes, strides) is checked here: a wrong call raises RuntimeError and never crashes.
#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"
#include "structured.h"
#include "torch_tensor.h"

namespace {

using namespace deq_torch;

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
    "int acceleration, int depth, int criterion, float tol, int max_iter, int precision, int reflected, "
    "float largest_weight) -> ()";

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
  p.largest_weight = tolerance({op, "largest_weight"}, stack[14]);
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

// out = factor left right, with `transposed` left^T right; with `adds` added to it.
constexpr const char* kProduct =
    "product_(Tensor left, Tensor right, Tensor(a!) out, float factor, int adds, int transposed) -> ()";

void product(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "product_";
  const Tensor left(op, "left", stack[0]), right(op, "right", stack[1]), out(op, "out", stack[2]);
  const int32_t transposed = integer({op, "transposed"}, stack[5], 0, 1);
  const bool stacked = left.dim() == 3;
  if (!stacked) left.expect_dim(2, "a matrix or a stack of them, (S, rows, columns)");
  right.expect_dim(left.dim(), stacked ? "(S, inner, columns)" : "(inner, columns)");
  const int64_t *size = left.sizes(), *across = right.sizes();
  DeqProduct p{};
  p.count = stacked ? size[0] : 1, p.columns = across[1 + stacked];
  p.rows = size[stacked + transposed], p.inner = size[stacked + 1 - transposed];
  p.type = type_of(left.place(), left.dtype());
  right.expect_shape({p.count, p.inner, p.columns}, stacked);
  out.expect_shape({p.count, p.rows, p.columns}, stacked);
  right.expect_dtype(left.dtype());
  out.expect_dtype(left.dtype());
  out.expect_separate_rows();
  memcpy(&p.factor, &stack[3], sizeof p.factor);
  p.adds = integer({op, "adds"}, stack[4], 0, 1);
  if (out.empty()) return;
  p.left = left.view(), p.right = right.view(), p.out = out.view();
  if (transposed) std::swap(p.left.stride[1], p.left.stride[2]);
  if (p.columns == 1) p.out.stride[2] = 1;
  p.threads = torch_threads();
  if (const int32_t error = deq_cpu_product(&p)) {
    if (error == DEQ_NO_MEMORY) throw std::runtime_error("deq::product_: not enough memory");
    left.place().fail("must be float32 or float64; got " + dtype_name(left.dtype()));
  }
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
  if (const int32_t error = deq_cpu_invert(view.data, std::max(view.stride[1], n), n, type_of(A.place(), A.dtype()))) {
    if (error == DEQ_NO_MEMORY) throw std::runtime_error("deq::invert_: not enough memory");
    A.place().fail("must be float32 or float64; got " + dtype_name(A.dtype()));
  }
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
  const int32_t type = type_of(W.place(), W.dtype());
  if (const int32_t error = deq_cpu_fingerprint(&view, size, type, torch_threads(), out.data<uint64_t>())) {
    if (error == DEQ_NO_MEMORY) throw std::runtime_error("deq::fingerprint: not enough memory");
    W.place().fail("must have contiguous rows or columns");
  }
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
      {"product_", kProduct, product},
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
