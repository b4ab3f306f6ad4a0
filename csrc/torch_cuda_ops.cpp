// Registers the CUDA kernels with PyTorch's dispatcher. Loads and registers without a GPU and without torch's CUDA half, of which
// it needs the current stream when an operator runs.
#include <dlfcn.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cuda_kernels.h"
#include "torch_tensor.h"

namespace {

using namespace deq_torch;

void* current_stream(const Tensor& tensor) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  if (!function || function(tensor.device(), &stream)) tensor.place().fail("lies on a device whose stream torch does not tell");
  return stream;
}

// Bytes of memory that a plan asks for.
int64_t scratch_bytes(const char* op, StableIValue boxed) {
  const auto bytes = static_cast<int64_t>(boxed);
  if (bytes < 0) Place{op, "scratch"}.fail("must not be negative; got " + std::to_string(bytes));
  return bytes;
}

[[noreturn]] void fail(const char* op) { throw std::runtime_error(std::string("deq::") + op + ": " + deq_cuda_why()); }

// Runs the problem as the plan's numbers say, which follow the options: with as many blocks as the last but one says, if any,
// Newton's method goes on with the samples that are left, and the last one is what memory both need. Tensors must share a device.
void run(const char* op, DeqProblem& p, const Tensor& W, const Tensor& out, const StableIValue* options) {
  set_options(p, op, options);
  const int32_t regime = integer({op, "regime"}, options[7], DEQ_BLOCK, DEQ_GRID);
  const int32_t kernel = integer({op, "kernel"}, options[8], 0, INT32_MAX);
  const int32_t blocks = integer({op, "blocks"}, options[9], 1, INT32_MAX);
  const int32_t rescuers = integer({op, "rescuers"}, options[10], 0, INT32_MAX);
  const int64_t bytes = scratch_bytes(op, options[11]);
  void* stream = current_stream(out);
  const Memory scratch(out, bytes);
  std::optional<Memory> packed;
  if (p.type == DEQ_FLOAT32 && p.W.stride[2] != 1 && p.width > 1) {
    packed.emplace(out, p.weights * p.width * p.width * static_cast<int64_t>(sizeof(float)));
    if (deq_cuda_pack(&p.W, p.weights, p.width, static_cast<float*>(packed->data()), W.device(), stream)) fail(op);
    p.W = {packed->data(), {p.width * p.width, p.width, 1}};
  }
  if (deq_cuda_solve(&p, regime, kernel, blocks, scratch.data(), bytes, out.device(), stream)) fail(op);
  if (rescuers && deq_cuda_rescue(&p, rescuers, scratch.data(), bytes, out.device(), stream)) fail(op);
}

constexpr const char* kSolve =
    "cuda_solve_(Tensor W, Tensor c, Tensor z0, Tensor(a!) z, Tensor(b!) said, int activation, int acceleration, int depth, "
    "int criterion, float tol, int max_iter, int precision, int reflected, int regime, int kernel, int blocks, int rescuers, "
    "int scratch) -> ()";

void solve(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_solve_";
  const Tensor W(op, "W", stack[0]), c(op, "c", stack[1]), z0(op, "z0", stack[2]), z(op, "z", stack[3]),
      said(op, "said", stack[4]);
  DeqProblem p = problem_of(W, c);
  p.start = start_of(p, W, z0);
  p.out = output_of(p, W, z);
  set_outcome(p, said);
  p.activation = integer({op, "activation"}, stack[5], 0, INT32_MAX);
  run(op, p, W, z, stack + 6);
}

constexpr const char* kMaskedLinear =
    "cuda_masked_linear_(Tensor A, Tensor g, Tensor d, Tensor u0, Tensor(a!) u, Tensor(b!) said, int value_of, int acceleration, "
    "int depth, int criterion, float tol, int max_iter, int precision, int reflected, int regime, int kernel, int blocks, "
    "int rescuers, int scratch) -> ()";

void masked_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_masked_linear_";
  const Tensor A(op, "A", stack[0]), g(op, "g", stack[1]), d(op, "d", stack[2]), u0(op, "u0", stack[3]), u(op, "u", stack[4]);
  const Tensor said(op, "said", stack[5]);
  DeqProblem p = problem_of(A, g);
  p.mask = batch_of(p, A, d);
  p.start = start_of(p, A, u0);
  p.out = output_of(p, A, u);
  set_outcome(p, said);
  const int32_t value_of = integer({op, "value_of"}, stack[6], -1, INT32_MAX);
  p.mask_is_value = value_of >= 0;
  p.activation = value_of >= 0 ? value_of : 0;
  run(op, p, A, u, stack + 7);
}

constexpr const char* kRescue =
    "cuda_rescue_(Tensor W, Tensor c, Tensor mask, Tensor(a!) z, Tensor(b!) stats, Tensor(c!) report, int activation, "
    "int mask_is_value, float tol, int max_iter, int blocks, int scratch) -> ()";

void rescue(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_rescue_";
  const Tensor W(op, "W", stack[0]), c(op, "c", stack[1]), mask(op, "mask", stack[2]), z(op, "z", stack[3]);
  const Tensor stats(op, "stats", stack[4]), report(op, "report", stack[5]);
  DeqProblem p = problem_of(W, c);
  p.mask = start_of(p, W, mask);  // without elements: no adjoint
  p.out = output_of(p, W, z);
  set_outcome(p, stats, report);
  p.activation = integer({op, "activation"}, stack[6], 0, INT32_MAX);
  p.mask_is_value = integer({op, "mask_is_value"}, stack[7], 0, 1);
  p.tol = tolerance({op, "tol"}, stack[8]);
  p.max_iter = integer({op, "max_iter"}, stack[9], 1, INT32_MAX);
  const int32_t blocks = integer({op, "blocks"}, stack[10], 1, INT32_MAX);
  const int64_t bytes = scratch_bytes(op, stack[11]);
  void* stream = current_stream(z);
  const Memory scratch(z, bytes);
  if (deq_cuda_rescue(&p, blocks, scratch.data(), bytes, z.device(), stream)) fail(op);
}

constexpr const char* kSubstitute =
    "cuda_substitute_(Tensor W, Tensor c, Tensor mask, Tensor(a!) z, Tensor(b!) residual, int activation, int strict, "
    "int upper) -> ()";

void substitute(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_substitute_";
  const Tensor W(op, "W", stack[0]), c(op, "c", stack[1]), mask(op, "mask", stack[2]), z(op, "z", stack[3]);
  const Tensor residual(op, "residual", stack[4]);
  W.expect_dim(2, "(m, m)");
  const DeqProblem p = problem_of(W, c);
  c.expect_dtype(torch_.dtype.float32);
  DeqCudaSubstitution s{};
  s.batch = p.batch, s.width = p.width, s.W = p.W, s.injection = p.injection;
  s.mask = start_of(p, W, mask);  // without elements: a solve
  s.out = output_of(p, W, z);
  residual.expect_shape({p.batch});
  residual.expect_dtype(torch_.dtype.float32);
  residual.expect_contiguous();
  s.residual = residual.data<float>();
  s.activation = integer({op, "activation"}, stack[5], 0, INT32_MAX);
  s.strict = integer({op, "strict"}, stack[6], 0, 1);
  s.upper = integer({op, "upper"}, stack[7], 0, 1);
  void* stream = current_stream(z);
  const int64_t bytes = deq_cuda_substitute_bytes(p.batch, p.width);
  const Memory scratch(z, bytes);
  if (deq_cuda_substitute(&s, scratch.data(), bytes, z.device(), stream)) fail(op);
}

}  // namespace

// Registers the operators; call once, after deq_register. Returns null, or what went wrong.
DEQ_API const char* deq_register_cuda(void) {
  TorchLibraryHandle schemas = nullptr, cuda = nullptr;  // kept for the life of the process: deleting them unregisters
  if (torch_.aoti_torch_library_init_fragment("deq", __FILE__, __LINE__, &schemas) ||
      torch_.aoti_torch_library_init_impl("deq", "CUDA", __FILE__, __LINE__, &cuda))
    return "torch refused the operator namespace deq";
  const struct {
    const char *name, *schema;
    BoxedKernel kernel;
  } operators[] = {{"cuda_solve_", kSolve, solve},
                   {"cuda_masked_linear_", kMaskedLinear, masked_linear},
                   {"cuda_rescue_", kRescue, rescue},
                   {"cuda_substitute_", kSubstitute, substitute}};
  for (const auto& op : operators)
    if (torch_.aoti_torch_library_def(schemas, op.schema) || torch_.aoti_torch_library_impl(cuda, op.name, op.kernel))
      return "torch refused an operator's schema or kernel";
  return nullptr;
}
