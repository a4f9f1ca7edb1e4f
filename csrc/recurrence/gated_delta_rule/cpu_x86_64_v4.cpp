#define REMORA_CPU_ISA x86_64_v4
#include "recurrence/gated_delta_rule/cpu_kernels.h"

namespace remora::x86_64_v4 {

const GatedDeltaRuleCpuKernels& gated_delta_rule_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return kKernels<Multiply<double>, double, double>;
    case DType::kBFloat16:
      return kKernels<Multiply<float>, BFloat16, BFloat16>;
    case DType::kFloat16:
      return kKernels<Multiply<float>, Float16, float>;
    default:
      return kKernels<Multiply<float>, float, float>;
  }
}

}  // namespace remora::x86_64_v4
