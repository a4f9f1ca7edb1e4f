// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "recurrence/cpu_sequence.h"
#include "recurrence/gated_delta_rule/params.h"

namespace remora {

/// A value head's columns [begin, end) in units of kGatedDeltaRuleColumns.
struct GatedDeltaRuleColumns {
  int64_t begin, end;
};
constexpr int64_t kGatedDeltaRuleColumns = 16;

struct GatedDeltaRuleCpuKernels {
  int64_t (*fwd_scratch)(const RecurrenceShape&);  // bytes per thread
  void (*fwd)(const GatedDeltaRuleFwdParams&, const RecurrenceSequence&, int64_t value_head, GatedDeltaRuleColumns,
              void* scratch);
  int64_t (*bwd_scratch)(const RecurrenceShape&);
  void (*bwd)(const GatedDeltaRuleBwdParams&, const RecurrenceSequence&, int64_t head, void* scratch);
  int64_t (*step_scratch)(const RecurrenceShape&);
  void (*step)(const GatedDeltaRuleStepParams&, const RecurrenceSequence&, int64_t value_head, int64_t slot,
               void* scratch);
};

REMORA_CPU_KERNELS(GatedDeltaRuleCpuKernels, gated_delta_rule_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
