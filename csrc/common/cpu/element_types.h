// Element types as template arguments.
#pragma once
#include "common/cpu/simd.h"
#include "common/dtype.h"

namespace remora::REMORA_CPU_ISA {

/// What `of` returns for the type that a dtype is computed in, and that of its elements: of.operator()<T, E>().
template <class Of>
decltype(auto) with_element_types(DType dtype, const Of& of) {
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
}

}  // namespace remora::REMORA_CPU_ISA
