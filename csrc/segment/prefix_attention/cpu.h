// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "segment/prefix_attention/params.h"

namespace remora {

/// Rows and keys of a task. Multiples of every chunk of the micro-kernels.
constexpr int64_t kCpuBlockRows = 64, kCpuBlockKeys = 64;

struct PrefixAttentionCpuKernels {
  int64_t (*fwd_scratch)(const PrefixAttentionInputs&);  // bytes per thread
  /// Rows of slot `slot` (row_slots(kCpuBlockRows)) that read key head `kv_head`.
  void (*fwd)(const PrefixAttentionFwdParams&, int64_t slot, int64_t kv_head, void* scratch);

  /// Tokens [first, first + count) of the [B * T]: what of the gradients is a matter of one token. Writes the
  /// workspace.
  void (*bwd_tokens)(const PrefixAttentionBwdParams&, int64_t first, int64_t count);
  /// dsink of a head, from the workspace.
  void (*bwd_sink)(const PrefixAttentionBwdParams&, int64_t head);
  int64_t (*bwd_scratch)(const PrefixAttentionInputs&, int64_t num_keys);  // num_keys whose gradients are kept
  /// dq of the rows of a slot.
  void (*bwd_queries)(const PrefixAttentionBwdParams&, int64_t slot, int64_t kv_head, void* scratch);
  /// dk, dv and dbias of the keys of slot `slot` (key_slots(source, kCpuBlockKeys)).
  void (*bwd_keys)(const PrefixAttentionBwdParams&, int source, int64_t slot, int64_t kv_head, void* scratch);
  /// Both, of a whole sequence, in the same order of summation.
  void (*bwd_sequence)(const PrefixAttentionBwdParams&, int64_t seq_idx, int64_t kv_head, void* scratch);
};

REMORA_CPU_KERNELS(PrefixAttentionCpuKernels, prefix_attention_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
