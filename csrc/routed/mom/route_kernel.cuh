// The router. A warp owns a token; sums over tokens run over blocks of kLossRows in order, then over the blocks in
// order.
//
//   logits [R, M]   weights, indices [R, k]   lse [R]   counts [M + 1]   losses [2]
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/reduce.cuh"
#include "routed/mom/params.h"

namespace remora {

constexpr int kRouteWarps = 4;
constexpr int kLossRows = 128;
constexpr int kLossThreads = 128;

/// -inf for NaN, so that every row has k choices.
__device__ __forceinline__ float rank_of(float x) { return x == x ? x : -INFINITY; }

template <typename E>
__global__ void __launch_bounds__(32 * kRouteWarps) mom_route_fwd_kernel(const __grid_constant__ MomRouteParams p) {
  const int lane_idx = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kRouteWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int num_memories = static_cast<int>(p.num_memories), topk = static_cast<int>(p.topk);
  const E* logits = static_cast<const E*>(p.logits) + row * num_memories;
  float* weights = static_cast<float*>(p.weights) + row * topk;
  int32_t* indices = p.indices + row * topk;
  float* gmem_lse = static_cast<float*>(p.lse) + row;
  if (p.mask != nullptr && p.mask[row] == 0) {
    for (int j = lane_idx; j < topk; j += 32) weights[j] = 0.f, indices[j] = -1;
    if (lane_idx == 0) *gmem_lse = 0.f;
    return;
  }

  // Softmax
  float largest = -INFINITY, sum = 0.f;
  for (int e = lane_idx; e < num_memories; e += 32) largest = fmaxf(largest, rank_of(static_cast<float>(logits[e])));
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, mask));
  for (int e = lane_idx; e < num_memories; e += 32) sum += expf(static_cast<float>(logits[e]) - largest);
  const float lse = largest + logf(warp_sum(sum));
  if (lane_idx == 0) *gmem_lse = lse;

  // Choices, each the largest of those below the last
  float last = INFINITY, chosen = lse - lse;  // zero, or NaN if a logit is
  int last_index = -1;
  for (int j = 0; j < topk; ++j) {
    float best = -INFINITY;
    int index = INT32_MAX;
    for (int e = lane_idx; e < num_memories; e += 32) {
      const float x = rank_of(static_cast<float>(logits[e]));
      const bool is_left = x < last || (x == last && e > last_index);
      if (is_left && (index == INT32_MAX || x > best)) best = x, index = e;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, best, mask);
      const int other_index = __shfl_xor_sync(kFullWarp, index, mask);
      if (other > best || (other == best && other_index < index)) best = other, index = other_index;
    }
    const float weight = expf(static_cast<float>(logits[index]) - (p.renormalize ? largest : lse));
    chosen += weight;
    if (lane_idx == 0) weights[j] = weight, indices[j] = index;
    last = best, last_index = index;
  }
  __syncwarp();
  for (int j = lane_idx; p.renormalize && j < topk; j += 32) weights[j] /= chosen;
}

/// Lanes that the memories of a row take: a power of two, so that a warp reads whole rows side by side.
__device__ __forceinline__ int lanes_per_row(int64_t num_memories) {
  int lanes = 32;
  while (lanes / 2 >= num_memories) lanes /= 2;
  return lanes;
}

/// Sums over the rows that a CTA reads: over the rows of a lane, the row groups of a warp, the warps, in this order.
template <typename T>
__device__ __forceinline__ T sum_over_rows(T x, int lanes, T* smem_sums) {
  for (int mask = 16; mask >= lanes; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  __syncthreads();
  smem_sums[threadIdx.x] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < kLossThreads / 32; ++warp) sum += smem_sums[warp * 32 + threadIdx.x % 32];
  return sum;
}

/// Of kLossRows tokens: sums of probabilities [M], choices [M], sum of lse^2, number of tokens.
template <typename E>
__global__ void __launch_bounds__(kLossThreads) mom_route_partial_kernel(const __grid_constant__ MomRouteParams p) {
  __shared__ float smem_sums[kLossThreads];
  __shared__ int smem_counts[kLossThreads];
  const int64_t num_memories = p.num_memories, begin = int64_t{blockIdx.x} * kLossRows;
  const int64_t end = min(begin + kLossRows, p.rows);
  const int lanes = lanes_per_row(num_memories), rows = kLossThreads / lanes;
  float* partial = static_cast<float*>(p.workspace) + blockIdx.x * (num_memories * 2 + 2);
  int32_t* hits = reinterpret_cast<int32_t*>(partial + num_memories);
  const float* lse = static_cast<const float*>(p.lse);
  const auto is_padding = [&](int64_t row) { return p.mask != nullptr && p.mask[row] == 0; };

  for (int64_t first = 0; first < num_memories; first += lanes) {
    const int64_t e = first + threadIdx.x % lanes;
    float sum = 0.f;
    int num_hits = 0;
    for (int64_t row = begin + threadIdx.x / lanes; row < end && e < num_memories; row += rows) {
      if (is_padding(row)) continue;
      const E* logits = static_cast<const E*>(p.logits) + row * num_memories;
      const float x = static_cast<float>(logits[e]);
      const int32_t last_index = p.indices[(row + 1) * p.topk - 1];
      const float last = rank_of(static_cast<float>(logits[last_index]));
      sum += expf(x - lse[row]);
      num_hits += rank_of(x) > last || (rank_of(x) == last && e <= last_index);
    }
    sum = sum_over_rows(sum, lanes, smem_sums), num_hits = sum_over_rows(num_hits, lanes, smem_counts);
    if (threadIdx.x < lanes && e < num_memories) partial[e] = sum, hits[e] = num_hits;
  }

  float z = 0.f;
  int num_tokens = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += kLossThreads) {
    if (is_padding(row)) continue;
    z = fmaf(lse[row], lse[row], z);
    ++num_tokens;
  }
  z = sum_over_rows(z, 1, smem_sums), num_tokens = sum_over_rows(num_tokens, 1, smem_counts);
  if (threadIdx.x == 0) reinterpret_cast<float*>(hits)[num_memories] = z, hits[num_memories + 1] = num_tokens;
}

static __global__ void __launch_bounds__(kLossThreads)
    mom_route_losses_kernel(const __grid_constant__ MomRouteParams p, int64_t num_blocks) {
  __shared__ float smem_sums[kLossThreads];
  __shared__ int smem_counts[kLossThreads];
  const int64_t num_memories = p.num_memories, stride = num_memories * 2 + 2;
  const int lanes = lanes_per_row(num_memories), blocks = kLossThreads / lanes;
  const float* sums = static_cast<const float*>(p.workspace);
  const int32_t* counts = static_cast<const int32_t*>(p.workspace) + num_memories;

  float z = 0.f, balance = 0.f;
  int num_tokens = 0;
  for (int64_t block = threadIdx.x; block < num_blocks; block += kLossThreads) {
    z += sums[block * stride + num_memories * 2];
    num_tokens += counts[block * stride + num_memories + 1];
  }
  z = sum_over_rows(z, 1, smem_sums), num_tokens = sum_over_rows(num_tokens, 1, smem_counts);
  const float n = static_cast<float>(max(num_tokens, 1));

  for (int64_t first = 0; first < num_memories; first += lanes) {
    const int64_t e = first + threadIdx.x % lanes;
    float sum = 0.f;
    int num_hits = 0;
    for (int64_t block = threadIdx.x / lanes; block < num_blocks && e < num_memories; block += blocks) {
      sum += sums[block * stride + e];
      num_hits += counts[block * stride + e];
    }
    sum = sum_over_rows(sum, lanes, smem_sums), num_hits = sum_over_rows(num_hits, lanes, smem_counts);
    if (threadIdx.x >= lanes || e >= num_memories) continue;
    p.counts[e] = num_hits;
    balance = fmaf(static_cast<float>(num_hits) / n, sum / n, balance);
  }
  balance = sum_over_rows(balance, 1, smem_sums);
  if (threadIdx.x != 0) return;
  p.counts[num_memories] = num_tokens;
  static_cast<float*>(p.losses)[0] = static_cast<float>(num_memories) * balance;
  static_cast<float*>(p.losses)[1] = z / n;
}

template <typename E>
__global__ void __launch_bounds__(32 * kRouteWarps) mom_route_bwd_kernel(const __grid_constant__ MomRouteParams p) {
  const int lane_idx = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kRouteWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int num_memories = static_cast<int>(p.num_memories), topk = static_cast<int>(p.topk);
  const E* logits = static_cast<const E*>(p.logits) + row * num_memories;
  E* d_logits = static_cast<E*>(p.d_logits) + row * num_memories;
  if (p.mask != nullptr && p.mask[row] == 0) {
    for (int e = lane_idx; e < num_memories; e += 32) d_logits[e] = static_cast<E>(0.f);
    return;
  }
  const float* weights = static_cast<const float*>(p.weights) + row * topk;
  const float* d_weights = static_cast<const float*>(p.d_weights) + row * topk;
  const int32_t* indices = p.indices + row * topk;
  const float lse = static_cast<const float*>(p.lse)[row];
  float dot = 0.f, mean = 0.f, d_balance = 0.f, d_z = 0.f;
  for (int j = lane_idx; j < topk; j += 32) dot = fmaf(weights[j], d_weights[j], dot);
  dot = warp_sum(dot);
  if (p.with_losses) {
    const float n = static_cast<float>(max(p.counts[num_memories], 1));
    d_balance = static_cast<const float*>(p.d_losses)[0] * num_memories / n / n;
    d_z = static_cast<const float*>(p.d_losses)[1] * 2.f / n;
    for (int e = lane_idx; e < num_memories; e += 32) {
      mean = fmaf(expf(static_cast<float>(logits[e]) - lse), static_cast<float>(p.counts[e]), mean);
    }
    mean = warp_sum(mean);
  }
  for (int e = lane_idx; e < num_memories; e += 32) {
    const float probability = expf(static_cast<float>(logits[e]) - lse);
    float d = p.renormalize ? 0.f : -probability * dot;
    for (int j = 0; j < topk; ++j) {
      if (indices[j] == e) d = fmaf(weights[j], d_weights[j] - (p.renormalize ? dot : 0.f), d);
    }
    if (p.with_losses) d += probability * (d_balance * (static_cast<float>(p.counts[e]) - mean) + d_z * lse);
    d_logits[e] = static_cast<E>(d);
  }
}

}  // namespace remora
