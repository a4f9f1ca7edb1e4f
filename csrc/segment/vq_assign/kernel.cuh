// The nearest code of every token: products with all codes, of which only the best are kept.
//
//   x [B, H, T, D]   codebook [H, S, D]   idx, err2 [B, H, T]
//
// halves  |c|^2 / 2 of every code; a warp owns a code
// assign  a CTA owns 128 tokens of a head, a warp 16 of them; tiles of 64 codes pass in steps of 128 bytes of channels,
//         two stages of cp.async. A thread keeps the best code of its columns for two rows; its quad joins them in a
//         fixed order, equal scores to the smaller code. Then the warp measures the distances.
// float: products of three tf32 products, error about 2^-21 of |x| |c|; 16 bits: exact products, fp32 sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/copy.cuh"
#include "common/reduce.cuh"
#include "segment/vq_assign/params.h"

namespace remora {

constexpr int kVqWarps = 8, kVqThreads = 32 * kVqWarps;
constexpr int kVqTokens = 16 * kVqWarps, kVqCodes = 64;
constexpr int kVqRowSize = 128;  // bytes
constexpr int kVqStages = 2, kVqStageSize = (kVqTokens + kVqCodes) * kVqRowSize;

struct VqAssignKernelParams {
  VqAssignParams p;
  float* halves;                       // [H, S]
  bool is_x_aligned, is_code_aligned;  // rows allow 16-byte pieces
};

template <typename T>
__global__ void __launch_bounds__(128) vq_halves_kernel(const __grid_constant__ VqAssignKernelParams params) {
  const VqAssignParams& p = params.p;
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= p.heads * p.codes) return;
  float sum = 0.f;
  for (int64_t d = threadIdx.x % 32; d < p.dims; d += 32) {
    const float x = static_cast<float>(static_cast<const T*>(p.codebook)[row * p.dims + d]);
    sum = fmaf(x, x, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) params.halves[row] = sum / 2.f;
}

template <typename T>
__global__ void __launch_bounds__(kVqThreads) vq_assign_kernel(const __grid_constant__ VqAssignKernelParams params) {
  constexpr int COLS = kVqRowSize / sizeof(T);
  using Tile = SmemTile<T, COLS>;
  const VqAssignParams& p = params.p;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int64_t num_blocks = (p.tokens + kVqTokens - 1) / kVqTokens;
  const int64_t row = blockIdx.x / num_blocks, first = blockIdx.x % num_blocks * kVqTokens;
  const int64_t batch = row / p.heads, head = row % p.heads;
  const int num_tokens = static_cast<int>(min(int64_t{kVqTokens}, p.tokens - first));
  const int num_codes = static_cast<int>(p.codes), dims = static_cast<int>(p.dims);
  const T* gmem_x = static_cast<const T*>(p.x) + p.x_offset(batch, head, first);
  const T* gmem_codes = static_cast<const T*>(p.codebook) + head * p.codes * p.dims;
  const float* gmem_halves = params.halves + head * p.codes;
  const int num_steps = (dims + COLS - 1) / COLS;
  const int num_tiles = (num_codes + kVqCodes - 1) / kVqCodes * num_steps;

  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t smem_stages = smem_address(smem);
  const auto copy = [&](int tile_idx) {
    if (tile_idx < num_tiles) {
      const uint32_t stage = smem_stages + tile_idx % kVqStages * kVqStageSize;
      const int code0 = tile_idx / num_steps * kVqCodes, col0 = tile_idx % num_steps * COLS;
      const int num_cols = min(dims - col0, COLS);
      copy_tile_async<T, kVqTokens, COLS, kVqThreads>(stage, gmem_x + col0, p.x_stride_token, num_tokens, num_cols,
                                                      params.is_x_aligned, threadIdx.x);
      copy_tile_async<T, kVqCodes, COLS, kVqThreads>(stage + Tile::size(kVqTokens),
                                                     gmem_codes + int64_t{code0} * dims + col0, dims, num_codes - code0,
                                                     num_cols, params.is_code_aligned, threadIdx.x);
    }
    cp_async_commit();
  };

  FragC acc[kVqCodes / 8];
  float best[2] = {INFINITY, INFINITY};
  int best_idx[2] = {INT32_MAX, INT32_MAX};
  copy(0);
  for (int tile_idx = 0; tile_idx < num_tiles; ++tile_idx) {
    copy(tile_idx + 1);
    cp_async_wait<1>();
    __syncthreads();
    if (tile_idx % num_steps == 0) {
#pragma unroll
      for (int i = 0; i < kVqCodes / 8; ++i) acc[i] = {};
    }
    const uint32_t smem_x = smem_stages + tile_idx % kVqStages * kVqStageSize;
    const uint32_t smem_codes = smem_x + Tile::size(kVqTokens);
#pragma unroll
    for (int k0 = 0; k0 < COLS; k0 += 16) {
      const FragA<T> a = Tile::load_a(smem_x + Tile::size(16 * warp_idx), 0, k0);
#pragma unroll
      for (int n0 = 0; n0 < kVqCodes; n0 += 16) {
        FragB<T> b[2];
        Tile::load_b(b, smem_codes, n0, k0);
        mma(acc[n0 / 8], a, b[0]);
        mma(acc[n0 / 8 + 1], a, b[1]);
      }
    }
    __syncthreads();
    if (tile_idx % num_steps != num_steps - 1) continue;

    // Best of the tile
    const int code0 = tile_idx / num_steps * kVqCodes + lane_idx % 4 * 2;
#pragma unroll
    for (int i = 0; i < kVqCodes / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int code = code0 + i * 8 + j % 2;
        const float score = code < num_codes ? gmem_halves[code] - acc[i].r[j] : INFINITY;
        if (score < best[j / 2]) best[j / 2] = score, best_idx[j / 2] = code;
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, best[half], mask);
      const int other_idx = __shfl_xor_sync(kFullWarp, best_idx[half], mask);
      if (other < best[half] || (other == best[half] && other_idx < best_idx[half])) {
        best[half] = other, best_idx[half] = other_idx;
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    const int token = 16 * warp_idx + i;
    const int low = __shfl_sync(kFullWarp, best_idx[0], i % 8 * 4),
              high = __shfl_sync(kFullWarp, best_idx[1], i % 8 * 4);
    if (token >= num_tokens) break;
    const bool has_code = p.mask == nullptr || p.mask[batch * p.tokens + first + token] != 0;
    int code = i < 8 ? low : high;
    if (code == INT32_MAX) code = 0;  // a token without a nearest one, as NaN has none
    float sum = 0.f;
    for (int d = lane_idx; has_code && d < dims; d += 32) {
      const float gap = static_cast<float>(gmem_x[token * p.x_stride_token + d]) -
                        static_cast<float>(gmem_codes[int64_t{code} * dims + d]);
      sum = fmaf(gap, gap, sum);
    }
    sum = warp_sum(sum);
    if (lane_idx == 0) {
      p.idx[row * p.tokens + first + token] = has_code ? code : -1;
      static_cast<float*>(p.err2)[row * p.tokens + first + token] = sum;
    }
  }
}

}  // namespace remora
