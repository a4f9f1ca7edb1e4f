// Element types as template arguments.
#pragma once
#include "common/cpu/simd.h"
#include "common/dtype.h"

namespace remora::REMORA_CPU_ISA {

/// What `of` returns for the type that a dtype is computed in, and that of its elements: of.operator()<T, E>().
template <class Of>
decltype(auto) with_element_types([[maybe_unused]] DType dtype, const Of& of) {
#if defined(__AVX512BF16__)
  // The build with bfloat16 instructions is asked for bfloat16 alone (isa.h).
  return of.template operator()<float, BFloat16>();
#else
  switch (dtype) {
    case DType::kFloat64:
      return of.template operator()<double, double>();
    case DType::kBFloat16:
      return of.template operator()<float, BFloat16>();
    case DType::kFloat16:
      return of.template operator()<float, Float16>();
    default:
      return of.template operator()<float, float>();
  }
#endif
}

}  // namespace remora::REMORA_CPU_ISA
