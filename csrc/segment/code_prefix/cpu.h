// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "segment/code_prefix/params.h"

namespace remora {

/// Channels of a task: the sums of its codes stay in L2.
constexpr int64_t kCodePrefixChannels = 64;

struct CodePrefixCpuKernels {
  int64_t (*scratch)(const CodePrefixShape&);  // bytes per thread
  void (*fwd)(const CodePrefixFwdParams&, int64_t row, int64_t channel_block, void* scratch);
  void (*bwd)(const CodePrefixBwdParams&, int64_t row, int64_t channel_block, void* scratch);
};

REMORA_CPU_KERNELS(CodePrefixCpuKernels, code_prefix_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
