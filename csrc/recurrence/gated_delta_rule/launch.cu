// CUDA entry points of the forward pass and of the step; the backward pass has bwd_launch.cu.
#include "recurrence/gated_delta_rule/launch.h"

#include "recurrence/gated_delta_rule/combine_kernel.cuh"
#include "recurrence/gated_delta_rule/fwd_kernel.cuh"
#include "recurrence/gated_delta_rule/fwd_launch.cuh"
#include "recurrence/gated_delta_rule/heuristics.h"
#include "recurrence/step_launch.h"

namespace remora {
namespace {

constexpr int64_t kMaxCtas = INT32_MAX;

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

bool is_aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool is_aligned_16(const void* p, const TokenStrides& stride, int64_t element_size) {
  return is_aligned_16(p) && stride.batch * element_size % 16 == 0 && stride.token * element_size % 16 == 0 &&
         stride.head * element_size % 16 == 0;
}

template <typename T>
cudaError_t launch_fwd_pass_of(const FwdKernelParams& params, const FwdConfig& config, bool is_summary, bool is_aligned,
                               cudaStream_t stream) {
  const bool is_routed = params.op.rows != nullptr;
  const auto launch = config.head_dim == 64
                          ? (is_routed ? launch_fwd_pass<T, 64, true> : launch_fwd_pass<T, 64, false>)
                          : (is_routed ? launch_fwd_pass<T, 128, true> : launch_fwd_pass<T, 128, false>);
  return launch(params, config, is_summary, is_aligned, stream);
}

}  // namespace

cudaError_t launch_combine(const CombineParams& params, int64_t num_map_slots, cudaStream_t stream) {
  const RecurrenceShape& shape = params.shape;
  const int64_t num_ctas =
      num_map_slots * shape.num_value_heads * ((shape.value_dim + kCombineCols - 1) / kCombineCols);
  const auto kernel = gated_delta_rule_combine_kernel;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kCombineSmemSize);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(num_ctas), kCombineThreads, kCombineSmemSize, stream>>>(params);
  return cudaGetLastError();
}

int64_t gated_delta_rule_fwd_workspace(const GatedDeltaRuleFwdParams& params, const Launch& launch) {
  const FwdConfig config = plan_fwd(params.shape, params.dtype, launch.num_sms, launch.arch);
  return config.head_dim == 0 ? 0 : span_maps_size(params.shape, config.num_map_slots);
}

Error gated_delta_rule_fwd(const GatedDeltaRuleFwdParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const int64_t element_size = size_of(params.dtype);
  const FwdConfig config = plan_fwd(shape, params.dtype, launch.num_sms, launch.arch);
  if (config.head_dim == 0) return "gated_delta_rule_fwd on CUDA: head_dim must be at most 128, dtype not float64";
  if (std::max(config.num_output_ctas, config.num_summary_ctas) > kMaxCtas) {
    return "gated_delta_rule_fwd on CUDA: num_seqs * num_value_heads * ceil(value_dim / 64) is too large";
  }
  if (shape.seqlen > kNotCut) return "gated_delta_rule_fwd on CUDA: T must be below 2^31";
  if (shape.num_seqs == 0) {
    const int64_t num_elements = shape.batch * shape.seqlen * shape.num_value_heads * shape.value_dim;
    return message_of(cudaMemsetAsync(params.o, 0, num_elements * element_size, stream));
  }
  if (config.num_output_ctas == 0) return nullptr;

  FwdKernelParams kernel_params{
      .op = params,
      .num_v_tiles = config.num_v_tiles,
      .num_transition_tiles = config.num_transition_tiles,
      .num_stages = config.num_stages,
      .num_scratches = config.num_scratches,
      .maps = {config.span_tokens, static_cast<float*>(params.workspace)},
  };
  const bool is_aligned = is_aligned_16(params.q, params.q_stride, element_size) &&
                          is_aligned_16(params.k, params.k_stride, element_size) &&
                          is_aligned_16(params.v, params.v_stride, element_size) && is_aligned_16(params.o) &&
                          is_aligned_16(params.saved_states) && shape.head_dim * element_size % 16 == 0 &&
                          shape.value_dim * element_size % 16 == 0;
  const auto launch_pass = [&](bool is_summary) {
    switch (params.dtype) {
      case DType::kBFloat16:
        return launch_fwd_pass_of<__nv_bfloat16>(kernel_params, config, is_summary, is_aligned, stream);
      case DType::kFloat16:
        return launch_fwd_pass_of<__half>(kernel_params, config, is_summary, is_aligned, stream);
      default:
        return launch_fwd_pass_of<float>(kernel_params, config, is_summary, is_aligned, stream);
    }
  };
  if (config.num_map_slots > 0) {
    if (const cudaError_t error = launch_pass(true); error != cudaSuccess) return message_of(error);
    const CombineParams combine{shape, params.cu_seqlens, kernel_params.maps, false};
    if (const cudaError_t error = launch_combine(combine, config.num_map_slots, stream); error != cudaSuccess) {
      return message_of(error);
    }
  }
  return message_of(launch_pass(false));
}

Error gated_delta_rule_step(const GatedDeltaRuleStepParams& params, const Launch& launch) {
  return run_step(params, launch);
}

}  // namespace remora
