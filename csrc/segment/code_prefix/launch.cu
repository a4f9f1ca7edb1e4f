// CUDA entry points of the running sums of values per code.
#include "segment/code_prefix/launch.h"

#include <algorithm>

#include "segment/code_prefix/kernels.cuh"

namespace remora {
namespace {

/// What every architecture from 8.0 on has.
constexpr int64_t kMaxSharedBytes = 99 << 10;

template <int CHANNELS>
constexpr int64_t shared_bytes(const CodePrefixShape& shape) {
  return shape.codes * 4 * (1 + CHANNELS);
}

template <int CHANNELS, class Kernel, class Params>
Error launch_rows(Kernel kernel, const Params& params, const Launch& launch) {
  const CodePrefixShape& shape = params.shape;
  // At least one block, which also writes the counts.
  const int64_t num_channel_blocks = std::max<int64_t>(1, (shape.channels + CHANNELS - 1) / CHANNELS);
  const int64_t num_ctas = shape.rows * num_channel_blocks, smem_size = shared_bytes<CHANNELS>(shape);
  if (num_ctas > INT32_MAX) return "code_prefix_state on CUDA: too many rows and channels";
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_size));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<static_cast<unsigned>(num_ctas), kCodePrefixThreads, smem_size, static_cast<cudaStream_t>(launch.stream)>>>(
      params, num_channel_blocks);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

template <typename T>
Error run(const CodePrefixFwdParams& params, const Launch& launch) {
  if (shared_bytes<32>(params.shape) <= kMaxSharedBytes) {
    return launch_rows<32>(code_prefix_fwd_kernel<T, 32>, params, launch);
  }
  return launch_rows<8>(code_prefix_fwd_kernel<T, 8>, params, launch);
}

template <typename T>
Error run(const CodePrefixBwdParams& params, const Launch& launch) {
  if (shared_bytes<32>(params.shape) <= kMaxSharedBytes) {
    return launch_rows<32>(code_prefix_bwd_kernel<T, 32>, params, launch);
  }
  return launch_rows<8>(code_prefix_bwd_kernel<T, 8>, params, launch);
}

template <class Params>
Error dispatch(const Params& params, const Launch& launch) {
  if (shared_bytes<8>(params.shape) > kMaxSharedBytes) return "code_prefix_state on CUDA supports up to 2816 codes";
  switch (params.dtype) {
    case DType::kBFloat16:
      return run<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return run<__half>(params, launch);
    case DType::kFloat32:
      return run<float>(params, launch);
    default:
      return "code_prefix_state on CUDA supports float32, bfloat16 and float16";
  }
}

}  // namespace

Error code_prefix_fwd(const CodePrefixFwdParams& params, const Launch& launch) { return dispatch(params, launch); }
Error code_prefix_bwd(const CodePrefixBwdParams& params, const Launch& launch) { return dispatch(params, launch); }

}  // namespace remora
