// The k best chunks of every query, in one kernel: scores live in registers and never reach memory.
//
//   q [B, T, H, D]   k_sum [B, S, Hk, D]   idx, scores [B, T, Hs, k]   (TopkChunksParams)
//
// Grid: (block of queries descending, list, batch row); a CTA of four warps.
//   products   tiles of 64 summaries over heads and channels, two stages of cp.async; a warp owns 16 rows of queries
//   and
//              has their scores as C fragments: row lane / 4 and row + 8, held by the four lanes of a quad
//   selection  of what the last k-th best of a row lets through, a quad appends to the row's candidates in shared
//   memory;
//              when those are full the warp sorts them and keeps k
// Forced chunks are written at sight and are no candidates.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/copy.cuh"
#include "common/select.cuh"
#include "segment/topk_chunks/heuristics.h"
#include "segment/topk_chunks/params.h"

namespace remora {

struct TopkChunksKernelParams {
  TopkChunksParams p;
  TopkChunksConfig config;
  bool is_aligned;  // rows of q and k_sum allow 16-byte pieces
};

/// Rows of at most COLS elements to a swizzled tile; row_of(row) is null where there is none.
template <typename T, int COLS, int ROWS, typename RowOf>
__device__ __forceinline__ void copy_rows_async(uint32_t dst, const RowOf& row_of, int num_cols, bool is_aligned,
                                                const void* readable) {
  using Tile = SmemTile<T, COLS>;
  constexpr int kElements = 16 / sizeof(T), kUnits = COLS / kElements, kRowStep = kChunkThreads / kUnits;
  const int col = static_cast<int>(threadIdx.x) % kUnits * kElements;
#pragma unroll
  for (int i = 0; i < ROWS / kRowStep; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kUnits + i * kRowStep;
    const T* src = row_of(row);
    const bool valid = src != nullptr && col < num_cols;
    if (is_aligned) {
      cp_async_16(dst + Tile::offset(row, col), valid ? src + col : readable, valid);
    } else {
      store_shared(dst + Tile::offset(row, col), load_unaligned_16(src + col, valid ? num_cols - col : 0));
    }
  }
}

/// The candidates of a row, held by the four lanes of its quad.
struct RowState {
  int begin, count;      // visible summaries
  int num_first, local;  // forced: before num_first and from local on
  int num_wanted;        // best chunks that are not forced
  int num_candidates;
  int32_t bound;  // key of the num_wanted-th best when last sorted; kNoKey before that
  int64_t out;    // of the row in idx and scores, -1 for no row
};

/// The row's best candidates in order, at most num_wanted; by the whole warp. `row` is uniform.
__device__ __forceinline__ void sort_candidates(RowState& state, int row, Entry* smem_row) {
  const int lane_idx = threadIdx.x % 32, owner = row * 4;
  const int count = __shfl_sync(kFullWarp, state.num_candidates, owner);
  const int wanted = __shfl_sync(kFullWarp, state.num_wanted, owner);
  int size = 32;
  while (size < count) size *= 2;
  for (int i = count + lane_idx; i < size; i += 32) smem_row[i] = kNoEntry;
  __syncwarp();
  sort_entries(smem_row, size);
  if (lane_idx / 4 == row && count >= wanted && wanted > 0) {
    state.num_candidates = wanted;
    state.bound = key_of_entry(smem_row[wanted - 1]);
  }
}

template <typename T, bool kIsRelu>
__global__ void __launch_bounds__(kChunkThreads, 2)
    topk_chunks_fwd_kernel(const __grid_constant__ TopkChunksKernelParams params) {
  constexpr int COLS = kChunkRowSize / sizeof(T);
  using Tile = SmemTile<T, COLS>;
  const TopkChunksParams& p = params.p;
  const ChunkScoreShape& shape = p.shape;
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int warp_queries = params.config.warp_queries, capacity = params.config.capacity;
  const int64_t block_queries = params.config.block_queries();
  const int64_t num_blocks = (shape.packed.seqlen + block_queries - 1) / block_queries;
  const int64_t first_token = (num_blocks - 1 - blockIdx.x % num_blocks) * block_queries;
  const int64_t list = blockIdx.x / num_blocks % shape.num_lists, b = blockIdx.x / num_blocks / shape.num_lists;
  const int64_t first_head = list * shape.list_heads();
  const int dim = static_cast<int>(shape.dim);

  // Shared memory: stages, candidates [warps][warp_queries][capacity]
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ int smem_range[2][kChunkWarps];
  const uint32_t smem_stages = smem_address(smem);
  Entry* smem_candidates =
      reinterpret_cast<Entry*>(smem + kChunkStages * kChunkStageSize) + warp_idx * warp_queries * capacity;

  RowState rows[2];
  const auto token_of = [&](int row) {
    const int64_t token = first_token + warp_idx * warp_queries + row;
    return row < warp_queries && token < shape.packed.seqlen ? token : -1;
  };
  int begin = INT32_MAX, end = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = token_of(lane_idx / 4 + half * 8);
    const VisibleChunks visible = token < 0 ? VisibleChunks{} : visible_chunks(p, b, token);
    rows[half] = {.begin = static_cast<int>(visible.begin),
                  .count = static_cast<int>(visible.count),
                  .num_first = static_cast<int>(visible.num_first),
                  .local = static_cast<int>(visible.count - visible.num_local),
                  .num_wanted = static_cast<int>(p.k - visible.num_forced()),
                  .num_candidates = 0,
                  .bound = p.k == visible.num_forced() ? INT32_MAX : kNoKey,
                  .out = token < 0 ? -1 : ((b * shape.packed.seqlen + token) * shape.num_lists + list) * p.k};
    if (visible.count > 0) {
      begin = min(begin, rows[half].begin), end = max(end, rows[half].begin + rows[half].count);
    }
  }
  begin = warp_min(begin), end = warp_max(end);
  if (lane_idx == 0) smem_range[0][warp_idx] = begin, smem_range[1][warp_idx] = end;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kChunkWarps; ++warp) {
    begin = min(begin, smem_range[0][warp]), end = max(end, smem_range[1][warp]);
  }

  const int num_slices = (dim + COLS - 1) / COLS;
  const int num_steps = static_cast<int>(shape.list_heads()) * num_slices;  // of a tile
  const int num_tiles = end > begin ? (end - begin + kChunkTile - 1) / kChunkTile : 0;
  const int64_t num_iterations = int64_t{num_tiles} * num_steps;
  const T* gmem_q = static_cast<const T*>(shape.q);
  const T* gmem_k = static_cast<const T*>(shape.k_sum);

  // Tile, head and slice of the iteration to be copied
  int copy_tile = 0, copy_head = 0, copy_slice = 0;
  const auto copy = [&](int64_t i) {
    if (i < num_iterations) {
      const uint32_t stage = smem_stages + static_cast<int>(i % kChunkStages) * kChunkStageSize;
      const int col0 = copy_slice * COLS, num_cols = min(dim - col0, COLS);
      const int64_t head = first_head + copy_head, key_head = shape.key_head(head);
      // A stage meets the same queries again if the steps of a tile divide the stages.
      if (i < kChunkStages || kChunkStages % num_steps != 0) {
        const auto query_row = [&](int row) {
          const int64_t local = row / 16 * warp_queries + row % 16, token = first_token + local;
          const bool valid = row % 16 < warp_queries && token < shape.packed.seqlen;
          return valid ? gmem_q + shape.q_stride.at(b, token, head) + col0 : nullptr;
        };
        copy_rows_async<T, COLS, kChunkQueries>(stage, query_row, num_cols, params.is_aligned, gmem_q);
      }
      const auto key_row = [&](int row) {
        const int64_t chunk = int64_t{begin} + copy_tile * kChunkTile + row;
        return chunk < end ? gmem_k + shape.k_stride.at(b, chunk, key_head) + col0 : nullptr;
      };
      copy_rows_async<T, COLS, kChunkTile>(stage + Tile::size(kChunkQueries), key_row, num_cols, params.is_aligned,
                                           gmem_k);
      if (++copy_slice == num_slices) copy_slice = 0, ++copy_head;
      if (copy_head == static_cast<int>(shape.list_heads())) copy_head = 0, ++copy_tile;
    }
    cp_async_commit();
  };

  const float scale = static_cast<float>(shape.scale);
  const float* gmem_bias = static_cast<const float*>(p.bias);
  if (gmem_bias != nullptr) gmem_bias += (b * shape.num_lists + list) * shape.packed.key_seqlen;
  FragC acc[kChunkTile / 8], sum[kIsRelu ? kChunkTile / 8 : 1];
  int head = 0, slice = 0, chunk0 = begin;
  copy(0);
  for (int64_t i = 0; i < num_iterations; ++i) {
    copy(i + 1);
    cp_async_wait<1>();
    __syncthreads();
    if (slice == 0 && (kIsRelu || head == 0)) {
#pragma unroll
      for (FragC& c : acc) c = {};
    }
    const uint32_t smem_q = smem_stages + static_cast<int>(i % kChunkStages) * kChunkStageSize;
    const uint32_t smem_k = smem_q + Tile::size(kChunkQueries);
#pragma unroll
    for (int k0 = 0; k0 < COLS; k0 += 16) {
      const FragA<T> a = Tile::load_a(smem_q + Tile::size(16 * warp_idx), 0, k0);
#pragma unroll
      for (int n = 0; n < kChunkTile / 16; ++n) {
        FragB<T> keys[2];
        Tile::load_b(keys, smem_k, n * 16, k0);
        mma_rounded(acc[2 * n], a, keys[0]);
        mma_rounded(acc[2 * n + 1], a, keys[1]);
      }
    }
    __syncthreads();  // the stage is read
    if (++slice < num_slices) continue;
    slice = 0;
    if constexpr (kIsRelu) {
      float weight[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = token_of(lane_idx / 4 + half * 8);
        const int64_t at = (b * shape.packed.seqlen + token) * shape.num_heads + first_head + head;
        weight[half] = token < 0 ? 0.f : static_cast<const float*>(shape.w)[at];
      }
#pragma unroll
      for (int n = 0; n < kChunkTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float x = acc[n].r[e];
          const float term = (x < 0.f ? 0.f : x) * weight[e / 2];
          sum[n].r[e] = head == 0 ? term : sum[n].r[e] + term;
        }
      }
    }
    if (++head < static_cast<int>(shape.list_heads())) continue;
    head = 0;

    // Selection from the tile
    const FragC* scores = acc;
    if constexpr (kIsRelu) scores = sum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowState& state = rows[half];
      int32_t keys[kChunkTile / 4];
      uint32_t accepted = 0;
      const int position0 = chunk0 - state.begin + lane_idx % 4 * 2;
#pragma unroll
      for (int n = 0; n < kChunkTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int position = position0 + n * 8 + e;
          const bool is_visible = position >= 0 && position < state.count;
          float x = scores[n].r[2 * half + e] * scale;
          if (gmem_bias != nullptr && is_visible) {
            x = fmaf(scores[n].r[2 * half + e], scale, gmem_bias[state.begin + position]);
          }
          const int32_t key = key_of(x);
          keys[2 * n + e] = key;
          const bool is_forced = position < state.num_first || position >= state.local;
          if (is_visible && is_forced) {
            const int slot = position < state.num_first ? position : state.num_first + position - state.local;
            p.idx[state.out + slot] = position;
            static_cast<float*>(p.scores)[state.out + slot] = score_of(key);
          }
          if (is_visible && !is_forced && key > state.bound) accepted |= 1u << (2 * n + e);
        }
      }
      if (__ballot_sync(kFullWarp, accepted != 0) == 0) continue;
      // Places of the quad's candidates
      const int count = __popc(accepted);
      const int one = __shfl_xor_sync(kFullWarp, count, 1), pair = count + one;
      const int other_pair = __shfl_xor_sync(kFullWarp, pair, 2), total = pair + other_pair;
      const int before = (lane_idx % 2 ? one : 0) + (lane_idx % 4 >= 2 ? other_pair : 0);
      const auto sort_rows = [&](bool is_due) {
        uint32_t due = __ballot_sync(kFullWarp, is_due) & 0x11111111u;
        for (; due != 0; due &= due - 1) {
          const int row = (__ffs(static_cast<int>(due)) - 1) / 4;
          sort_candidates(state, row, smem_candidates + (row + half * 8) * capacity);
        }
      };
      sort_rows(state.num_candidates + total > capacity);
      Entry* smem_row = smem_candidates + (lane_idx / 4 + half * 8) * capacity + state.num_candidates + before;
#pragma unroll
      for (int j = 0; j < kChunkTile / 4; ++j) {
        if (accepted >> j & 1) *smem_row++ = pack_entry(keys[j], position0 + j / 2 * 8 + j % 2);
      }
      state.num_candidates += total;
      __syncwarp();
      // The first bound, as soon as it is worth one
      sort_rows(state.bound == kNoKey && state.num_candidates >= 2 * state.num_wanted);
    }
    chunk0 += kChunkTile;
  }
  cp_async_wait<0>();

  // Lists
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < min(8, warp_queries - half * 8); ++row) {
      const Entry* smem_row = smem_candidates + (row + half * 8) * capacity;
      sort_candidates(rows[half], row, smem_candidates + (row + half * 8) * capacity);
      const int64_t out = __shfl_sync(kFullWarp, rows[half].out, row * 4);
      const int wanted = __shfl_sync(kFullWarp, rows[half].num_wanted, row * 4);
      const int found = __shfl_sync(kFullWarp, rows[half].num_candidates, row * 4);
      if (out < 0) continue;
      const int num_forced = static_cast<int>(p.k) - wanted;
      for (int m = lane_idx; m < wanted; m += 32) {
        const bool is_found = m < found;
        p.idx[out + num_forced + m] = is_found ? position_of_entry(smem_row[m]) : -1;
        static_cast<float*>(p.scores)[out + num_forced + m] =
            is_found ? score_of(key_of_entry(smem_row[m])) : -INFINITY;
      }
    }
  }
}

}  // namespace remora
