// What the bindings need of PyTorch, on its stable ABI. The only header, with the bind.cpp files, that sees torch.
//
// Exactly one of REMORA_BACKEND_CPU, REMORA_BACKEND_CUDA, REMORA_BACKEND_SIM is defined: bind.cpp is compiled once for
// each. The simulator backend takes CPU tensors and runs the CUDA path on them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/launch.h"

#if defined(REMORA_BACKEND_CUDA) || defined(REMORA_BACKEND_SIM)
#include <cuda_runtime_api.h>
#endif
#if defined(REMORA_BACKEND_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define REMORA_DISPATCH_KEY CUDA
#else
#define REMORA_DISPATCH_KEY CPU
#endif
#if defined(REMORA_BACKEND_SIM)
#include "ptxsim/ptxsim.h"
#endif

namespace remora {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Half;
  }
}

/// An uninitialised tensor on the device of `like`; filled with NaN (integers: 255, -2^31) if REMORA_POISON is set, so
/// that tests find what a kernel forgets to write.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  static const bool poison = std::getenv("REMORA_POISON") != nullptr;
  const std::vector<int64_t> shape(sizes);
  Tensor out = torch::stable::new_empty(like, shape, type);
  if (poison && out.numel() > 0) {
    const double integer = type == ScalarType::Byte ? 255. : std::numeric_limits<int32_t>::min();
    const bool is_integer = type == ScalarType::Byte || type == ScalarType::Int;
    torch::stable::fill_(out, is_integer ? integer : std::numeric_limits<double>::quiet_NaN());
  }
  return out;
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

inline void* data_or_null(const Tensor& tensor) { return tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr; }
inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

/// The tensor with its last dimension contiguous.
inline Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.dim() > 0 && tensor.stride(tensor.dim() - 1) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t dim = 0;
  for (const int64_t size : expected) same = same && tensor.size(dim++) == size;
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

inline void check_dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  check_shape(tensor, name, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_dense(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                        ScalarType type) {
  if (tensor.has_value()) check_dense(*tensor, name, shape, type);
}

/// Makes the tensors of a call known to the simulator's memcheck and initcheck while it runs; nothing elsewhere.
class Allocations {
 public:
  Allocations() = default;
  Allocations(const Allocations&) = delete;
  Allocations& operator=(const Allocations&) = delete;

#if defined(REMORA_BACKEND_SIM)
  ~Allocations() {
    for (const void* address : addresses_) ptxsim::unregister_range(address);
  }
  void add(const Tensor& tensor, const char* name, bool initialised) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    const void* address = tensor.const_data_ptr();
    ptxsim::register_range(address, (last + 1) * tensor.element_size(), name, initialised);
    addresses_.push_back(address);
  }
#else
  void add(const Tensor&, const char*, bool) {}
#endif

  void input(const Tensor& tensor, const char* name) { add(tensor, name, true); }
  void input(const OptionalTensor& tensor, const char* name) {
    if (tensor.has_value()) add(*tensor, name, true);
  }
  void output(const Tensor& tensor, const char* name) { add(tensor, name, false); }

 private:
  std::vector<const void*> addresses_;
};

#if defined(REMORA_BACKEND_CPU)

inline Launch launch_on(const Tensor&) {
  return {.parallel_for = [](int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, size, grain, body);
  }};
}

inline void check_launch(Error error) { STD_TORCH_CHECK(error == nullptr, error); }

#else

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
  return value;
}

inline Launch launch_on(const Tensor& tensor) {
  void* stream = nullptr;
#if defined(REMORA_BACKEND_CUDA)
  const int device = tensor.get_device_index();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#else
  (void)tensor;
  const int device = 0;
#endif
  return {.stream = stream,
          .num_sms = device_attribute(cudaDevAttrMultiProcessorCount, device),
          .arch = device_attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                  device_attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

inline void check_launch(Error error) {
#if defined(REMORA_BACKEND_SIM)
  STD_TORCH_CHECK(error == nullptr, error, ": ", ptxsim::last_error_message());
#else
  STD_TORCH_CHECK(error == nullptr, error);
#endif
}

#endif

/// Selects the device of `tensor` for the lifetime of the object.
class DeviceScope {
 public:
#if defined(REMORA_BACKEND_CUDA)
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit DeviceScope(const Tensor&) {}
#endif
};

}  // namespace remora
