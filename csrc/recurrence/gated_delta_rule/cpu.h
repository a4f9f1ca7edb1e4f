// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "recurrence/gated_delta_rule/params.h"

namespace remora {

struct GatedDeltaRuleSequence {
  int64_t index;   // n
  int64_t batch;   // row of the batch that holds it
  int64_t begin;   // its first token there
  int64_t length;  // tokens

  /// Row of the token in a [B * T, ...] view.
  int64_t row(const GatedDeltaRuleShape& shape, int64_t token) const { return batch * shape.seqlen + begin + token; }

  /// First slot of saved_states.
  int64_t first_slot(const GatedDeltaRuleShape& shape) const { return row(shape, 0) / kStateInterval + index; }
};

/// A value head's columns [begin, end) in units of kGatedDeltaRuleColumns.
struct GatedDeltaRuleColumns {
  int64_t begin, end;
};
constexpr int64_t kGatedDeltaRuleColumns = 16;

struct GatedDeltaRuleCpuKernels {
  int64_t (*fwd_scratch)(const GatedDeltaRuleShape&);  // bytes per thread
  void (*fwd)(const GatedDeltaRuleFwdParams&, const GatedDeltaRuleSequence&, int64_t value_head, GatedDeltaRuleColumns,
              void* scratch);
  int64_t (*bwd_scratch)(const GatedDeltaRuleShape&);
  void (*bwd)(const GatedDeltaRuleBwdParams&, const GatedDeltaRuleSequence&, int64_t head, void* scratch);
  int64_t (*step_scratch)(const GatedDeltaRuleShape&);
  void (*step)(const GatedDeltaRuleStepParams&, const GatedDeltaRuleSequence&, int64_t value_head, int64_t slot,
               void* scratch);
};

// One definition per file cpu_<isa>.cpp.
#define REMORA_DECLARE_KERNELS(isa)                                      \
  namespace isa {                                                        \
  const GatedDeltaRuleCpuKernels& gated_delta_rule_kernels(DType dtype); \
  }
REMORA_DECLARE_KERNELS(baseline)
REMORA_DECLARE_KERNELS(x86_64_v3)
REMORA_DECLARE_KERNELS(x86_64_v4)
REMORA_DECLARE_KERNELS(x86_64_v4_bf16)
#undef REMORA_DECLARE_KERNELS

}  // namespace remora
