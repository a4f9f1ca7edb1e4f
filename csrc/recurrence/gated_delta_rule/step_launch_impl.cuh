// Definition of launch_step, included by the files that instantiate it.
#pragma once
#include "recurrence/gated_delta_rule/step_kernel.cuh"
#include "recurrence/gated_delta_rule/step_launch.cuh"

namespace remora {

template <typename T>
cudaError_t launch_step(const StepKernelParams& params, cudaStream_t stream) {
  const RecurrenceShape& shape = params.op.shape;
  const int64_t num_ctas = shape.num_seqs * shape.num_value_heads * params.num_v_tiles;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(num_ctas), kStepThreads, 0, stream>>>(params);
    return cudaGetLastError();
  };
  const bool v_first = params.op.state_v_first;
  if (shape.head_dim <= 64) {
    return launch(v_first ? gated_delta_rule_step_kernel<T, 64, true> : gated_delta_rule_step_kernel<T, 64, false>);
  }
  if (shape.head_dim <= 128) {
    return launch(v_first ? gated_delta_rule_step_kernel<T, 128, true> : gated_delta_rule_step_kernel<T, 128, false>);
  }
  return launch(v_first ? gated_delta_rule_step_kernel<T, 256, true> : gated_delta_rule_step_kernel<T, 256, false>);
}

}  // namespace remora
