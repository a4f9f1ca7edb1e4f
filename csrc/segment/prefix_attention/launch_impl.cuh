// One launch after the other, until one fails.
#pragma once
#include <type_traits>

#include "segment/prefix_attention/launch.cuh"

namespace remora {

class AttentionLauncher {
 public:
  explicit AttentionLauncher(const Launch& launch) : stream_(static_cast<cudaStream_t>(launch.stream)) {}

  template <class Kernel, class Params>
  void operator()(Kernel kernel, int64_t x, int64_t y, int z, int threads, int smem_size, const Params& params) {
    if (error_ != nullptr || x * y * z == 0) return;
    if (x > INT32_MAX || y > 65535) {
      error_ = "prefix_attention on CUDA: too many tokens or heads";
      return;
    }
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_size));
    if (error_ != nullptr) return;
    kernel<<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)), threads, smem_size,
             stream_>>>(params);
    check(cudaGetLastError());
  }
  Error error() const { return error_; }

 private:
  void check(cudaError_t error) {
    if (error != cudaSuccess) error_ = cudaGetErrorString(error);
  }

  cudaStream_t stream_;
  Error error_ = nullptr;
};

/// Calls f with the head size that the tiles are padded to, as a compile-time integer.
template <class F>
void with_head_dim(int64_t head_dim, F&& f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

}  // namespace remora
