// Definition of launch_fwd_pass, included by the files that instantiate it.
#pragma once
#include "recurrence/gated_delta_rule/fwd_kernel.cuh"
#include "recurrence/gated_delta_rule/fwd_launch.cuh"
#include "recurrence/gated_delta_rule/heuristics.h"

namespace remora {

template <typename T, int HEAD_DIM, bool kIsRouted>
cudaError_t launch_fwd_pass(const FwdKernelParams& params, const FwdConfig& config, bool is_summary, bool is_aligned,
                            cudaStream_t stream) {
  const auto kernel = is_summary ? (is_aligned ? gated_delta_rule_fwd_kernel<T, HEAD_DIM, true, true, kIsRouted>
                                               : gated_delta_rule_fwd_kernel<T, HEAD_DIM, true, false, kIsRouted>)
                                 : (is_aligned ? gated_delta_rule_fwd_kernel<T, HEAD_DIM, false, true, kIsRouted>
                                               : gated_delta_rule_fwd_kernel<T, HEAD_DIM, false, false, kIsRouted>);
  const int64_t num_ctas = is_summary ? config.num_summary_ctas : config.num_output_ctas;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.smem_size);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(num_ctas), kFwdThreads, config.smem_size, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace remora
