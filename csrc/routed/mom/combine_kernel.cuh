// Weighted sum of a token's choices in the order of choices, and its gradient. A CTA owns a token.
//
//   o, d_o [J, R, D]   weights, d_weights [R, k]   out, d_out [R, D]
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/reduce.cuh"
#include "routed/mom/params.h"

namespace remora {

constexpr int kCombineThreads = 128;

template <typename E>
__global__ void __launch_bounds__(kCombineThreads) mom_combine_fwd_kernel(const __grid_constant__ MomCombineParams p) {
  const int64_t row = blockIdx.x;
  const float* weights = static_cast<const float*>(p.weights) + row * p.topk;
  for (int64_t c = threadIdx.x; c < p.channels; c += kCombineThreads) {
    float sum = 0.f;
    for (int64_t j = 0; j < p.choices; ++j) {
      const float x = static_cast<float>(static_cast<const E*>(p.o)[(j * p.rows + row) * p.channels + c]);
      sum = fmaf(j < p.topk ? weights[j] : 1.f, x, sum);
    }
    static_cast<E*>(p.out)[row * p.channels + c] = static_cast<E>(sum);
  }
}

template <typename E>
__global__ void __launch_bounds__(kCombineThreads) mom_combine_bwd_kernel(const __grid_constant__ MomCombineParams p) {
  __shared__ float smem_sums[kCombineThreads / 32];
  const int64_t row = blockIdx.x;
  for (int64_t j = 0; j < p.choices; ++j) {
    const float weight = j < p.topk ? static_cast<const float*>(p.weights)[row * p.topk + j] : 1.f;
    const int64_t base = (j * p.rows + row) * p.channels;
    float dot = 0.f;
    for (int64_t c = threadIdx.x; c < p.channels; c += kCombineThreads) {
      const float d = static_cast<float>(static_cast<const E*>(p.d_out)[row * p.channels + c]);
      static_cast<E*>(p.d_o)[base + c] = static_cast<E>(weight * d);
      dot = fmaf(d, static_cast<float>(static_cast<const E*>(p.o)[base + c]), dot);
    }
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) smem_sums[threadIdx.x / 32] = dot;
    __syncthreads();
    if (threadIdx.x == 0 && j < p.topk) {
      float sum = 0.f;
      for (int warp = 0; warp < kCombineThreads / 32; ++warp) sum += smem_sums[warp];
      static_cast<float*>(p.d_weights)[row * p.topk + j] = sum;
    }
    __syncthreads();
  }
}

}  // namespace remora
