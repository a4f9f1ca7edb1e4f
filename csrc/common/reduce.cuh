// Reductions and scans over the lanes of a warp, in a fixed order.
#pragma once
#include <cstdint>

namespace remora {

constexpr uint32_t kFullWarp = 0xffffffffu;

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

/// Largest over groups of kLanes neighbouring lanes; NaN only if all are.
template <int kLanes = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
  return x;
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

/// Sum over the threads of the block below this one; `sum` becomes that over all of them. smem_sums [kThreads / 32].
template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int x, int* smem_sums, int& sum) {
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  int inclusive = x;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = __shfl_up_sync(kFullWarp, inclusive, delta);
    inclusive += lane_idx >= delta ? below : 0;
  }
  __syncthreads();
  if (lane_idx == 31) smem_sums[warp_idx] = inclusive;
  __syncthreads();
  int before = 0;
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    before += warp < warp_idx ? smem_sums[warp] : 0;
    sum += smem_sums[warp];
  }
  return before + inclusive - x;
}

/// How many of the sorted values[0] ... values[size - 1] are at most `limit`, found by the whole warp: a step reads 32.
__device__ __forceinline__ int warp_upper_bound(const int32_t* values, int size, int64_t limit) {
  const int lane_idx = threadIdx.x % 32;
  int low = 0, high = size;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int probe = low + lane_idx * step;
    const bool is_below = probe < high && values[probe] <= limit;
    const int count = __popc(__ballot_sync(kFullWarp, is_below));
    if (count == 0) break;
    high = min(high, low + count * step);
    low += (count - 1) * step + 1;
  }
  return low;
}

}  // namespace remora
