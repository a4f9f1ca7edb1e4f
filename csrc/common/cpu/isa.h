// Which build of the CPU kernels this machine runs; the names are those of cmake/CpuIsa.cmake.
#pragma once
#include "common/dtype.h"

namespace remora::cpu {

enum class Isa { baseline, x86_64_v3, x86_64_v4, x86_64_v4_bf16 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::x86_64_v4_bf16 : Isa::x86_64_v4;
  }
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::x86_64_v3;
#endif
  return Isa::baseline;
}

inline const char* isa_name() {
  switch (detect_isa()) {
    case Isa::x86_64_v4_bf16:
      return "x86-64-v4 with bfloat16 dot products";
    case Isa::x86_64_v4:
      return "x86-64-v4";
    case Isa::x86_64_v3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

}  // namespace remora::cpu

// Declares what the object of every instruction set defines, `const Kernels& get(DType)` in its namespace, and the
// function of the same name that calls the best of them for this machine.
#if defined(__x86_64__)
#define REMORA_CPU_KERNELS(Kernels, get)                                                       \
  namespace baseline {                                                                         \
  const Kernels& get(DType dtype);                                                             \
  }                                                                                            \
  namespace x86_64_v3 {                                                                        \
  const Kernels& get(DType dtype);                                                             \
  }                                                                                            \
  namespace x86_64_v4 {                                                                        \
  const Kernels& get(DType dtype);                                                             \
  }                                                                                            \
  namespace x86_64_v4_bf16 {                                                                   \
  const Kernels& get(DType dtype);                                                             \
  }                                                                                            \
  inline const Kernels& get(DType dtype) {                                                     \
    static const cpu::Isa isa = cpu::detect_isa();                                             \
    switch (isa) {                                                                             \
      case cpu::Isa::x86_64_v4_bf16:                                                           \
        return dtype == DType::kBFloat16 ? x86_64_v4_bf16::get(dtype) : x86_64_v4::get(dtype); \
      case cpu::Isa::x86_64_v4:                                                                \
        return x86_64_v4::get(dtype);                                                          \
      case cpu::Isa::x86_64_v3:                                                                \
        return x86_64_v3::get(dtype);                                                          \
      default:                                                                                 \
        return baseline::get(dtype);                                                           \
    }                                                                                          \
  }
#else
#define REMORA_CPU_KERNELS(Kernels, get) \
  namespace baseline {                   \
  const Kernels& get(DType dtype);       \
  }                                      \
  using baseline::get;
#endif
