// Sub-scores of a block of tokens and their best pairs, in one kernel: neither scores [T, H, 2, n] nor sums [T, H, k^2]
// reach device memory.
//
//   query [T, H, 2, ds]   keys [H, 2, n, ds]   or sub_scores [T, H, 2, n]   scores, index [T, H, k] (PkTopkParams)
//
// Grid: (head, block of tokens), blocks fastest, so that CTAs that run together share sub-keys in L2. Per axis:
//   products   tiles of 128 sub-keys and 32 tokens over ds, two stages of cp.async; warp w owns sub-keys 16 w ... 16 w
//   + 15 keys       scores as ordered integers in shared memory, [tokens][row_stride] selection  warp w ranks tokens w,
//   w + 8, ...: the k1 best of a row (select.cuh)
// then the warp adds the staircase of both rankings into the row, ranks the sums and writes k of them.
// float: products of three tf32 products, error about 2^-21 of |q| |K|; 16 bits: exact products, fp32 sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/copy.cuh"
#include "common/select.cuh"
#include "pkm/pk_topk/heuristics.h"

namespace remora {

struct PkTopkKernelParams {
  PkTopkParams p;
  PkTopkConfig config;
  const float* query_squares;  // [T, H, 2], unless score is kDot
  const float* key_squares;    // [H, 2, n]
  bool is_aligned;             // rows of query and keys allow 16-byte pieces
};

/// <x, x> of every row of [rows, dims]; a warp owns a row.
template <typename T>
__global__ void __launch_bounds__(128)
    pk_squares_kernel(const T* __restrict__ x, int64_t num_rows, int64_t dims, float* __restrict__ squares) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= num_rows) return;
  float sum = 0.f;
  for (int64_t d = threadIdx.x % 32; d < dims; d += 32) {
    const float value = static_cast<float>(x[row * dims + d]);
    sum = fmaf(value, value, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[row] = sum;
}

__device__ __forceinline__ float score_of_product(const ScoreFunction& f, float product, float query_square,
                                                  float key_square) {
  const float eps = static_cast<float>(f.eps);
  if (f.kind == ScoreFunction::Kind::kCosine) {
    return product * (static_cast<float>(f.tau) / sqrtf(query_square + eps)) / sqrtf(key_square + eps);
  }
  const float distance = query_square + key_square - 2.f * product;
  return -logf(eps + (distance < 0.f ? 0.f : distance));
}

/// Keys of the scores of tokens [first, first + num_tokens) with all sub-keys of an axis.
template <typename T>
__device__ __forceinline__ void score_block(const PkTopkKernelParams& params, int64_t head, int axis, int64_t first,
                                            int num_tokens, uint32_t smem_stages, int32_t* smem_keys) {
  constexpr int COLS = kPkTopkRowSize / sizeof(T);
  using Tile = SmemTile<T, COLS>;
  const PkTopkParams& p = params.p;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int num_keys = static_cast<int>(p.num_keys), dims = static_cast<int>(p.dims);
  const int64_t column = head * 2 + axis, query_stride = p.heads * 2 * p.dims;
  const T* gmem_query = static_cast<const T*>(p.query) + first * query_stride + column * p.dims;
  const T* gmem_keys = static_cast<const T*>(p.keys) + column * p.num_keys * p.dims;
  const int num_steps = (dims + COLS - 1) / COLS;
  const int num_tiles = (num_keys + kPkTopkKeys - 1) / kPkTopkKeys * num_steps;

  const auto copy = [&](int tile_idx) {
    if (tile_idx < num_tiles) {
      const uint32_t stage = smem_stages + tile_idx % kPkTopkStages * kPkTopkStageSize;
      const int key0 = tile_idx / num_steps * kPkTopkKeys, col0 = tile_idx % num_steps * COLS;
      const int num_cols = min(dims - col0, COLS);
      copy_tile_async<T, kPkTopkTokens, COLS, kPkTopkThreads>(stage, gmem_query + col0, query_stride, num_tokens,
                                                              num_cols, params.is_aligned, threadIdx.x);
      copy_tile_async<T, kPkTopkKeys, COLS, kPkTopkThreads>(stage + Tile::size(kPkTopkTokens),
                                                            gmem_keys + key0 * p.dims + col0, p.dims, num_keys - key0,
                                                            num_cols, params.is_aligned, threadIdx.x);
    }
    cp_async_commit();
  };

  FragC acc[4];  // 16 sub-keys, four times eight tokens
  copy(0);
  for (int tile_idx = 0; tile_idx < num_tiles; ++tile_idx) {
    copy(tile_idx + 1);
    cp_async_wait<1>();
    __syncthreads();
    if (tile_idx % num_steps == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] = {};
    }
    const uint32_t smem_query = smem_stages + tile_idx % kPkTopkStages * kPkTopkStageSize;
    const uint32_t smem_sub_keys = smem_query + Tile::size(kPkTopkTokens + 16 * warp_idx);
#pragma unroll
    for (int k0 = 0; k0 < COLS; k0 += 16) {
      const FragA<T> a = Tile::load_a(smem_sub_keys, 0, k0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * 16 >= num_tokens) break;
        FragB<T> b[2];
        Tile::load_b(b, smem_query, half * 16, k0);
        mma(acc[2 * half], a, b[0]);
        mma(acc[2 * half + 1], a, b[1]);
      }
    }
    __syncthreads();
    if (tile_idx % num_steps != num_steps - 1) continue;

    // Scores of the tile
    const int key0 = tile_idx / num_steps * kPkTopkKeys + 16 * warp_idx + lane_idx / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = key0 + i / 2 % 2 * 8, token = i / 4 * 8 + lane_idx % 4 * 2 + i % 2;
      if (key >= num_keys || token >= num_tokens) continue;
      float score = acc[i / 4].r[i % 4];
      if (p.score.kind != ScoreFunction::Kind::kDot) {
        score = score_of_product(p.score, score, params.query_squares[(first + token) * p.heads * 2 + column],
                                 params.key_squares[column * num_keys + key]);
      }
      smem_keys[token * params.config.row_stride + key] = key_of(score);
    }
  }
  cp_async_wait<0>();
}

/// Keys of given scores of one token, by its warp.
template <typename T>
__device__ __forceinline__ void read_scores(const T* __restrict__ gmem_scores, int num_keys, int32_t* smem_row) {
  for (int i = threadIdx.x % 32; i < num_keys; i += 32) smem_row[i] = key_of(static_cast<float>(gmem_scores[i]));
  __syncwarp();
}

/// The order of scores reversed, so that the worst are the best.
__device__ __forceinline__ void reverse_row(int32_t* smem_row, int num_keys) {
  for (int i = threadIdx.x % 32; i < (num_keys + 1) / 2; i += 32) {
    const int32_t low = smem_row[i], high = smem_row[num_keys - 1 - i];
    smem_row[i] = ~high, smem_row[num_keys - 1 - i] = ~low;
  }
  __syncwarp();
}

/// Positions in the staircase at which its rows begin, by one warp.
__device__ __forceinline__ void begin_rows(int32_t* smem_begins, int num_rows, int topk, int num_candidates) {
  const int lane_idx = threadIdx.x % 32;
  int before = 0;
  for (int first = 0; first < num_rows; first += 32) {
    const int row = first + lane_idx;
    int sum = row < num_rows ? static_cast<int>(staircase_width(row, topk, num_candidates)) : 0;
    const int width = sum;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(kFullWarp, sum, delta);
      if (lane_idx >= delta) sum += below;
    }
    if (row < num_rows) smem_begins[row] = before + sum - width;
    before += __shfl_sync(kFullWarp, sum, 31);
  }
}

/// Row of a position in the staircase, where row r begins at smem_begins[r].
__device__ __forceinline__ int rank_of_position(const int32_t* smem_begins, int num_rows, int position) {
  int low = 0, high = num_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (smem_begins[middle] <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ float add_scores(float row, float column) {
  const float sum = row + column;
  // The order of sums must follow that of the terms: opposite infinities give -infinity.
  return sum != sum && row == row && column == column ? -INFINITY : sum;
}

template <typename T, bool kIsGiven>
__global__ void __launch_bounds__(kPkTopkThreads, 2)
    pk_topk_fwd_kernel(const __grid_constant__ PkTopkKernelParams params) {
  const PkTopkParams& p = params.p;
  const PkTopkConfig& config = params.config;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int64_t num_blocks = (p.tokens + config.block_tokens - 1) / config.block_tokens;
  const int64_t head = blockIdx.x / num_blocks, first = blockIdx.x % num_blocks * config.block_tokens;
  const int num_tokens = static_cast<int>(min(int64_t{config.block_tokens}, p.tokens - first));
  const int num_keys = static_cast<int>(p.num_keys), topk = static_cast<int>(p.topk);
  const int num_candidates = static_cast<int>(p.candidates), num_lowest = static_cast<int>(p.lowest);
  const bool is_pairs = p.output == PkTopkParams::Output::kPairs;
  const int num_rows = is_pairs ? min(topk, num_candidates) : 0;

  // Shared memory: [stages | entries of the warps], lists [tokens][2][k1], begins [k1 + 1], keys [tokens][row_stride]
  extern __shared__ __align__(128) uint8_t smem[];
  Entry* smem_entries = reinterpret_cast<Entry*>(smem) + warp_idx * config.capacity;
  const int stages_size =
      max(kPkTopkStages * kPkTopkStageSize, min(config.block_tokens, kPkTopkWarps) * config.capacity * 8);
  Entry* smem_lists = reinterpret_cast<Entry*>(smem + stages_size);
  int32_t* smem_begins = reinterpret_cast<int32_t*>(smem_lists + config.block_tokens * 2 * config.list_size);
  int32_t* smem_keys = smem_begins + config.list_size + 1;

  if (warp_idx == 0) begin_rows(smem_begins, num_rows, topk, num_candidates);
  for (int axis = 0; axis < 2; ++axis) {
    if constexpr (!kIsGiven) {
      score_block<T>(params, head, axis, first, num_tokens, smem_address(smem), smem_keys);
    }
    __syncthreads();  // keys and begins are written, tiles are read
    for (int token = warp_idx; token < num_tokens; token += kPkTopkWarps) {
      int32_t* smem_row = smem_keys + token * config.row_stride;
      const int64_t out = (first + token) * p.heads + head;
      if constexpr (kIsGiven) {
        read_scores(static_cast<const T*>(p.sub_scores) + (out * 2 + axis) * num_keys, num_keys, smem_row);
      }
      select_greatest(smem_row, num_keys, num_candidates, smem_entries);
      if (is_pairs) {
        Entry* smem_list = smem_lists + (token * 2 + axis) * num_candidates;
        for (int m = lane_idx; m < num_candidates; m += 32) smem_list[m] = smem_entries[m];
      } else {
        const int64_t to = (out * 2 + axis) * (num_candidates + num_lowest);
        float* scores = static_cast<float*>(p.scores) + to;
        for (int m = lane_idx; m < num_candidates; m += 32) {
          scores[m] = score_of(key_of_entry(smem_entries[m]));
          p.index[to + m] = position_of_entry(smem_entries[m]);
        }
        __syncwarp();
        if (num_lowest > 0) {
          reverse_row(smem_row, num_keys);
          select_greatest(smem_row, num_keys, num_lowest, smem_entries);
          for (int m = lane_idx; m < num_lowest; m += 32) {
            scores[num_candidates + m] = score_of(~key_of_entry(smem_entries[m]));
            p.index[to + num_candidates + m] = num_keys - 1 - position_of_entry(smem_entries[m]);
          }
        }
      }
      __syncwarp();
    }
    __syncthreads();  // entries and keys are read
  }
  if (!is_pairs) return;

  // Pairs
  for (int token = warp_idx; token < num_tokens; token += kPkTopkWarps) {
    int32_t* smem_row = smem_keys + token * config.row_stride;
    const Entry* smem_rows = smem_lists + token * 2 * num_candidates;
    const Entry* smem_columns = smem_rows + num_candidates;
    for (int i = lane_idx; i < config.num_pairs; i += 32) {
      const int row = rank_of_position(smem_begins, num_rows, i);
      smem_row[i] = key_of(add_scores(score_of(key_of_entry(smem_rows[row])),
                                      score_of(key_of_entry(smem_columns[i - smem_begins[row]]))));
    }
    __syncwarp();
    select_greatest(smem_row, config.num_pairs, topk, smem_entries);
    const int64_t to = ((first + token) * p.heads + head) * topk;
    for (int m = lane_idx; m < topk; m += 32) {
      const int position = position_of_entry(smem_entries[m]), row = rank_of_position(smem_begins, num_rows, position);
      static_cast<float*>(p.scores)[to + m] = score_of(key_of_entry(smem_entries[m]));
      p.index[to + m] =
          position_of_entry(smem_rows[row]) * num_keys + position_of_entry(smem_columns[position - smem_begins[row]]);
    }
    __syncwarp();
  }
}

}  // namespace remora
