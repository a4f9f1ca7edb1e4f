// Elementary functions of the device that CUDA offers only through assembly.
#pragma once

namespace remora {

/// 2^x to about 2^-22; results below 2^-126 become zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x to about 2^-23.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// To about 2^-21.
__device__ __forceinline__ float sigmoid(float x) { return rcp_approx(1.f + exp2_approx(-1.4426950408889634f * x)); }

}  // namespace remora
