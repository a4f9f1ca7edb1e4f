// Hints that change no value: to the compiler, what to keep in registers, and to the memory system, what comes next.
#pragma once

namespace remora {

/// threadIdx.x, read anew at every call: for rare code, where keeping what follows from it would cost registers.
__device__ __forceinline__ int read_thread_idx() {
  int thread_idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_idx));
  return thread_idx;
}

/// The same pointer to global memory, of unknown origin: what is added to it step by step is not put together again
/// from its parts, which takes more instructions.
template <typename T>
__device__ __forceinline__ T* hide_origin(T* gmem) {
  asm volatile("" : "+l"(gmem));
  __builtin_assume(__isGlobal(gmem));
  return gmem;
}

/// Brings the line of the address, which must be readable memory's, to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* gmem) { asm volatile("prefetch.global.L2 [%0];" ::"l"(gmem)); }

}  // namespace remora
