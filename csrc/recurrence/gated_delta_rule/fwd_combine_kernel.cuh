// Between the two passes of a sequence that is cut into spans: the state that enters span p + 1 is
//   E_{p+1} = S_ext_p + M_p E_p, with E_1 = S_ext_0 (span 0 started from the initial state).
// It replaces S_ext_p in the workspace. fp32, spans and products in ascending order: the result is reproducible.
//
// Grid: (sequence, value head, 8 columns of V), flattened on x. E_p in shared memory; a thread owns 4 columns of every
// 128th row and reads its rows of M 16 bytes at a time.
#pragma once
#include "recurrence/gated_delta_rule/fwd_kernel.cuh"

namespace remora {

constexpr int kCombineThreads = 256;
constexpr int kCombineCols = 8;

__global__ void __launch_bounds__(kCombineThreads)
    gated_delta_rule_fwd_combine_kernel(const __grid_constant__ FwdKernelParams params) {
  extern __shared__ float smem_state[];  // [K, 8]
  constexpr int kColGroups = kCombineCols / 4;
  constexpr int kMaxRows = 256 / (kCombineThreads / kColGroups);
  const RecurrenceShape& shape = params.op.shape;
  const int head_dim = static_cast<int>(shape.head_dim);
  const int value_dim = static_cast<int>(shape.value_dim);
  const int num_col_tiles = (value_dim + kCombineCols - 1) / kCombineCols;
  const int64_t chain = blockIdx.x / num_col_tiles;
  const int64_t seq = chain / shape.num_value_heads;
  const int col_in_tile = threadIdx.x % kColGroups * 4;
  const int col = static_cast<int>(blockIdx.x % num_col_tiles) * kCombineCols + col_in_tile;
  const int row0 = threadIdx.x / kColGroups;
  const int64_t map_size = shape.head_dim * (shape.head_dim + shape.value_dim);
  float* maps = params.span_maps + chain * (params.num_spans - 1) * map_size;

  // Spans that hold tokens
  int64_t seq_len = shape.seqlen;
  if (params.op.cu_seqlens != nullptr) {
    seq_len = max(clamped_cu_seqlen(params.op, seq + 1) - clamped_cu_seqlen(params.op, seq), int64_t{0});
  }
  const int64_t span_share = (seq_len + params.num_spans - 1) / params.num_spans;
  const int64_t span_len = max((span_share + kStateInterval - 1) / kStateInterval * kStateInterval, kStateInterval);
  const int num_used = static_cast<int>((seq_len + span_len - 1) / span_len);

  for (int span = 0; span + 1 < num_used; ++span) {
    float* state = maps + span * map_size;
    const float* transition = state + shape.head_dim * shape.value_dim;
    float sum[kMaxRows][4];
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      const int row = row0 + i * (kCombineThreads / kColGroups);
      if (row >= head_dim) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = col + j < value_dim ? state[row * value_dim + col + j] : 0.f;
    }
    const auto accumulate = [&](float m, int c, float (&to)[4]) {
      const float4 e = *reinterpret_cast<const float4*>(&smem_state[c * kCombineCols + col_in_tile]);
      to[0] = fmaf(m, e.x, to[0]);
      to[1] = fmaf(m, e.y, to[1]);
      to[2] = fmaf(m, e.z, to[2]);
      to[3] = fmaf(m, e.w, to[3]);
    };
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      const int row = row0 + i * (kCombineThreads / kColGroups);
      if (span == 0 || row >= head_dim) continue;
      const float* transition_row = transition + row * head_dim;
      if (head_dim % 4 == 0) {
#pragma unroll 8
        for (int c = 0; c < head_dim; c += 4) {
          const float4 m = *reinterpret_cast<const float4*>(transition_row + c);
          accumulate(m.x, c, sum[i]);
          accumulate(m.y, c + 1, sum[i]);
          accumulate(m.z, c + 2, sum[i]);
          accumulate(m.w, c + 3, sum[i]);
        }
      } else {
        for (int c = 0; c < head_dim; ++c) accumulate(transition_row[c], c, sum[i]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      const int row = row0 + i * (kCombineThreads / kColGroups);
      if (row >= head_dim) continue;
      *reinterpret_cast<float4*>(&smem_state[row * kCombineCols + col_in_tile]) =
          make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (col + j < value_dim) state[row * value_dim + col + j] = sum[i][j];
      }
    }
    __syncthreads();
  }
}

}  // namespace remora
