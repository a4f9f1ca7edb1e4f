// Between the two passes over sequences that are cut into spans: what leaves a span, in the order of the walk, is
//   E_{p+1} = ext_p + M_p E_p, with E_1 = ext_0 (the first span started from what enters the sequence).
// It replaces ext_p in the workspace. fp32, spans and products in a fixed order: the result is reproducible.
//
// Grid: (map slot, value head, 8 columns of V), flattened on x; the CTA of a sequence's first slot does them all. A
// thread owns 4 columns of two rows. M, which waits for nobody, streams through a ring in tiles of 32 of its columns.
#pragma once
#include "common/barrier.cuh"
#include "common/copy.cuh"
#include "recurrence/gated_delta_rule/span_maps.cuh"

namespace remora {

constexpr int kCombineCols = 8;
constexpr int kCombineRows = 128;
constexpr int kCombineRowsPerThread = 2;
constexpr int kCombineThreads = kCombineRows / kCombineRowsPerThread * kCombineCols / 4;
constexpr int kCombineBlock = 32;                  // columns of M a tile
constexpr int kCombineStride = kCombineBlock + 4;  // floats a row: 16-byte pieces of 8 rows meet no bank twice
constexpr int kCombineStages = 4;
constexpr int kCombineTile = kCombineRows * kCombineStride;
constexpr int kCombineSmemSize = (kCombineStages * kCombineTile + kCombineRows * kCombineCols) * 4;

/// Columns [col0, col0 + 32) of a matrix of head_dim x head_dim to a tile, zeros outside, in pieces of kPiece floats.
template <int kPiece>
__device__ __forceinline__ void copy_transition_tile(uint32_t tile, const float* src, int head_dim, int col0) {
  constexpr int kPieces = kCombineBlock / kPiece, kRowStep = kCombineThreads / kPieces;
  const int col = threadIdx.x % kPieces * kPiece;
#pragma unroll 8
  for (int row = threadIdx.x / kPieces; row < kCombineRows; row += kRowStep) {
    const bool valid = row < head_dim && col0 + col < head_dim;
    const float* from = valid ? src + row * head_dim + col0 + col : src;
    const uint32_t to = tile + (row * kCombineStride + col) * 4;
    kPiece == 4 ? cp_async_16(to, from, valid) : cp_async_4(to, from, valid);
  }
}

__global__ void __launch_bounds__(kCombineThreads)
    gated_delta_rule_combine_kernel(const __grid_constant__ CombineParams params) {
  extern __shared__ __align__(16) float smem_tiles[];
  float* smem_state = smem_tiles + kCombineStages * kCombineTile;  // [128, 8]: E
  const RecurrenceShape& shape = params.shape;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const int num_col_tiles = (value_dim + kCombineCols - 1) / kCombineCols;
  const int col_in_tile = threadIdx.x % 2 * 4;
  const int col = static_cast<int>(blockIdx.x % num_col_tiles) * kCombineCols + col_in_tile;
  const int64_t index = blockIdx.x / num_col_tiles;
  const int64_t head = index % shape.num_value_heads, slot = index / shape.num_value_heads;
  const auto row_of = [](int i) {
    return static_cast<int>(threadIdx.x) / 2 + i * kCombineRows / kCombineRowsPerThread;
  };

  // Spans
  const int64_t span_tokens = params.maps.span_tokens;
  const int64_t seq_idx = find_map_owner(shape, params.cu_seqlens, params.maps, slot);
  const Sequence seq = find_sequence(shape, params.cu_seqlens, seq_idx);
  if (slot != first_map_slot(seq, span_tokens) || seq.num_tokens <= span_tokens) return;
  const int num_maps = static_cast<int>((seq.num_tokens - 1) / span_tokens);
  const auto map_of = [&](int span) {
    return span_map(shape, params.maps, slot + (params.is_reverse ? num_maps - 1 - span : span), head);
  };

  // Tiles of M, those of span 1 first
  const int tiles_per_map = (head_dim + kCombineBlock - 1) / kCombineBlock;
  int next_span = 1, next_col = 0, next_stage = 0;
  const auto copy_next = [&] {
    if (next_span < num_maps) {
      const float* src = map_of(next_span) + shape.head_dim * shape.value_dim;
      const uint32_t tile = smem_address(smem_tiles + next_stage * kCombineTile);
      if (head_dim % 4 == 0) {
        copy_transition_tile<4>(tile, src, head_dim, next_col);
      } else {
        copy_transition_tile<1>(tile, src, head_dim, next_col);
      }
      next_stage = next_in_ring(next_stage, kCombineStages);
      next_col += kCombineBlock;
      if (next_col >= head_dim) next_col = 0, ++next_span;
    }
    cp_async_commit();
  };
  for (int i = 0; i < kCombineStages - 1; ++i) copy_next();

  float e[kCombineRowsPerThread][4];
  const auto for_each = [&](int span, auto f) {
    float* state = map_of(span);
#pragma unroll
    for (int i = 0; i < kCombineRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        f(e[i][j], state + row_of(i) * value_dim + col + j, row_of(i) < head_dim && col + j < value_dim);
      }
    }
  };
  const auto load = [](float& x, const float* src, bool valid) { x = valid ? *src : 0.f; };
  const auto store = [](float x, float* dst, bool valid) {
    if (valid) *dst = x;
  };
  for_each(0, load);
  int stage_idx = 0;
  for (int span = 1; span < num_maps; ++span) {
#pragma unroll
    for (int i = 0; i < kCombineRowsPerThread; ++i) {
      *reinterpret_cast<float4*>(&smem_state[row_of(i) * kCombineCols + col_in_tile]) =
          make_float4(e[i][0], e[i][1], e[i][2], e[i][3]);
    }
    for_each(span, load);
    for (int block = 0; block < tiles_per_map; ++block) {
      cp_async_wait<kCombineStages - 2>();
      __syncthreads();
      copy_next();
      const float* tile = smem_tiles + stage_idx * kCombineTile;
      const float* entering = smem_state + block * kCombineBlock * kCombineCols + col_in_tile;
#pragma unroll
      for (int c = 0; c < kCombineBlock; c += 4) {
        float4 m[kCombineRowsPerThread];
#pragma unroll
        for (int i = 0; i < kCombineRowsPerThread; ++i) {
          m[i] = *reinterpret_cast<const float4*>(tile + row_of(i) * kCombineStride + c);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float4 x = *reinterpret_cast<const float4*>(entering + (c + k) * kCombineCols);
#pragma unroll
          for (int i = 0; i < kCombineRowsPerThread; ++i) {
            const float factor = k == 0 ? m[i].x : k == 1 ? m[i].y : k == 2 ? m[i].z : m[i].w;
            e[i][0] = fmaf(factor, x.x, e[i][0]);
            e[i][1] = fmaf(factor, x.y, e[i][1]);
            e[i][2] = fmaf(factor, x.z, e[i][2]);
            e[i][3] = fmaf(factor, x.w, e[i][3]);
          }
        }
      }
      stage_idx = next_in_ring(stage_idx, kCombineStages);
    }
    for_each(span, store);
    __syncthreads();
  }
}

}  // namespace remora
