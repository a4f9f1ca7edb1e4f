// Backward pass of the gated delta rule: state kernel, then chunk kernel.
#include "recurrence/gated_delta_rule/bwd_launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

BwdWorkspace plan_workspace(const GatedDeltaRuleBwdParams& params) {
  const RecurrenceShape& shape = params.shape;
  const int64_t block_t = params.dtype == DType::kFloat32 ? 32 : 64;
  const int64_t head_dim = padded_head_dim(params);
  const int64_t num_slots = shape.batch * shape.seqlen / block_t + shape.num_seqs;
  const int64_t d_states_size =
      num_slots * shape.num_value_heads * shape.value_dim * head_dim * size_of(params.saved_dtype);
  const bool has_groups = shape.num_value_heads > shape.num_heads;
  return {num_slots, (d_states_size + 255) / 256 * 256,
          has_groups ? num_slots * shape.num_heads * 2 * block_t * head_dim * int64_t{sizeof(float)} : 0};
}

template <typename T>
cudaError_t run(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace, const Launch& launch) {
  return padded_head_dim(params) == 64 ? run_gated_delta_rule_bwd<T, 64>(params, workspace, launch)
                                       : run_gated_delta_rule_bwd<T, 128>(params, workspace, launch);
}

}  // namespace

int64_t gated_delta_rule_bwd_workspace(const GatedDeltaRuleBwdParams& params, const Launch&) {
  const BwdWorkspace workspace = plan_workspace(params);
  return workspace.d_states_size + workspace.group_sums_size;
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
  const BwdWorkspace workspace = plan_workspace(params);
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
