// Gradient of given sub-scores: every slot's d_score goes to its row and to its column.
//
//   slots [T, H, k]   d_scores [T, H, k]   d_sub_scores [T, H, 2, n]
//
// Grid: token and head. The first slot with a row (or column) adds up all of them, in order; others stay zero.
#pragma once
#include "pkm/pk_topk/params.h"

namespace remora {

constexpr int kPkSelectBwdThreads = 128;

static __global__ void __launch_bounds__(kPkSelectBwdThreads)
    pk_select_bwd_kernel(const __grid_constant__ PkSelectBwdParams p) {
  extern __shared__ int32_t smem_index[];  // [2][k], -1: dropped
  const int num_keys = static_cast<int>(p.num_keys), topk = static_cast<int>(p.topk);
  const int32_t* slots = p.slots + int64_t{blockIdx.x} * topk;
  const float* d_scores = static_cast<const float*>(p.d_scores) + int64_t{blockIdx.x} * topk;
  float* sums = static_cast<float*>(p.d_sub_scores) + int64_t{blockIdx.x} * 2 * num_keys;
  for (int m = threadIdx.x; m < topk; m += kPkSelectBwdThreads) {
    const int slot = slots[m];
    const bool is_valid = slot >= 0 && slot < num_keys * num_keys;
    smem_index[m] = is_valid ? slot / num_keys : -1, smem_index[topk + m] = is_valid ? slot % num_keys : -1;
  }
  for (int i = threadIdx.x; i < 2 * num_keys; i += kPkSelectBwdThreads) sums[i] = 0.f;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * topk; i += kPkSelectBwdThreads) {
    const int32_t* index = smem_index + i / topk * topk;
    const int m = i % topk, own = index[m];
    bool is_first = own >= 0;
    for (int other = 0; is_first && other < m; ++other) is_first = index[other] != own;
    if (!is_first) continue;
    float sum = 0.f;
    for (int other = m; other < topk; ++other) {
      if (index[other] == own) sum += d_scores[other];
    }
    sums[i / topk * num_keys + own] = sum;
  }
}

}  // namespace remora
