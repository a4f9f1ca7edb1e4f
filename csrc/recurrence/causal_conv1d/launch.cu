// CUDA entry points of the causal convolution.
#include "recurrence/causal_conv1d/launch.h"

#include <initializer_list>
#include <type_traits>

#include "recurrence/causal_conv1d/kernels.cuh"

namespace remora {
namespace {

constexpr Error kNoFloat64 = "causal_conv1d on CUDA supports float32, bfloat16 and float16";

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t num_token_blocks(const CausalConv1dShape& shape, int block_tokens) {
  return ceil_div(shape.sequences.batch * shape.sequences.seqlen, block_tokens);
}

bool is_aligned(const void* pointer, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

/// What all launches of a call share: VECTOR channels a thread.
template <int VECTOR>
struct ConvLaunch {
  int64_t num_channel_blocks;
  cudaStream_t stream;

  template <class Params>
  ConvLaunch(const Params& p, const Launch& launch)
      : num_channel_blocks(ceil_div(p.shape.num_channels, kConvThreads * VECTOR)),
        stream(static_cast<cudaStream_t>(launch.stream)) {}

  template <class Kernel, class Params>
  Error operator()(Kernel kernel, int64_t num_blocks, const Params& params) const {
    if (num_blocks * num_channel_blocks > INT32_MAX) return "causal_conv1d on CUDA: too many tokens and channels";
    kernel<<<static_cast<unsigned>(num_blocks * num_channel_blocks), kConvThreads, 0, stream>>>(params,
                                                                                                num_channel_blocks);
    return message_of(cudaGetLastError());
  }
};

/// run(std::integral_constant<int, VECTOR>) with as many channels a thread as x and the contiguous tensors allow.
template <class Params, class Run>
Error with_vector(const Params& p, std::initializer_list<const void*> contiguous, Run run) {
  bool aligned = is_aligned(p.x, (p.x_stride.batch | p.x_stride.token) * size_of(p.dtype));
  for (const void* tensor : contiguous) aligned &= is_aligned(tensor, p.shape.num_channels * size_of(p.dtype));
  return aligned ? run(std::integral_constant<int, 4>()) : run(std::integral_constant<int, 1>());
}

template <typename T>
Error fwd(const CausalConv1dFwdParams& params, const Launch& launch) {
  return with_vector(params, {params.initial_state, params.y, params.final_state}, [&](auto vector) -> Error {
    const ConvLaunch<vector> run(params, launch);
    const int64_t num_blocks = num_token_blocks(params.shape, kConvFwdTokens);
    const auto kernel =
        params.shape.width <= 4 ? causal_conv1d_fwd_kernel<T, 4, vector> : causal_conv1d_fwd_kernel<T, 8, vector>;
    if (const Error error = run(kernel, num_blocks, params)) return error;
    if (params.final_state == nullptr) return nullptr;
    return run(causal_conv1d_final_state_kernel<T, vector>, params.shape.sequences.num_seqs, params);
  });
}

template <typename T>
Error bwd(const CausalConv1dBwdParams& params, const Launch& launch) {
  const std::initializer_list<const void*> contiguous = {params.initial_state, params.d_y, params.d_final_state,
                                                         params.dx, params.d_initial_state};
  return with_vector(params, contiguous, [&](auto vector) -> Error {
    const ConvLaunch<vector> run(params, launch);
    const int64_t num_blocks = num_token_blocks(params.shape, kConvBwdTokens);
    const auto kernel =
        params.shape.width <= 4 ? causal_conv1d_bwd_kernel<T, 4, vector> : causal_conv1d_bwd_kernel<T, 8, vector>;
    if (const Error error = run(kernel, num_blocks, params)) return error;
    const int64_t num_reduce_ctas = ceil_div(params.shape.num_channels, kConvReduceChannels) * (params.shape.width + 1);
    causal_conv1d_reduce_kernel<<<static_cast<unsigned>(num_reduce_ctas), kConvReduceChannels * kConvReduceParts, 0,
                                  run.stream>>>(params, num_blocks);
    if (const Error error = message_of(cudaGetLastError())) return error;
    if (params.d_initial_state == nullptr) return nullptr;
    return run(causal_conv1d_bwd_state_kernel<T, vector>, params.shape.sequences.num_seqs, params);
  });
}

template <typename T>
Error step(const CausalConv1dStepParams& params, const Launch& launch) {
  return with_vector(params, {params.state, params.y}, [&](auto vector) -> Error {
    return ConvLaunch<vector>(params, launch)(causal_conv1d_step_kernel<T, vector>, params.shape.sequences.num_seqs,
                                              params);
  });
}

template <class Params, class Bf16, class Fp16, class Fp32>
Error dispatch(const Params& params, const Launch& launch, Bf16 bf16, Fp16 fp16, Fp32 fp32) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return bf16(params, launch);
    case DType::kFloat16:
      return fp16(params, launch);
    case DType::kFloat32:
      return fp32(params, launch);
    default:
      return kNoFloat64;
  }
}

}  // namespace

Error causal_conv1d_fwd(const CausalConv1dFwdParams& params, const Launch& launch) {
  return dispatch(params, launch, fwd<__nv_bfloat16>, fwd<__half>, fwd<float>);
}

int64_t causal_conv1d_bwd_workspace(const CausalConv1dBwdParams& params) {
  return num_token_blocks(params.shape, kConvBwdTokens) * (params.shape.width + 1) * params.shape.num_channels *
         int64_t{sizeof(float)};
}

Error causal_conv1d_bwd(const CausalConv1dBwdParams& params, const Launch& launch) {
  return dispatch(params, launch, bwd<__nv_bfloat16>, bwd<__half>, bwd<float>);
}

Error causal_conv1d_step(const CausalConv1dStepParams& params, const Launch& launch) {
  return dispatch(params, launch, step<__nv_bfloat16>, step<__half>, step<float>);
}

}  // namespace remora
