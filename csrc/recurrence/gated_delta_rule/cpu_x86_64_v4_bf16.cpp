// Only the kernels that use bf16 dot products: dtype is kBFloat16.
#define REMORA_CPU_ISA x86_64_v4_bf16
#include "recurrence/gated_delta_rule/cpu_kernels.h"

namespace remora::x86_64_v4_bf16 {

const GatedDeltaRuleCpuKernels& gated_delta_rule_kernels(DType) { return kKernels<DotBFloat16, BFloat16, BFloat16>; }

}  // namespace remora::x86_64_v4_bf16
