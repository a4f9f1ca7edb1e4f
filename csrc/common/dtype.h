// Element types as run-time values; kernels turn them into template arguments in launch.cu and cpu.cpp.
#pragma once
#include <cstdint>

namespace remora {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace remora
