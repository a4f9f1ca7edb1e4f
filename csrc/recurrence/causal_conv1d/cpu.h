// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "recurrence/causal_conv1d/params.h"

namespace remora {

/// Packed positions (tokens) and channels of one task of the forward and the backward pass. The cut depends on the
/// sizes of the call alone, so the sums over tokens do not depend on the number of threads.
constexpr int64_t kConvBlockTokens = 256;
constexpr int64_t kConvBlockChannels = 64;

struct CausalConv1dCpuKernels {
  int64_t (*fwd_scratch)(const CausalConv1dShape&);  // bytes per thread
  void (*fwd)(const CausalConv1dFwdParams&, int64_t token_block, int64_t channel_block, void* scratch);
  void (*final_state)(const CausalConv1dFwdParams&, int64_t seq_idx);
  int64_t (*bwd_scratch)(const CausalConv1dShape&);
  /// Leaves the block's share of dweight [W, D] and dbias [D] in row `token_block` of the workspace.
  void (*bwd)(const CausalConv1dBwdParams&, int64_t token_block, int64_t channel_block, void* scratch);
  void (*bwd_state)(const CausalConv1dBwdParams&, int64_t seq_idx, int64_t channel_block, void* scratch);
  void (*reduce)(const CausalConv1dBwdParams&, int64_t channel_block);
  void (*step)(const CausalConv1dStepParams&, int64_t seq_idx, void* scratch);
};

REMORA_CPU_KERNELS(CausalConv1dCpuKernels, causal_conv1d_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
