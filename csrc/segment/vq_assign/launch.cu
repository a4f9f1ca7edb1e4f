// CUDA entry points of the assignment to codes.
#include "segment/vq_assign/launch.h"

#include "segment/vq_assign/kernel.cuh"

namespace remora {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
Error assign(const VqAssignParams& p, const Launch& launch) {
  const auto is_aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  };
  const bool is_dense = p.dims * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const VqAssignKernelParams params{
      .p = p,
      .halves = static_cast<float*>(p.workspace),
      .is_x_aligned = is_dense && is_aligned(p.x, p.x_stride_batch) && is_aligned(p.x, p.x_stride_head) &&
                      is_aligned(p.x, p.x_stride_token),
      .is_code_aligned = is_aligned(p.codebook, p.dims),
  };
  const int64_t num_ctas = p.batch * p.heads * ceil_div(p.tokens, kVqTokens);
  const int64_t num_code_ctas = ceil_div(p.heads * p.codes, 4);
  if (num_ctas > INT32_MAX || num_code_ctas > INT32_MAX) return "vq_assign on CUDA: too many tokens or codes";
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  vq_halves_kernel<T><<<static_cast<unsigned>(num_code_ctas), 128, 0, stream>>>(params);
  vq_assign_kernel<T><<<static_cast<unsigned>(num_ctas), kVqThreads, kVqStages * kVqStageSize, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t vq_assign_workspace(const VqAssignParams& params) { return 4 * params.heads * params.codes; }

Error vq_assign(const VqAssignParams& params, const Launch& launch) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return assign<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return assign<__half>(params, launch);
    case DType::kFloat32:
      return assign<float>(params, launch);
    default:
      return "vq_assign on CUDA supports float32, bfloat16 and float16";
  }
}

}  // namespace remora
