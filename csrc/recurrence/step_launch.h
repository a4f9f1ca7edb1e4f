// What the step of every operator of the family does before its kernel (step_kernel.cuh) starts.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/dtype.h"
#include "common/launch.h"
#include "recurrence/shape.h"

namespace remora {

constexpr int kStepBlockV = 32;  // columns of V of a CTA

inline int64_t num_step_tiles(const RecurrenceShape& shape) {
  return (shape.value_dim + kStepBlockV - 1) / kStepBlockV;
}

/// Instantiated by step_*.cu of the operator.
template <typename T, class Params>
cudaError_t launch_step(const Params& params, cudaStream_t stream);

template <class Params>
Error run_step(const Params& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto message_of = [](cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); };
  if (params.dtype == DType::kFloat64 || shape.head_dim > 256) {
    return "a recurrent step on CUDA: head_dim must be at most 256, dtype not float64";
  }
  if (shape.num_seqs == 0) {
    const int64_t num_elements = shape.batch * shape.seqlen * shape.num_value_heads * shape.value_dim;
    return message_of(cudaMemsetAsync(params.o, 0, num_elements * size_of(params.dtype), stream));
  }
  const int64_t num_ctas = shape.num_seqs * shape.num_value_heads * num_step_tiles(shape);
  if (num_ctas == 0) return nullptr;
  if (num_ctas > INT32_MAX) {
    return "a recurrent step on CUDA: num_seqs * num_value_heads * ceil(value_dim / 32) is too large";
  }
  switch (params.dtype) {
    case DType::kBFloat16:
      return message_of(launch_step<__nv_bfloat16>(params, stream));
    case DType::kFloat16:
      return message_of(launch_step<__half>(params, stream));
    default:
      return message_of(launch_step<float>(params, stream));
  }
}

}  // namespace remora
