// Reductions and scans over the lanes of a warp, in a fixed order.
#pragma once
#include <cstdint>

namespace remora {

constexpr uint32_t kFullWarp = 0xffffffffu;

/// threadIdx.x, read anew at every call: for rare code, where keeping what follows from it would cost registers.
__device__ __forceinline__ int read_thread_idx() {
  int thread_idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_idx));
  return thread_idx;
}

/// Sum over groups of kLanes neighbouring lanes; every lane gets it.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

template <int kLanes = 32>
__device__ __forceinline__ int warp_min(int x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = min(x, __shfl_xor_sync(kFullWarp, x, mask));
  return x;
}

template <int kLanes = 32>
__device__ __forceinline__ int warp_max(int x) {
  return -warp_min<kLanes>(-x);
}

/// Sum over this lane and the lanes below it. Lane l never sees the values of lanes above l.
__device__ __forceinline__ float warp_inclusive_sum(float x) {
  const int lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const float below = __shfl_up_sync(kFullWarp, x, delta);
    x = lane_idx >= delta ? x + below : x;
  }
  return x;
}

}  // namespace remora
