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

/// Part `index` of `count` of a sequence: intervals of kStateInterval tokens.
struct GatedDeltaRulePart {
  int64_t index, count;

  constexpr int64_t begin(int64_t intervals) const { return intervals * index / count; }
  constexpr int64_t end(int64_t intervals) const { return intervals * (index + 1) / count; }
};

struct GatedDeltaRuleCpuKernels {
  int64_t (*fwd_scratch)(const RecurrenceShape&);  // bytes per thread
  void (*fwd)(const GatedDeltaRuleFwdParams&, const RecurrenceSequence&, int64_t value_head, GatedDeltaRuleColumns,
              void* scratch);
  int64_t (*bwd_cuts_scratch)(const RecurrenceShape&);
  void (*bwd_cuts)(const GatedDeltaRuleBwdParams&, const RecurrenceSequence&, int64_t value_head, GatedDeltaRuleColumns,
                   int64_t parts, void* d_states, void* scratch);  // d_states: [parts - 1, HV, K, V], one a cut
  int64_t (*bwd_scratch)(const RecurrenceShape&);
  void (*bwd)(const GatedDeltaRuleBwdParams&, const RecurrenceSequence&, int64_t head, GatedDeltaRulePart,
              const void* d_state, void* scratch);  // d_state: [HV, K, V] of the cut behind the part; not of the last
  int64_t (*step_scratch)(const RecurrenceShape&);
  void (*step)(const GatedDeltaRuleStepParams&, const RecurrenceSequence&, int64_t value_head, int64_t slot,
               void* scratch);
};

REMORA_CPU_KERNELS(GatedDeltaRuleCpuKernels, gated_delta_rule_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
