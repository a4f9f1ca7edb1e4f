// Launch of the backward kernels for one element type and head dimension; each instantiation has a file of its own.
#pragma once
#include <cuda_runtime_api.h>

#include "recurrence/gated_delta_rule/bwd_chunk_kernel.cuh"
#include "recurrence/gated_delta_rule/bwd_launch.h"
#include "recurrence/gated_delta_rule/bwd_state_kernel.cuh"

namespace remora {

template <typename Kernel, typename... Args>
cudaError_t launch_with_smem(Kernel kernel, int64_t num_ctas, int num_threads, size_t smem_size, cudaStream_t stream,
                             const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_size));
  if (error != cudaSuccess) return error;
  kernel<<<dim3(static_cast<unsigned>(num_ctas)), num_threads, smem_size, stream>>>(args...);
  return cudaGetLastError();
}

template <typename T, int HEAD_DIM, bool kIsSmall>
cudaError_t launch_bwd(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace, cudaStream_t stream) {
  using State = BwdStateTraits<T, HEAD_DIM, kIsSmall>;
  using Chunk = BwdChunkTraits<T, HEAD_DIM, kIsSmall>;
  static_assert(sizeof(typename Chunk::Smem) <= (kIsSmall ? kSmallSmemSize : kLargeSmemSize));
  static_assert(sizeof(typename State::Smem) <= (kIsSmall ? kSmallSmemSize : kLargeSmemSize));
  auto* d_states = static_cast<typename State::TSaved*>(params.workspace);
  auto* group_sums = reinterpret_cast<float4*>(static_cast<char*>(params.workspace) + workspace.d_states_size);
  const GatedDeltaRuleShape& shape = params.shape;
  const int64_t num_v_tiles = (shape.value_dim + State::BLOCK_V - 1) / State::BLOCK_V;
  const cudaError_t error =
      launch_with_smem(gated_delta_rule_bwd_state_kernel<State>, shape.num_seqs * shape.num_value_heads * num_v_tiles,
                       State::kNumThreads, sizeof(typename State::Smem), stream, params, d_states);
  if (error != cudaSuccess) return error;
  return launch_with_smem(gated_delta_rule_bwd_chunk_kernel<Chunk>, workspace.num_chunk_slots * shape.num_heads,
                          Chunk::kNumThreads, sizeof(typename Chunk::Smem), stream, params, d_states, group_sums);
}

template <typename T, int HEAD_DIM>
cudaError_t run_gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace,
                                     const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return has_large_smem(launch.arch) ? launch_bwd<T, HEAD_DIM, false>(params, workspace, stream)
                                     : launch_bwd<T, HEAD_DIM, true>(params, workspace, stream);
}

}  // namespace remora
