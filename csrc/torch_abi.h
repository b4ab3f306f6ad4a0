// The part of LibTorch's stable C ABI that this library calls.
//
// PyTorch keeps these functions compatible across releases ("LibTorch Stable ABI" in its notes). Declaring the few we need here,
// and looking them up in the libtorch that the process already holds, lets the library build without torch and lets one binary
// serve every torch >= 2.10. tests/test_abi.py compares each line with torch's own headers.
#pragma once
#include <stdint.h>

#ifndef DEQ_TORCH_TYPES_DECLARED  // tests/test_abi.py includes torch's headers first
using StableIValue = uint64_t;    // one boxed argument: a tensor handle, an int64, or the bits of a double
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
#endif
using BoxedKernel = void (*)(StableIValue* stack, uint64_t arguments, uint64_t returns);

// name, argument types; each returns int32_t, 0 on success.
#define DEQ_TORCH_FUNCTIONS(F)                                                                                         \
  F(aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, TorchLibraryHandle*))                       \
  F(aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, TorchLibraryHandle*))              \
  F(aoti_torch_library_def, (TorchLibraryHandle, const char*))                                                         \
  F(aoti_torch_library_impl, (TorchLibraryHandle, const char*, BoxedKernel))                                           \
  F(aoti_torch_get_data_ptr, (AtenTensorHandle, void**))                                                               \
  F(aoti_torch_get_dim, (AtenTensorHandle, int64_t*))                                                                  \
  F(aoti_torch_get_sizes, (AtenTensorHandle, int64_t**))                                                               \
  F(aoti_torch_get_strides, (AtenTensorHandle, int64_t**))                                                             \
  F(aoti_torch_get_dtype, (AtenTensorHandle, int32_t*))                                                                \
  F(aoti_torch_get_device_index, (AtenTensorHandle, int32_t*))                                                         \
  F(aoti_torch_get_device_type, (AtenTensorHandle, int32_t*))                                                          \
  F(aoti_torch_empty_strided, (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*)) \
  F(aoti_torch_delete_tensor_object, (AtenTensorHandle))                                                               \
  F(torch_get_num_threads, (uint32_t*))

// The same of torch's CUDA half; looked up when the first CUDA operator runs.
#define DEQ_TORCH_CUDA_FUNCTIONS(F) F(aoti_torch_get_current_cuda_stream, (int32_t, void**))

// dtypes; torch gives the number of each by calling int32_t aoti_torch_dtype_<name>().
#define DEQ_TORCH_DTYPES(F) F(float32) F(float64) F(bfloat16) F(float16) F(int32) F(int64) F(uint8)
