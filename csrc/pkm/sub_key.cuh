// A sub-key against a query half.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/reduce.cuh"

namespace remora {

template <typename T>
__device__ __forceinline__ float load_float(const T* x) {
  return static_cast<float>(*x);
}

/// <query, keys[key]>, by the whole warp; zero for a key outside [0, num_keys).
template <typename T>
__device__ __forceinline__ float sub_key_score(const T* query, const T* keys, int64_t key, int64_t num_keys,
                                               int64_t dims) {
  float sum = 0.f;
  if (key >= 0 && key < num_keys) {
    for (int64_t d = threadIdx.x % 32; d < dims; d += 32) {
      sum = fmaf(load_float(query + d), load_float(keys + key * dims + d), sum);
    }
  }
  return warp_sum(sum);
}

}  // namespace remora
