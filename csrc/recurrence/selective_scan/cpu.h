// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "recurrence/selective_scan/params.h"

namespace remora {

struct SelectiveScanCpuKernels {
  int64_t (*fwd_scratch)(const SelectiveScanShape&);  // bytes per thread
  void (*fwd)(const SelectiveScanFwdParams&, int64_t seq_idx, int64_t channel_block, void* scratch);
  int64_t (*bwd_scratch)(const SelectiveScanShape&);
  /// Leaves the shares of dB, dC [B * T, N] of its channels, and of dA, dskip, ddelta_bias of its sequence, in the
  /// workspace.
  void (*bwd)(const SelectiveScanBwdParams&, int64_t seq_idx, int64_t channel_block, void* scratch);
  void (*reduce_tokens)(const SelectiveScanBwdParams&, int64_t first_token, int64_t num_tokens);
  void (*reduce_sequences)(const SelectiveScanBwdParams&, int64_t channel_block);
  void (*step)(const SelectiveScanStepParams&, int64_t seq_idx, int64_t channel_block, void* scratch);
};

REMORA_CPU_KERNELS(SelectiveScanCpuKernels, selective_scan_kernels)  // defined by cpu_kernels.cpp

/// Shares of the gradients in the workspace of the backward pass, of which `element` bytes make a number.
struct SelectiveScanShares {
  int64_t tokens, states, channels, sequences, element;

  explicit SelectiveScanShares(const SelectiveScanInputs& in)
      : tokens(in.shape.sequences.batch * in.shape.sequences.seqlen),
        states(in.shape.state_dim),
        channels(in.shape.num_channels),
        sequences(in.shape.sequences.num_seqs),
        element(size_of(in.state_dtype)) {}

  int64_t token_share() const { return tokens * states; }             // of dB or dC, per channel block
  int64_t sequence_share() const { return channels * (states + 2); }  // of dA, dskip and ddelta_bias, per sequence
  int64_t bytes(int64_t channel_blocks) const {
    return (2 * channel_blocks * token_share() + sequences * sequence_share()) * element;
  }
};

}  // namespace remora
