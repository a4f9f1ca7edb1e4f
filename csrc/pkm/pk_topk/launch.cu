// CUDA entry points of the product-key selection.
#include "pkm/pk_topk/launch.h"

#include "pkm/pk_topk/bwd_kernel.cuh"
#include "pkm/pk_topk/topk_kernel.cuh"

namespace remora {
namespace {

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_query_rows(const PkTopkParams& p) { return p.tokens * p.heads * 2; }
int64_t num_key_rows(const PkTopkParams& p) { return p.heads * 2 * p.num_keys; }

template <typename T>
Error fwd(const PkTopkParams& p, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  int device = 0, max_smem = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return message_of(error);
  PkTopkKernelParams params{.p = p, .config = plan_pk_topk(p, max_smem, launch.num_sms)};
  if (params.config.block_tokens == 0) return "pk_topk: this device has too little shared memory for n and k";
  const int64_t num_ctas = ceil_div(p.tokens, params.config.block_tokens) * p.heads;
  if (num_ctas > INT32_MAX || ceil_div(num_query_rows(p), 4) > INT32_MAX) return "pk_topk: too many tokens";
  if (p.sub_scores == nullptr) {
    const auto address = reinterpret_cast<uintptr_t>(p.query) | reinterpret_cast<uintptr_t>(p.keys);
    params.is_aligned = (address | static_cast<uintptr_t>(p.dims * size_of(p.dtype))) % 16 == 0;
    if (p.score.kind != ScoreFunction::Kind::kDot) {
      float* squares = static_cast<float*>(p.workspace);
      params.query_squares = squares, params.key_squares = squares + num_query_rows(p);
      const auto launch_squares = [&](const void* x, int64_t num_rows, float* to) {
        pk_squares_kernel<T><<<static_cast<unsigned>(ceil_div(num_rows, 4)), 128, 0, stream>>>(static_cast<const T*>(x),
                                                                                               num_rows, p.dims, to);
      };
      launch_squares(p.query, num_query_rows(p), squares);
      launch_squares(p.keys, num_key_rows(p), squares + num_query_rows(p));
    }
  }
  const auto kernel = p.sub_scores == nullptr ? pk_topk_fwd_kernel<T, false> : pk_topk_fwd_kernel<T, true>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, params.config.smem_size);
  if (error != cudaSuccess) return message_of(error);
  kernel<<<static_cast<unsigned>(num_ctas), kPkTopkThreads, params.config.smem_size, stream>>>(params);
  return message_of(cudaGetLastError());
}

}  // namespace

int64_t pk_topk_workspace(const PkTopkParams& p) {
  const bool has_squares = p.sub_scores == nullptr && p.score.kind != ScoreFunction::Kind::kDot;
  return has_squares ? 4 * (num_query_rows(p) + num_key_rows(p)) : 0;
}

Error pk_topk(const PkTopkParams& params, const Launch& launch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return fwd<float>(params, launch);
    case DType::kBFloat16:
      return fwd<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return fwd<__half>(params, launch);
    default:
      return "pk_topk on CUDA: float64 is not supported";
  }
}

Error pk_select_bwd(const PkSelectBwdParams& params, const Launch& launch) {
  if (params.dtype != DType::kFloat32) return "pk_select on CUDA: float64 is not supported";
  const int64_t num_ctas = params.tokens * params.heads;
  if (num_ctas > INT32_MAX) return "pk_select: too many tokens";
  pk_select_bwd_kernel<<<static_cast<unsigned>(num_ctas), kPkSelectBwdThreads, 8 * params.topk,
                         static_cast<cudaStream_t>(launch.stream)>>>(params);
  return message_of(cudaGetLastError());
}

}  // namespace remora
