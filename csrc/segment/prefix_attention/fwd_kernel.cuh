// Forward pass: one CTA a tile of rows, over the tiles of keys that any of them sees.
//
//   o = sum_j P_j v_j,  P_j = 2^(s_j - m) / sum   with running m and sum, over summaries, band, self and sink
//
// A warp skips blocks of 16 keys that none of its rows sees. With splits, a CTA takes one of them and leaves o and lse
// of its keys in the workspace, in float32.
#pragma once
#include "segment/prefix_attention/key_tiles.cuh"

namespace remora {

struct PrefixFwdKernelParams {
  PrefixAttentionFwdParams op;
  int num_splits;  // of the keys, for the grid's z
  int tiles_per_split[kNumKeySources];
  bool is_aligned;  // all rows lend themselves to pieces of 16 bytes
};

/// Rows of one split in the workspace.
struct PartialRows {
  float *o, *lse;  // [num_splits, B, T, H, D] and [num_splits, B, T, H]

  __device__ __forceinline__ explicit PartialRows(const PrefixFwdKernelParams& p) {
    const AttentionShape& s = p.op.in.shape;
    o = static_cast<float*>(p.op.workspace);
    lse = o + p.num_splits * s.batch * s.seqlen * s.num_heads * s.head_dim;
  }
};

template <typename T, int HEAD_DIM, bool kIsDecode>
struct PrefixFwdTraits {
  static constexpr AttentionConfig kConfig =
      kIsDecode ? attention_decode_config(sizeof(T), HEAD_DIM) : attention_fwd_config(sizeof(T), HEAD_DIM);
  static constexpr int kNumThreads = kConfig.num_threads(), BLOCK_M = kConfig.block_m(), BLOCK_N = kConfig.block_n;
  static constexpr int kNumStages = kConfig.num_stages, M_TILES = kConfig.m_tiles;
  static constexpr int TILE_SIZE = BLOCK_N * HEAD_DIM * sizeof(T);
  static constexpr int SMEM_SIZE = BLOCK_M * HEAD_DIM * static_cast<int>(sizeof(T)) + 2 * kNumStages * TILE_SIZE;
};

template <typename T, int HEAD_DIM, bool kIsDecode>
__global__ void __launch_bounds__(PrefixFwdTraits<T, HEAD_DIM, kIsDecode>::kNumThreads)
    prefix_attention_fwd_kernel(const __grid_constant__ PrefixFwdKernelParams p) {
  using Traits = PrefixFwdTraits<T, HEAD_DIM, kIsDecode>;
  constexpr int M_TILES = Traits::M_TILES, BLOCK_M = Traits::BLOCK_M, BLOCK_N = Traits::BLOCK_N;
  constexpr int kNumThreads = Traits::kNumThreads, kNumStages = Traits::kNumStages, NUM_BLOCKS = BLOCK_N / 16;
  using Warp = WarpRows<M_TILES>;
  const PrefixAttentionInputs& in = p.op.in;
  const int dims = static_cast<int>(in.shape.head_dim), split = blockIdx.z;
  // late rows see most: they go first
  const RowTile rows(in, BLOCK_M, int64_t{gridDim.x} - 1 - blockIdx.x, blockIdx.y);
  if (rows.count == 0) return;
  const int lane_idx = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * M_TILES;

  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ int smem_range[2 * Traits::kConfig.num_warps];
  const uint32_t smem_q = smem_address(smem), smem_kv = smem_q + BLOCK_M * HEAD_DIM * sizeof(T);
  const T* const gmem_q = static_cast<const T*>(in.q);
  load_tile<T, BLOCK_M, HEAD_DIM, kNumThreads>(
      smem_q, gmem_q, [&](int row) { return gmem_q + rows.offset(in.q_stride, row); }, rows.count, dims, p.is_aligned);
  cp_async_commit();

  FragC o[M_TILES][HEAD_DIM / 8] = {};
  float largest[M_TILES][2], sum[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) largest[m][0] = largest[m][1] = -kInfinity, sum[m][0] = sum[m][1] = 0.f;
  const float scale = static_cast<float>(in.scale) * kLog2e;

  // Self and sink. Every lane of a quad holds the sum over its own columns: the first one has the others' too.
  const bool has_own = rows.tokens.is_covered && split == 0;
  if (has_own && in.k_self != nullptr) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Warp::row_of(m, half);
        const int64_t token = rows.tokens.begin + rows.token(row);
        const T* const k =
            static_cast<const T*>(in.k_self) + in.k_self_stride.offset(rows.tokens.batch, token, rows.kv_head);
        const T* const v =
            static_cast<const T*>(in.v_self) + in.v_self_stride.offset(rows.tokens.batch, token, rows.kv_head);
        float dot = 0.f;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
          const int col = n * 8 + lane_idx % 4 * 2;
          const float2 x = SmemTile<T, HEAD_DIM>::load_pair(smem_q, row, col),
                       y = load_pair(k, col, dims, p.is_aligned);
          dot = fmaf(x.y, y.y, fmaf(x.x, y.x, dot));
        }
        largest[m][half] = warp_sum<4>(dot) * scale;
        // a score of -inf weighs nothing, whatever comes
        const bool is_seen = largest[m][half] != -kInfinity;
        sum[m][half] = is_seen && lane_idx % 4 == 0 ? (isinf(largest[m][half]) ? NAN : 1.f) : 0.f;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
          const float2 x = load_pair(v, n * 8 + lane_idx % 4 * 2, dims, p.is_aligned);
          o[m][n].r[2 * half] = is_seen ? x.x : 0.f, o[m][n].r[2 * half + 1] = is_seen ? x.y : 0.f;
        }
      }
    }
  }
  if (has_own && in.sink != nullptr) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float logit = static_cast<const float*>(in.sink)[rows.head(Warp::row_of(m, half))] * kLog2e;
        const float before = largest[m][half], after = fmaxf(before, logit), base = after == -kInfinity ? 0.f : after;
        const float factor = exp2_approx(before - base);
        sum[m][half] = sum[m][half] * factor + (lane_idx % 4 == 0 ? exp2_approx(logit - base) : 0.f);
        largest[m][half] = after;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) o[m][n].r[2 * half] *= factor, o[m][n].r[2 * half + 1] *= factor;
      }
    }
  }

#pragma unroll 1
  for (int s = 0; s < kNumKeySources; ++s) {
    const AttentionKeys& source = in.sources[s];
    if (source.length == 0) continue;
    const AttentionSpan keys = source.span(in.shape, rows.seq_idx);
    const Warp seen(in, source, keys, rows);
    const KeyRange range = range_of_cta<Traits::kConfig.num_warps>(seen.lowest, seen.highest, smem_range);
    const int per_split = p.tiles_per_split[s];
    const int first_tile = max(range.begin / BLOCK_N, split * per_split);
    const int last_tile = min((range.end + BLOCK_N - 1) / BLOCK_N, (split + 1) * per_split);
    const KeyTiles<T, Traits, HEAD_DIM> tiles(source, keys, rows.kv_head, range.end, dims, p.is_aligned, smem_kv);
    if (kNumStages == 2) tiles.load(first_tile, last_tile);
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; ++tile) {
      tiles.load(tile + kNumStages - 1, last_tile);
      cp_async_wait<kNumStages - 1>();
      __syncthreads();
      const int first = tile * BLOCK_N, n_begin = seen.block_begin(first), n_end = seen.block_end(first);
      const uint32_t smem_k = tiles.keys(tile), smem_v = tiles.values(tile);
      if (n_begin < min(n_end, NUM_BLOCKS)) {
        FragC scores[M_TILES][2 * NUM_BLOCKS];
        multiply_rows<T, HEAD_DIM, M_TILES, NUM_BLOCKS>(scores, smem_q, warp_row, smem_k, n_begin, n_end);

#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float after = largest[m][half];
            const float* const bias = bias_of(source, keys, rows.head(Warp::row_of(m, half)));
#pragma unroll
            for (int n = 0; n < NUM_BLOCKS; ++n) {
              if (n < n_begin || n >= n_end) continue;
              const bool is_masked = !seen.all_see(first + n * 16);
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                float& x = scores[m][2 * n + j / 2].r[2 * half + j % 2];
                const int key = first + n * 16 + j / 2 * 8 + lane_idx % 4 * 2 + j % 2;
                x *= scale;
                if (bias != nullptr && key < keys.length) x = fmaf(bias[key], kLog2e, x);
                if (is_masked && (key < seen.begin[m][half] || key >= seen.end[m][half])) x = -kInfinity;
                after = fmaxf(after, x);
              }
            }
            after = fmaxf(after, __shfl_xor_sync(kFullWarp, after, 1));
            after = fmaxf(after, __shfl_xor_sync(kFullWarp, after, 2));
            const float base = after == -kInfinity ? 0.f : after;
            const float factor = exp2_approx(largest[m][half] - base);
            largest[m][half] = after;
            float added = 0.f;
#pragma unroll
            for (int n = 0; n < NUM_BLOCKS; ++n) {
              if (n < n_begin || n >= n_end) continue;
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                float& x = scores[m][2 * n + j / 2].r[2 * half + j % 2];
                x = exp2_approx(x - base);
                added += x;
              }
            }
            sum[m][half] = fmaf(sum[m][half], factor, added);
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) o[m][n].r[2 * half] *= factor, o[m][n].r[2 * half + 1] *= factor;
          }
        }

#pragma unroll
        for (int n = 0; n < NUM_BLOCKS; ++n) {
          if (n < n_begin || n >= n_end) continue;
          FragA<T> weights[M_TILES];
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) weights[m] = make_a<T>(scores[m][2 * n], scores[m][2 * n + 1]);
          add_product<T, HEAD_DIM, M_TILES>(o, weights, smem_v, n * 16, !seen.all_see(first + n * 16));
        }
      }
      __syncthreads();
    }
  }

  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int first = warp_row + m * 16;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Warp::row_of(m, half);
      const float total = warp_sum<4>(sum[m][half]);
      inverse[half] = total == 0.f ? 0.f : 1.f / total;
      const float lse = total == 0.f ? -kInfinity : (largest[m][half] + log2f(total)) * kLn2;
      if (lane_idx % 4 == 0 && row < rows.count) {
        const int64_t place = rows.place(in.shape, row);
        if (p.num_splits == 1) {
          static_cast<float*>(p.op.lse)[place] = lse;
        } else {
          const int64_t num_rows = in.shape.batch * in.shape.seqlen * in.shape.num_heads;
          PartialRows(p).lse[split * num_rows + place] = lse;
        }
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        o[m][n].r[2 * half] *= inverse[half], o[m][n].r[2 * half + 1] *= inverse[half];
      }
    }
    if (p.num_splits == 1) {
      store_rows<T, HEAD_DIM>(o[m], smem_q, first, rows.count - first, dims, p.is_aligned, [&](int row) {
        return static_cast<T*>(p.op.o) + rows.place(in.shape, first + row) * dims;
      });
      continue;
    }
    const int64_t num_rows = in.shape.batch * in.shape.seqlen * in.shape.num_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Warp::row_of(m, half);
      if (row >= rows.count) continue;
      float* const to = PartialRows(p).o + (split * num_rows + rows.place(in.shape, row)) * dims;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        const int col = n * 8 + lane_idx % 4 * 2;
        if (col < dims) to[col] = o[m][n].r[2 * half];
        if (col + 1 < dims) to[col + 1] = o[m][n].r[2 * half + 1];
      }
    }
  }
}

constexpr int kCombineThreads = 128;

/// One softmax out of those of the splits, in their order. Grid: a warp a row.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    prefix_attention_combine_kernel(const __grid_constant__ PrefixFwdKernelParams p) {
  const AttentionShape& shape = p.op.in.shape;
  const int64_t num_rows = shape.batch * shape.seqlen * shape.num_heads;
  const int64_t row = int64_t{blockIdx.x} * (kCombineThreads / 32) + threadIdx.x / 32;
  if (row >= num_rows) return;
  const PartialRows partial(p);
  float largest = -kInfinity, sum = 0.f;
  for (int split = 0; split < p.num_splits; ++split) largest = fmaxf(largest, partial.lse[split * num_rows + row]);
  const float base = largest == -kInfinity ? 0.f : largest;
  for (int split = 0; split < p.num_splits; ++split) {
    sum += exp2_approx((partial.lse[split * num_rows + row] - base) * kLog2e);
  }
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  for (int64_t d = threadIdx.x % 32; d < shape.head_dim; d += 32) {
    float x = 0.f;
    for (int split = 0; split < p.num_splits; ++split) {
      const int64_t at = split * num_rows + row;
      const float weight = exp2_approx((partial.lse[at] - base) * kLog2e);
      if (weight != 0.f) x = fmaf(weight, partial.o[at * shape.head_dim + d], x);
    }
    static_cast<T*>(p.op.o)[row * shape.head_dim + d] = static_cast<T>(x * inverse);
  }
  if (threadIdx.x % 32 == 0) {
    static_cast<float*>(p.op.lse)[row] = sum == 0.f ? -kInfinity : base + logf(sum);
  }
}

}  // namespace remora
