// Arguments off the dispatcher's stack: what the operators of every device share. The C interface trusts shapes, dtypes and
// strides, so they are checked here: a wrong call raises RuntimeError and never crashes.
#pragma once
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "torch_abi.h"

namespace deq_torch {

#define DEQ_FUNCTION(name, arguments) int32_t(*name) arguments = nullptr;
#define DEQ_DTYPE(name) int32_t name = -1;
struct Torch {
  DEQ_TORCH_FUNCTIONS(DEQ_FUNCTION)
  struct Dtypes {
    DEQ_TORCH_DTYPES(DEQ_DTYPE)
  } dtype;
};
inline Torch torch_;
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

inline std::string tuple(const int64_t* values, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

inline std::string dtype_name(int32_t dtype) {
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
  int32_t device() const {
    int32_t index = -1;
    if (torch_.aoti_torch_get_device_index(handle_, &index)) place_.fail("has no device");
    return index;
  }
  int32_t device_type() const {
    int32_t type = -1;
    if (torch_.aoti_torch_get_device_type(handle_, &type)) place_.fail("has no device");
    return type;
  }
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

// Memory on the device of a tensor for as long as this lives: torch's allocator knows to hand it on in the order of the stream.
class Memory {
 public:
  Memory(const Tensor& beside, int64_t bytes) {
    const int64_t stride = 1;
    if (torch_.aoti_torch_empty_strided(1, &bytes, &stride, torch_.dtype.uint8, beside.device_type(), beside.device(),
                                        &handle_) ||
        torch_.aoti_torch_get_data_ptr(handle_, &data_)) {
      free();
      beside.place().fail("lies on a device that has no " + std::to_string(bytes) + " bytes left");
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(); }
  void* data() const { return data_; }

 private:
  void free() {
    if (handle_) torch_.aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

inline int32_t integer(const Place& place, StableIValue boxed, int64_t low, int64_t high) {
  const auto value = static_cast<int64_t>(boxed);
  if (value < low || value > high)
    place.fail("must lie in " + std::to_string(low) + ".." + std::to_string(high) + "; got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

inline double tolerance(const Place& place, StableIValue boxed) {
  double value;
  memcpy(&value, &boxed, sizeof value);
  if (!(value >= 0)) place.fail("must not be negative or NaN; got " + std::to_string(value));
  return value;
}

inline DeqType type_of(const Place& place, int32_t dtype) {
  if (dtype == torch_.dtype.float32) return DEQ_FLOAT32;
  if (dtype == torch_.dtype.float64) return DEQ_FLOAT64;
  if (dtype == torch_.dtype.bfloat16) return DEQ_BFLOAT16;
  if (dtype == torch_.dtype.float16) return DEQ_FLOAT16;
  place.fail("must be float32, float64, bfloat16 or float16; got " + dtype_name(dtype));
}

inline int32_t torch_threads() {
  uint32_t threads = 1;
  if (torch_.torch_get_num_threads(&threads)) throw std::runtime_error("deq: torch_get_num_threads failed");
  return static_cast<int32_t>(threads);
}

// The sizes S, B, m and the type of a problem, from W (S, m, m) and the injection (S, B, m), or (m, m) and (B, m).
inline DeqProblem problem_of(const Tensor& W, const Tensor& injection) {
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
inline DeqView batch_of(const DeqProblem& p, const Tensor& W, const Tensor& tensor) {
  tensor.expect_shape({p.weights, p.batch, p.width}, W.dim() == 3);
  tensor.expect_dtype(W.dtype());
  return tensor.view();
}

// A starting point; without elements it stands for zero.
inline DeqView start_of(const DeqProblem& p, const Tensor& W, const Tensor& start) {
  start.expect_dim(W.dim(), "of the injection's shape, or of its dimensions without elements to start at zero");
  return start.empty() ? DeqView{} : batch_of(p, W, start);
}

inline DeqView output_of(const DeqProblem& p, const Tensor& W, const Tensor& tensor) {
  const DeqView view = batch_of(p, W, tensor);
  tensor.expect_separate_rows();
  return view;
}

// The pieces of the buffer that says what every sample did, laid out as deq/stats.py tells, and the bytes that they take.
inline int64_t set_stats(DeqProblem& p, const Tensor& stats) {
  const int64_t n = p.weights * p.batch, residual = p.type == DEQ_FLOAT64 ? sizeof(double) : sizeof(float);
  stats.expect_dtype(torch_.dtype.uint8);
  stats.expect_contiguous();
  char* at = stats.data<char>();
  if (reinterpret_cast<uintptr_t>(at) % residual)
    stats.place().fail("must begin at a multiple of " + std::to_string(residual) + " bytes");
  p.residual = at;
  p.iterations = reinterpret_cast<int32_t*>(at + n * residual);
  p.status = reinterpret_cast<uint8_t*>(at + n * (residual + sizeof(int32_t)));
  return n * static_cast<int64_t>(residual + sizeof(int32_t) + sizeof(uint8_t));
}

// Where a call reports, and what it says of every sample.
inline void set_outcome(DeqProblem& p, const Tensor& stats, const Tensor& report) {
  const int64_t bytes = set_stats(p, stats);
  stats.expect_shape({bytes});
  report.expect_shape({static_cast<int64_t>(sizeof(DeqReport) / sizeof(int64_t))});
  report.expect_dtype(torch_.dtype.int64);
  report.expect_contiguous();
  p.report = report.data<DeqReport>();
}

// Both in one buffer: the report behind what is said of the samples, at the next multiple of its alignment.
inline void set_outcome(DeqProblem& p, const Tensor& said) {
  constexpr int64_t kAlign = alignof(DeqReport);
  const int64_t bytes = set_stats(p, said), at = (bytes + kAlign - 1) / kAlign * kAlign;
  said.expect_shape({at + static_cast<int64_t>(sizeof(DeqReport))});
  if (reinterpret_cast<uintptr_t>(said.data<char>()) % kAlign)
    said.place().fail("must begin at a multiple of " + std::to_string(kAlign) + " bytes");
  p.report = reinterpret_cast<DeqReport*>(said.data<char>() + at);
}

// How the iteration is run, in seven arguments.
inline void set_options(DeqProblem& p, const char* op, const StableIValue* options) {
  p.acceleration = integer({op, "acceleration"}, options[0], DEQ_PLAIN, DEQ_ON_DEMAND);
  p.depth = integer({op, "depth"}, options[1], 0, INT32_MAX);
  p.criterion = integer({op, "criterion"}, options[2], DEQ_RESIDUAL, DEQ_ERROR_ESTIMATE);
  p.tol = tolerance({op, "tol"}, options[3]);
  p.max_iter = integer({op, "max_iter"}, options[4], 1, INT32_MAX);
  p.precision = integer({op, "precision"}, options[5], DEQ_NATIVE, DEQ_BFLOAT16_INCREMENTS);
  p.reflected = integer({op, "reflected"}, options[6], 0, 1);
}

}  // namespace deq_torch
