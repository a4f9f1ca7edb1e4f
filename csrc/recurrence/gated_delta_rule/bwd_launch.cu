// Backward pass of the gated delta rule: state kernel, then chunk kernel.
#include "recurrence/gated_delta_rule/bwd_launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "recurrence/gated_delta_rule/heuristics.h"
#include "recurrence/gated_delta_rule/launch.h"
#include "recurrence/sequence.cuh"

namespace remora {
namespace {

/// Zero gradients for tokens outside every sequence. Grid: one CTA per packed position.
__global__ void __launch_bounds__(128)
    gated_delta_rule_bwd_padding_kernel(const __grid_constant__ GatedDeltaRuleBwdParams params) {
  const RecurrenceShape& shape = params.shape;
  const int64_t position = blockIdx.x;
  if (position >= find_offset(shape, params.cu_seqlens, 0) &&
      position < find_offset(shape, params.cu_seqlens, shape.num_seqs)) {
    return;
  }
  const int64_t token = row_at(shape, params.rows, position).row;
  const int64_t element_size = size_of(params.dtype);
  const auto zero = [&](void* tensor, int64_t row_size) {
    auto* row = static_cast<uint16_t*>(tensor) + token * (row_size / 2);
    for (int64_t i = threadIdx.x; i < row_size / 2; i += blockDim.x) row[i] = 0;
  };
  zero(params.dq, shape.num_heads * shape.head_dim * element_size);
  zero(params.dk, shape.num_heads * shape.head_dim * element_size);
  zero(params.dv, shape.num_value_heads * shape.value_dim * element_size);
  zero(params.dbeta, shape.num_value_heads * size_of(params.state_dtype));
  if (params.dg != nullptr) zero(params.dg, shape.num_value_heads * size_of(params.state_dtype));
}

int64_t padded_head_dim(const GatedDeltaRuleBwdParams& params) { return params.shape.head_dim <= 64 ? 64 : 128; }

BwdWorkspace plan_workspace(const GatedDeltaRuleBwdParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const int64_t element_size = size_of(params.dtype), block_t = element_size == 4 ? 32 : 64;
  const int64_t num_blocks = block_t / 16 * (block_t / 16 + 1) / 2;
  const int64_t head_dim = padded_head_dim(params);
  const int64_t num_tokens = shape.batch * shape.seqlen, num_slots = num_tokens / block_t + shape.num_seqs;
  const auto padded = [](int64_t size) { return (size + 255) / 256 * 256; };
  const bool has_passes =
      shape.num_value_heads > shape.num_heads ||
      shape.value_dim > bwd_state_columns(static_cast<int>(element_size), num_bwd_stages(launch.arch));
  return {padded(num_slots * shape.num_value_heads * shape.value_dim * head_dim * size_of(params.saved_dtype)),
          padded(num_slots * shape.num_value_heads * num_blocks * 256 * element_size),
          padded(span_maps_size(shape, plan_spans(shape, launch.num_sms).num_map_slots)),
          has_passes ? num_state_slots(num_tokens, shape.num_seqs) * shape.num_heads * 2 * kStateInterval * head_dim *
                           int64_t{sizeof(float)}
                     : 0};
}

template <typename T>
cudaError_t run(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace, const Launch& launch) {
  return padded_head_dim(params) == 64 ? run_gated_delta_rule_bwd<T, 64>(params, workspace, launch)
                                       : run_gated_delta_rule_bwd<T, 128>(params, workspace, launch);
}

}  // namespace

int64_t gated_delta_rule_bwd_workspace(const GatedDeltaRuleBwdParams& params, const Launch& launch) {
  const BwdWorkspace workspace = plan_workspace(params, launch);
  return workspace.d_states_size + workspace.inverses_size + workspace.span_maps_size + workspace.group_sums_size;
}

Error gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const Launch& launch) {
  if (params.shape.head_dim > 128) {
    return "gated_delta_rule_bwd on CUDA supports head_dim (K) up to 128: its accumulators fill the register file";
  }
  if (params.dtype == DType::kFloat64) return "gated_delta_rule_bwd on CUDA supports float32, bfloat16 and float16";
  if (params.cu_seqlens != nullptr) {
    gated_delta_rule_bwd_padding_kernel<<<dim3(static_cast<unsigned>(params.shape.batch * params.shape.seqlen)), 128, 0,
                                          static_cast<cudaStream_t>(launch.stream)>>>(params);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return cudaGetErrorString(error);
  }
  const BwdWorkspace workspace = plan_workspace(params, launch);
  cudaError_t error = cudaSuccess;
  switch (params.dtype) {
    case DType::kBFloat16:
      error = run<__nv_bfloat16>(params, workspace, launch);
      break;
    case DType::kFloat16:
      error = run<__half>(params, workspace, launch);
      break;
    default:
      error = run<float>(params, workspace, launch);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace remora
