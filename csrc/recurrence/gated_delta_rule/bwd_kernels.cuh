// Launch of the backward kernels for one element type and head dimension; each instantiation has a file of its own.
#pragma once
#include <cuda_runtime_api.h>

#include "recurrence/gated_delta_rule/bwd_chunk_kernel.cuh"
#include "recurrence/gated_delta_rule/bwd_launch.h"
#include "recurrence/gated_delta_rule/bwd_state_kernel.cuh"
#include "recurrence/gated_delta_rule/heuristics.h"

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

/// Where the parts of the workspace begin.
struct BwdBuffers {
  void* d_states;
  uint8_t* inverses;
  float* span_maps;
  float4* group_sums;
  BwdBuffers(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace)
      : d_states(params.workspace),
        inverses(static_cast<uint8_t*>(params.workspace) + workspace.d_states_size),
        span_maps(reinterpret_cast<float*>(inverses + workspace.inverses_size)),
        group_sums(reinterpret_cast<float4*>(inverses + workspace.inverses_size + workspace.span_maps_size)) {}
};

template <typename T, int HEAD_DIM, int kNumStages>
cudaError_t launch_bwd_state(const GatedDeltaRuleBwdParams& params, const BwdBuffers& buffers, int num_sms,
                             cudaStream_t stream) {
  using Traits = BwdStateTraits<T, HEAD_DIM, kNumStages>;
  const SpanPlan spans = plan_spans(params.shape, num_sms);
  const SpanMaps maps{spans.span_tokens, buffers.span_maps};
  const auto launch_walk = [&](bool is_summary) {
    return launch_with_smem(gated_delta_rule_bwd_state_kernel<Traits>,
                            is_summary ? spans.num_summary_ctas : spans.num_walk_ctas, Traits::kNumThreads,
                            sizeof(typename Traits::Smem), stream, params,
                            static_cast<typename Traits::TSaved*>(buffers.d_states), buffers.inverses, maps, is_summary,
                            is_aligned(params));
  };
  if (spans.num_map_slots > 0) {
    if (const cudaError_t error = launch_walk(true); error != cudaSuccess) return error;
    const CombineParams combine{params.shape, params.cu_seqlens, maps, true};
    if (const cudaError_t error = launch_combine(combine, spans.num_map_slots, stream); error != cudaSuccess) {
      return error;
    }
  }
  return launch_walk(false);
}

template <typename T, int HEAD_DIM, int BLOCK_V, int kNumStages>
cudaError_t launch_bwd_chunk(const GatedDeltaRuleBwdParams& params, const BwdBuffers& buffers, cudaStream_t stream) {
  using Traits = BwdChunkTraits<T, HEAD_DIM, BLOCK_V, kNumStages>;
  const RecurrenceShape& shape = params.shape;
  const auto* d_states = static_cast<const typename Traits::TSaved*>(buffers.d_states);
  const uint8_t* inverses = buffers.inverses;
  return launch_with_smem(gated_delta_rule_bwd_chunk_kernel<Traits>,
                          num_state_slots(shape.batch * shape.seqlen, shape.num_seqs) * shape.num_heads,
                          Traits::kNumThreads, sizeof(typename Traits::Smem), stream, params, d_states, inverses,
                          buffers.group_sums, is_aligned(params));
}

template <typename T, int HEAD_DIM>
cudaError_t run_gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace,
                                     const Launch& launch) {
  constexpr int kWideBlockV = sizeof(T) == 2 ? 64 : 32;
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 1>::Smem) <= kSmallSmemSize);
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 2>::Smem) <= kMediumSmemSize);
  static_assert(sizeof(typename BwdStateTraits<T, HEAD_DIM, 3>::Smem) <= kLargeSmemSize);
  static_assert(sizeof(typename BwdChunkTraits<T, HEAD_DIM, 32, 1>::Smem) <= kSmallSmemSize);
  static_assert(sizeof(typename BwdChunkTraits<T, HEAD_DIM, 32, 2>::Smem) <= kMediumSmemSize);
  static_assert(sizeof(typename BwdChunkTraits<T, HEAD_DIM, kWideBlockV, 2>::Smem) <= kLargeSmemSize);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const int smem_size = smem_size_of(launch.arch);
  const BwdBuffers buffers(params, workspace);
  const auto state = smem_size == kLargeSmemSize    ? launch_bwd_state<T, HEAD_DIM, 3>
                     : smem_size == kMediumSmemSize ? launch_bwd_state<T, HEAD_DIM, 2>
                                                    : launch_bwd_state<T, HEAD_DIM, 1>;
  if (const cudaError_t error = state(params, buffers, launch.num_sms, stream); error != cudaSuccess) return error;
  const auto chunk = smem_size == kLargeSmemSize    ? launch_bwd_chunk<T, HEAD_DIM, kWideBlockV, 2>
                     : smem_size == kMediumSmemSize ? launch_bwd_chunk<T, HEAD_DIM, 32, 2>
                                                    : launch_bwd_chunk<T, HEAD_DIM, 32, 1>;
  return chunk(params, buffers, stream);
}

}  // namespace remora
