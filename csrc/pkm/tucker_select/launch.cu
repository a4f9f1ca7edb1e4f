// CUDA entry point of the bilinear selection.
#include "pkm/tucker_select/launch.h"

#include "pkm/tucker_select/kernel.cuh"

namespace remora {
namespace {

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <int RANK>
Error launch_select(const TuckerSelectParams& p, const Launch& launch) {
  const int capacity = 2 * select_capacity(static_cast<int>(p.topk));
  const int64_t smem_size = capacity * 8 + 2 * p.candidates * RANK * 4;
  const cudaError_t error = cudaFuncSetAttribute(
      tucker_select_kernel<RANK>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_size));
  if (error != cudaSuccess) return message_of(error);
  tucker_select_kernel<RANK><<<static_cast<unsigned>(p.tokens * p.heads), kTuckerThreads, smem_size,
                               static_cast<cudaStream_t>(launch.stream)>>>(p, capacity);
  return message_of(cudaGetLastError());
}

}  // namespace

Error tucker_select(const TuckerSelectParams& params, const Launch& launch) {
  if (params.dtype == DType::kFloat64) return "tucker_select on CUDA: float64 is not supported";
  if (params.tokens * params.heads > INT32_MAX) return "tucker_select: too many tokens";
  return params.rank <= 2   ? launch_select<2>(params, launch)
         : params.rank <= 4 ? launch_select<4>(params, launch)
                            : launch_select<8>(params, launch);
}

}  // namespace remora
