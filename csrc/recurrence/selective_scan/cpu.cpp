// Hands the tasks of the selective scan to threads.
#include "recurrence/selective_scan/cpu.h"

#include <algorithm>
#include <cstring>

#include "common/cpu/tasks.h"
#include "recurrence/cpu_sequence.h"
#include "recurrence/selective_scan/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of selective_scan";

/// Below this many states updated a second thread costs more than it saves.
constexpr int64_t kMinUpdatesPerThread = 1 << 14;

int64_t grain(const SelectiveScanShape& shape, int64_t tokens) {
  return std::max<int64_t>(1, kMinUpdatesPerThread / std::max<int64_t>(1, tokens * kScanChannels * shape.state_dim));
}

/// Tokens outside every sequence have zero outputs.
void clear(const SelectiveScanInputs& in, void* data) {
  const RecurrenceShape& shape = in.shape.sequences;
  if (data && in.cu_seqlens)
    std::memset(data, 0, shape.batch * shape.seqlen * in.shape.num_channels * size_of(in.dtype));
}

template <class Body>
bool for_each_block(const SelectiveScanInputs& in, const Launch& launch, int64_t scratch_bytes, const Body& body) {
  const RecurrenceShape& sequences = in.shape.sequences;
  const SequenceTasks tasks(sequences, in.cu_seqlens, nullptr, in.shape.num_channel_blocks(), 1);
  return run_tasks(launch.parallel_for, tasks.count(),
                   grain(in.shape, sequences.batch * sequences.seqlen / std::max<int64_t>(1, sequences.num_seqs)),
                   scratch_bytes, [&](int64_t i, void* scratch) {
                     const SequenceTask task = tasks[i];
                     body(task.sequence.index, task.head, scratch);
                   });
}

}  // namespace

int64_t selective_scan_fwd_workspace(const SelectiveScanFwdParams&) { return 0; }

Error selective_scan_fwd(const SelectiveScanFwdParams& params, const Launch& launch) {
  const SelectiveScanCpuKernels& kernels = selective_scan_kernels(params.in.dtype);
  clear(params.in, params.out);
  const bool ok = for_each_block(params.in, launch, kernels.fwd_scratch(params.in.shape),
                                 [&](int64_t seq_idx, int64_t channel_block, void* scratch) {
                                   kernels.fwd(params, seq_idx, channel_block, scratch);
                                 });
  return ok ? nullptr : kNoMemory;
}

int64_t selective_scan_bwd_workspace(const SelectiveScanBwdParams& params) {
  return SelectiveScanShares(params.in).bytes(params.in.shape.num_channel_blocks());
}

Error selective_scan_bwd(const SelectiveScanBwdParams& params, const Launch& launch) {
  const SelectiveScanCpuKernels& kernels = selective_scan_kernels(params.in.dtype);
  const SelectiveScanShares shares(params.in);
  for (void* const data : {params.du, params.ddelta, params.dz}) clear(params.in, data);
  const int64_t channel_blocks = params.in.shape.num_channel_blocks();
  if (params.in.cu_seqlens)
    std::memset(params.workspace, 0, 2 * channel_blocks * shares.token_share() * shares.element);
  bool ok = for_each_block(params.in, launch, kernels.bwd_scratch(params.in.shape),
                           [&](int64_t seq_idx, int64_t channel_block, void* scratch) {
                             kernels.bwd(params, seq_idx, channel_block, scratch);
                           });
  constexpr int64_t kReduceTokens = 64;
  ok &=
      run_tasks(launch.parallel_for, (shares.tokens + kReduceTokens - 1) / kReduceTokens, 1, 64, [&](int64_t i, void*) {
        const int64_t first = i * kReduceTokens;
        kernels.reduce_tokens(params, first, std::min(kReduceTokens, shares.tokens - first));
      });
  ok &= run_tasks(launch.parallel_for, channel_blocks, 1, 64,
                  [&](int64_t channel_block, void*) { kernels.reduce_sequences(params, channel_block); });
  return ok ? nullptr : kNoMemory;
}

Error selective_scan_step(const SelectiveScanStepParams& params, const Launch& launch) {
  const SelectiveScanCpuKernels& kernels = selective_scan_kernels(params.in.dtype);
  const int64_t channel_blocks = params.in.shape.num_channel_blocks();
  const bool ok =
      run_tasks(launch.parallel_for, params.in.shape.sequences.num_seqs * channel_blocks, grain(params.in.shape, 1),
                kernels.fwd_scratch(params.in.shape), [&](int64_t task, void* scratch) {
                  kernels.step(params, task / channel_blocks, task % channel_blocks, scratch);
                });
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
