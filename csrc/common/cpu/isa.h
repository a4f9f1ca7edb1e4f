// Which build of the CPU kernels this machine runs; the names are those of cmake/CpuIsa.cmake.
#pragma once

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
