// The kernels of the instruction set REMORA_CPU_ISA, for the file cpu_<isa>.cpp that includes this.
#pragma once
#include "recurrence/gated_delta_rule/cpu_bwd.h"
#include "recurrence/gated_delta_rule/cpu_fwd.h"
#include "recurrence/gated_delta_rule/cpu_step.h"

namespace remora::REMORA_CPU_ISA {

template <class Op, class E, class Saved>
constexpr GatedDeltaRuleCpuKernels kKernels = {
    fwd_scratch<Op, E>,
    fwd<Op, E, Saved>,
    bwd_scratch<Op, E>,
    bwd<Op, E, Saved>,
    step_scratch<typename Op::Real>,
    step<typename Op::Real, E>,
};

}  // namespace remora::REMORA_CPU_ISA
