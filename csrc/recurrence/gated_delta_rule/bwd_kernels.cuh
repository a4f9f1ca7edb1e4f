// Launch of the backward kernels for one element type and head dimension; each instantiation has a file of its own.
#pragma once
#include <cuda_runtime_api.h>

#include "recurrence/gated_delta_rule/bwd_chunk_kernel.cuh"
#include "recurrence/gated_delta_rule/bwd_launch.h"
#include "recurrence/gated_delta_rule/bwd_state_kernel.cuh"

namespace remora {

/// True if rows of every tensor can be moved in 16-byte pieces.
inline bool is_aligned(const GatedDeltaRuleBwdParams& params) {
  const int64_t size = size_of(params.dtype), saved_size = size_of(params.saved_dtype);
  const auto bits = [](const void* pointer) { return reinterpret_cast<int64_t>(pointer); };
  int64_t all = bits(params.q) | bits(params.k) | bits(params.v) | bits(params.d_o) | bits(params.saved_states) |
                bits(params.dq) | bits(params.dk) | bits(params.dv);
  for (const TokenStrides& stride : {params.q_stride, params.k_stride, params.v_stride}) {
    all |= (stride.batch | stride.token | stride.head) * size;
  }
  all |= (params.shape.head_dim | params.shape.value_dim) * size | params.shape.value_dim * saved_size;
  return all % 16 == 0;
}

template <typename Kernel, typename... Args>
cudaError_t launch_with_smem(Kernel kernel, int64_t num_ctas, int num_threads, size_t smem_size, cudaStream_t stream,
                             const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_size));
  if (error != cudaSuccess) return error;
  kernel<<<dim3(static_cast<unsigned>(num_ctas)), num_threads, smem_size, stream>>>(args...);
  return cudaGetLastError();
}

template <typename T, int HEAD_DIM, int kNumStages>
cudaError_t launch_bwd_state(const GatedDeltaRuleBwdParams& params, cudaStream_t stream) {
  using Traits = BwdStateTraits<T, HEAD_DIM, kNumStages>;
  const RecurrenceShape& shape = params.shape;
  const int64_t num_v_tiles = (shape.value_dim + Traits::BLOCK_V - 1) / Traits::BLOCK_V;
  auto* d_states = static_cast<typename Traits::TSaved*>(params.workspace);
  return launch_with_smem(gated_delta_rule_bwd_state_kernel<Traits>,
                          shape.num_seqs * shape.num_value_heads * num_v_tiles, Traits::kNumThreads,
                          sizeof(typename Traits::Smem), stream, params, d_states, is_aligned(params));
}

template <typename T, int HEAD_DIM, bool kIsSmall>
cudaError_t launch_bwd_chunk(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace,
                             cudaStream_t stream) {
  using Traits = BwdChunkTraits<T, HEAD_DIM, kIsSmall>;
  const auto* d_states = static_cast<const typename Traits::TSaved*>(params.workspace);
  auto* group_sums = reinterpret_cast<float4*>(static_cast<char*>(params.workspace) + workspace.d_states_size);
  return launch_with_smem(gated_delta_rule_bwd_chunk_kernel<Traits>, workspace.num_chunk_slots * params.shape.num_heads,
                          Traits::kNumThreads, sizeof(typename Traits::Smem), stream, params, d_states, group_sums,
                          is_aligned(params));
}

template <typename T, int HEAD_DIM>
cudaError_t run_gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace,
                                     const Launch& launch) {
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 1>::Smem) <= kSmallSmemSize);
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 2>::Smem) <= kMediumSmemSize);
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 3>::Smem) <= kLargeSmemSize);
  static_assert(sizeof(typename BwdChunkTraits<T, HEAD_DIM, true>::Smem) <= kSmallSmemSize);
  static_assert(sizeof(typename BwdChunkTraits<T, HEAD_DIM, false>::Smem) <= kMediumSmemSize);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const int smem_size = smem_size_of(launch.arch);
  const cudaError_t error = smem_size == kLargeSmemSize    ? launch_bwd_state<T, HEAD_DIM, 3>(params, stream)
                            : smem_size == kMediumSmemSize ? launch_bwd_state<T, HEAD_DIM, 2>(params, stream)
                                                           : launch_bwd_state<T, HEAD_DIM, 1>(params, stream);
  if (error != cudaSuccess) return error;
  return smem_size == kSmallSmemSize ? launch_bwd_chunk<T, HEAD_DIM, true>(params, workspace, stream)
                                     : launch_bwd_chunk<T, HEAD_DIM, false>(params, workspace, stream);
}

}  // namespace remora
