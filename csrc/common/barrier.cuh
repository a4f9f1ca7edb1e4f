// Named barriers: hand-over between groups of warps of one CTA.
#pragma once

namespace remora {

/// Waits until `num_threads` threads have arrived at barrier `id` (1..15; 0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// Arrives without waiting: what this thread wrote before is visible to those who wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// A barrier among the `kNumWarps` warps of one role.
template <int kNumWarps>
__device__ __forceinline__ void role_barrier(int id) {
  if constexpr (kNumWarps == 1) {
    __syncwarp();
  } else {
    named_barrier_sync(id, 32 * kNumWarps);
  }
}

/// Index of the element after `idx` in a ring.
__device__ __forceinline__ int next_in_ring(int idx, int size) { return idx + 1 == size ? 0 : idx + 1; }

}  // namespace remora
