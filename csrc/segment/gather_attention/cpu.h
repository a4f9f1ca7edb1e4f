// The kernels of one instruction set, as cpu.cpp calls them.
#pragma once
#include "common/cpu/isa.h"
#include "segment/gather_attention/params.h"

namespace remora {

struct GatherAttentionCpuKernels {
  int64_t (*query_scratch)(const GatherAttentionInputs&);  // bytes of a thread
  int64_t (*keys_scratch)(const GatherAttentionInputs&);   // bytes of a thread
  int64_t (*workspace)(const GatherAttentionBwdParams&);   // bytes: what a softmax subtracts in the backward pass
  void (*fwd)(const GatherAttentionFwdParams&, int64_t b, int64_t t, int64_t unit, void* scratch);
  void (*bwd_query)(const GatherAttentionBwdParams&, int64_t b, int64_t t, int64_t unit, void* scratch);
  void (*bwd_keys)(const GatherAttentionBwdParams&, int64_t segment, int64_t of_row, void* scratch);
};

REMORA_CPU_KERNELS(GatherAttentionCpuKernels, gather_attention_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
