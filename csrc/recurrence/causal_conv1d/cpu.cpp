// Hands the tasks of the causal convolution to threads.
#include "recurrence/causal_conv1d/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "recurrence/causal_conv1d/launch.h"
#include "recurrence/cpu_sequence.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of causal_conv1d";

/// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t num_token_blocks(const CausalConv1dShape& shape) {
  return ceil_div(shape.sequences.batch * shape.sequences.seqlen, kConvBlockTokens);
}
int64_t num_channel_blocks(const CausalConv1dShape& shape) { return ceil_div(shape.num_channels, kConvBlockChannels); }

}  // namespace

Error causal_conv1d_fwd(const CausalConv1dFwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const CausalConv1dFwdParams params = with_rising_offsets(given, given.shape.sequences, offsets);
  const CausalConv1dCpuKernels& kernels = causal_conv1d_kernels(params.dtype);
  const int64_t channel_blocks = num_channel_blocks(params.shape), scratch_bytes = kernels.fwd_scratch(params.shape);
  bool ok = run_tasks(
      launch.parallel_for, num_token_blocks(params.shape) * channel_blocks,
      kMinElementsPerThread / (kConvBlockTokens * kConvBlockChannels), scratch_bytes,
      [&](int64_t task, void* scratch) { kernels.fwd(params, task / channel_blocks, task % channel_blocks, scratch); });
  if (params.final_state) {
    ok &= run_tasks(launch.parallel_for, params.shape.sequences.num_seqs,
                    std::max<int64_t>(1, kMinElementsPerThread / (params.shape.num_channels * params.shape.width)), 64,
                    [&](int64_t seq_idx, void*) { kernels.final_state(params, seq_idx); });
  }
  return ok ? nullptr : kNoMemory;
}

int64_t causal_conv1d_bwd_workspace(const CausalConv1dBwdParams& params) {
  return num_token_blocks(params.shape) * (params.shape.width + 1) * params.shape.num_channels *
         (params.dtype == DType::kFloat64 ? 8 : 4);
}

Error causal_conv1d_bwd(const CausalConv1dBwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const CausalConv1dBwdParams params = with_rising_offsets(given, given.shape.sequences, offsets);
  const CausalConv1dCpuKernels& kernels = causal_conv1d_kernels(params.dtype);
  const int64_t channel_blocks = num_channel_blocks(params.shape), scratch_bytes = kernels.bwd_scratch(params.shape);
  bool ok = run_tasks(
      launch.parallel_for, num_token_blocks(params.shape) * channel_blocks,
      kMinElementsPerThread / (kConvBlockTokens * kConvBlockChannels), scratch_bytes,
      [&](int64_t task, void* scratch) { kernels.bwd(params, task / channel_blocks, task % channel_blocks, scratch); });
  ok &= run_tasks(launch.parallel_for, channel_blocks, 1, 64,
                  [&](int64_t channel_block, void*) { kernels.reduce(params, channel_block); });
  if (params.d_initial_state) {
    ok &= run_tasks(launch.parallel_for, params.shape.sequences.num_seqs * channel_blocks,
                    kMinElementsPerThread / (kConvBlockChannels * kConvMaxWidth), scratch_bytes,
                    [&](int64_t task, void* scratch) {
                      kernels.bwd_state(params, task / channel_blocks, task % channel_blocks, scratch);
                    });
  }
  return ok ? nullptr : kNoMemory;
}

Error causal_conv1d_step(const CausalConv1dStepParams& params, const Launch& launch) {
  const CausalConv1dCpuKernels& kernels = causal_conv1d_kernels(params.dtype);
  const bool ok =
      run_tasks(launch.parallel_for, params.shape.sequences.num_seqs,
                std::max<int64_t>(1, kMinElementsPerThread / (params.shape.num_channels * params.shape.width)),
                kernels.fwd_scratch(params.shape),
                [&](int64_t seq_idx, void* scratch) { kernels.step(params, seq_idx, scratch); });
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
