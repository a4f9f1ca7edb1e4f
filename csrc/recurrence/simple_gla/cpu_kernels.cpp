// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "recurrence/simple_gla/cpu_keys.h"
#include "recurrence/simple_gla/cpu_step.h"
#include "recurrence/simple_gla/cpu_values.h"

namespace remora::REMORA_CPU_ISA {
namespace {

using namespace simple_gla;

template <class T, class E, class Saved>
constexpr SimpleGlaCpuKernels kKernels = {
    values_scratch<T>,     fwd<T, E, Saved>, bwd_values<T, E>, keys_scratch<T>,
    bwd_keys<T, E, Saved>, step_scratch<T>,  step<T, E>,
};

}  // namespace

const SimpleGlaCpuKernels& simple_gla_kernels([[maybe_unused]] DType dtype) {
#ifdef __AVX512BF16__
  return kKernels<float, BFloat16, BFloat16>;
#else
  switch (dtype) {
    case DType::kFloat64:
      return kKernels<double, double, double>;
    case DType::kBFloat16:
      return kKernels<float, BFloat16, BFloat16>;
    case DType::kFloat16:
      return kKernels<float, Float16, float>;
    default:
      return kKernels<float, float, float>;
  }
#endif
}

}  // namespace remora::REMORA_CPU_ISA
