// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "recurrence/gated_delta_rule/cpu_bwd.h"
#include "recurrence/gated_delta_rule/cpu_fwd.h"
#include "recurrence/gated_delta_rule/cpu_step.h"

namespace remora::REMORA_CPU_ISA {
namespace {

template <class Op, class E, class Saved>
constexpr GatedDeltaRuleCpuKernels kKernels = {
    walk_scratch<Op, E>,
    fwd<Op, E, Saved>,
    walk_scratch<Op, E>,
    bwd_cuts<Op, E>,
    bwd_scratch<Op, E>,
    bwd<Op, E, Saved>,
    step_scratch<typename Op::Real>,
    step<typename Op::Real, E>,
};

}  // namespace

const GatedDeltaRuleCpuKernels& gated_delta_rule_kernels([[maybe_unused]] DType dtype) {
#ifdef __AVX512BF16__
  return kKernels<DotBFloat16, BFloat16, BFloat16>;
#else
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
#endif
}

}  // namespace remora::REMORA_CPU_ISA
