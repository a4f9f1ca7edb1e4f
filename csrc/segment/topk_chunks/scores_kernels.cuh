// Scores of chosen chunks and their gradients. No atomics: every sum has one owner and a fixed order.
//
//   q [B, T, H, D]   k_sum [B, S, Hk, D]   idx, scores [B, T, Hs, k]   (ChunkScoresParams)
//
// A group of eight lanes owns a lookup: it reads a row in pieces of 16 bytes, lane l pieces l, l + 8, ...
//   fwd        a warp owns a row of lookups, four at a time
//   bwd query  the same; gradients of the four groups are added at the end
//   bwd keys   a warp owns a piece of a segment of the plan (pieces.cuh), four lookups at a time
//   bwd add    adds the pieces of segments that were cut
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/copy.cuh"
#include "segment/pieces.cuh"
#include "segment/topk_chunks/params.h"

namespace remora {

constexpr int kScoreWarps = 4;
constexpr int kScoreLookups = 512;  // of a piece

using ScorePieces = PlanPieces<kScoreLookups>;

struct ChunkScoresKernelParams {
  ChunkScoresParams p;
  bool is_aligned;  // rows of q and k_sum allow 16-byte pieces
  float* factors;   // [M, list_heads] gradients of <q, k>; relu only
  float* partial;   // [slots, key heads of a row, D]
};

/// A row of up to 256 channels over the eight lanes of a group; zeros behind its end.
template <typename T>
struct GroupRow {
  static constexpr int kElements = 16 / sizeof(T), kPieces = 256 / (8 * kElements);
  float x[kPieces][kElements];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPieces * kElements; ++i) x[i / kElements][i % kElements] = 0.f;
  }
  __device__ __forceinline__ void load(const T* row, int dim, bool is_aligned) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int col = (static_cast<int>(threadIdx.x) % 8 + i * 8) * kElements;
      union {
        uint4 vector;
        T element[kElements];
      } piece;
      piece.vector = make_uint4(0, 0, 0, 0);
      if (col < dim) {
        piece.vector =
            is_aligned ? *reinterpret_cast<const uint4*>(row + col) : load_unaligned_16(row + col, dim - col);
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[i][e] = static_cast<float>(piece.element[e]);
    }
  }
  __device__ __forceinline__ void add(float factor, const GroupRow& other) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[i][e] = fmaf(factor, other.x[i][e], x[i][e]);
    }
  }
  /// Every lane of the group gets the product.
  __device__ __forceinline__ float dot(const GroupRow& other) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum = fmaf(x[i][e], other.x[i][e], sum);
    }
    return warp_sum<8>(sum);
  }
  /// Sum over the four groups of the warp.
  __device__ __forceinline__ void add_groups() {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        x[i][e] += __shfl_xor_sync(kFullWarp, x[i][e], 8);
        x[i][e] += __shfl_xor_sync(kFullWarp, x[i][e], 16);
      }
    }
  }
  /// By one group.
  template <typename Out>
  __device__ __forceinline__ void store(Out* row, int dim) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int col = (static_cast<int>(threadIdx.x) % 8 + i * 8) * kElements;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (col + e < dim) row[col + e] = static_cast<Out>(x[i][e]);
      }
    }
  }
};

/// A row of lookups, and where it reads.
template <typename T>
struct ScoreRow {
  int64_t b, t, first_head, first_lookup, query_head;
  PackedQuery query;

  __device__ __forceinline__ ScoreRow(const ChunkScoresParams& p, int64_t row) {
    const ChunkScoreShape& shape = p.shape;
    first_head = row % shape.num_lists * shape.list_heads(), first_lookup = row * p.k;
    t = row / shape.num_lists % shape.packed.seqlen, b = row / shape.num_lists / shape.packed.seqlen;
    query = locate_query(shape.packed, t);
    query_head = (b * shape.packed.seqlen + t) * shape.num_heads + first_head;
  }
  __device__ __forceinline__ bool is_chunk(int64_t idx) const { return idx >= 0 && idx < query.num_keys; }
  __device__ __forceinline__ const T* q(const ChunkScoreShape& shape, int64_t h) const {
    return static_cast<const T*>(shape.q) + shape.q_stride.at(b, t, first_head + h);
  }
  __device__ __forceinline__ const T* key(const ChunkScoreShape& shape, int64_t idx, int64_t h) const {
    return static_cast<const T*>(shape.k_sum) +
           shape.k_stride.at(b, query.key_begin + idx, shape.key_head(first_head + h));
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kScoreWarps)
    chunk_scores_fwd_kernel(const __grid_constant__ ChunkScoresKernelParams params) {
  const ChunkScoresParams& p = params.p;
  const ChunkScoreShape& shape = p.shape;
  const int64_t r = int64_t{blockIdx.x} * kScoreWarps + threadIdx.x / 32;
  if (r >= shape.packed.batch * shape.packed.seqlen * shape.num_lists) return;
  const int group = threadIdx.x % 32 / 8, dim = static_cast<int>(shape.dim);
  const ScoreRow<T> row(p, r);
  GroupRow<T> q, key;
  for (int64_t m0 = 0; m0 < p.k; m0 += 4) {
    const int64_t m = row.first_lookup + m0 + group;
    const int64_t idx = m0 + group < p.k ? p.idx[m] : -1;
    const bool is_chunk = row.is_chunk(idx);
    float score = 0.f;
    for (int64_t h = 0; h < shape.list_heads(); ++h) {
      q.load(row.q(shape, h), dim, params.is_aligned);
      key.clear();
      if (is_chunk) key.load(row.key(shape, idx, h), dim, params.is_aligned);
      const float x = q.dot(key);
      if (shape.is_relu) {
        score += (x < 0.f ? 0.f : x) * static_cast<const float*>(shape.w)[row.query_head + h];
      } else {
        score += x;
      }
    }
    if (threadIdx.x % 8 == 0 && m0 + group < p.k) {
      static_cast<float*>(p.scores)[m] = is_chunk ? score * static_cast<float>(shape.scale) : -INFINITY;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kScoreWarps)
    chunk_scores_bwd_query_kernel(const __grid_constant__ ChunkScoresKernelParams params) {
  const ChunkScoresParams& p = params.p;
  const ChunkScoreShape& shape = p.shape;
  const int64_t r = int64_t{blockIdx.x} * kScoreWarps + threadIdx.x / 32;
  if (r >= shape.packed.batch * shape.packed.seqlen * shape.num_lists) return;
  const int group = threadIdx.x % 32 / 8, dim = static_cast<int>(shape.dim);
  const ScoreRow<T> row(p, r);
  // Heads that read the same summaries have the same gradient, unless relu tells them apart.
  const int64_t step = shape.is_relu ? 1 : min(shape.list_heads(), shape.num_heads / shape.num_key_heads);
  for (int64_t h = 0; h < shape.list_heads(); h += step) {
    const float weight = shape.is_relu ? static_cast<const float*>(shape.w)[row.query_head + h] : 1.f;
    GroupRow<T> q, key, dq;
    dq.clear();
    if (shape.is_relu) q.load(row.q(shape, h), dim, params.is_aligned);
    float d_weight = 0.f;
    for (int64_t m0 = 0; m0 < p.k; m0 += 4) {
      const int64_t m = row.first_lookup + m0 + group;
      const int64_t idx = m0 + group < p.k ? p.idx[m] : -1;
      const bool is_chunk = row.is_chunk(idx);
      float factor = is_chunk ? static_cast<float>(shape.scale) * static_cast<const float*>(p.d_scores)[m] : 0.f;
      key.clear();
      if (is_chunk) key.load(row.key(shape, idx, h), dim, params.is_aligned);
      if (shape.is_relu) {
        const float x = q.dot(key);
        if (is_chunk) d_weight += factor * (x < 0.f ? 0.f : x);
        factor = x <= 0.f ? 0.f : factor * weight;
        if (is_chunk && threadIdx.x % 8 == 0) params.factors[m * shape.list_heads() + h] = factor;
      }
      if (is_chunk) dq.add(factor, key);
    }
    dq.add_groups();
    d_weight += __shfl_xor_sync(kFullWarp, d_weight, 8);
    d_weight += __shfl_xor_sync(kFullWarp, d_weight, 16);
    for (int64_t same = h + group; same < h + step; same += 4) {
      dq.store(static_cast<T*>(p.dq) + (row.query_head + same) * dim, dim);
    }
    if (shape.is_relu && threadIdx.x % 32 == 0) static_cast<float*>(p.dw)[row.query_head + h] = d_weight;
  }
}

/// The row [B, S, key heads] of dk_sum that a segment belongs to, -1 if it is none; `of_row` counts its key heads.
__device__ __forceinline__ int64_t d_key_row(const ChunkScoresParams& p, int64_t segment, int64_t of_row) {
  const ChunkScoreShape& shape = p.shape;
  const int64_t row_heads = min(shape.num_lists, shape.num_key_heads), num_chunks = shape.packed.key_seqlen;
  const int64_t row = p.rows[segment];
  if (row < 0 || row >= shape.packed.batch * row_heads * num_chunks) return -1;
  const int64_t b = row / num_chunks / row_heads, row_head = row / num_chunks % row_heads;
  const int64_t heads_of_row = shape.num_key_heads / row_heads;
  return (b * num_chunks + row % num_chunks) * shape.num_key_heads + row_head * heads_of_row + of_row;
}

/// Grid: (pieces, key heads of a row).
template <typename T>
__global__ void __launch_bounds__(32 * kScoreWarps, 2)
    chunk_scores_bwd_keys_kernel(const __grid_constant__ ChunkScoresKernelParams params) {
  const ChunkScoresParams& p = params.p;
  const ChunkScoreShape& shape = p.shape;
  const ScorePieces pieces{p.starts, p.max_rows, p.num_lookups()};
  const int64_t number = int64_t{blockIdx.x} * kScoreWarps + threadIdx.x / 32;
  if (number >= pieces.num_numbers()) return;
  const Piece piece = pieces.find(number);
  if (piece.empty()) return;
  const int64_t to = d_key_row(p, piece.segment, blockIdx.y);
  if (to < 0) return;
  const int group = threadIdx.x % 32 / 8, dim = static_cast<int>(shape.dim);
  // Query heads of a list that read this key head
  const int64_t count = min(shape.list_heads(), shape.num_heads / shape.num_key_heads);
  GroupRow<T> q, sum;
  sum.clear();
  for (int64_t i = piece.begin + group; i < piece.end; i += 4) {
    const int64_t m = clamp_to(p.order[i], 0, p.num_lookups() - 1), r = m / p.k, t = r / shape.num_lists;
    const int64_t h0 = blockIdx.y * count, first_head = r % shape.num_lists * shape.list_heads();
    for (int64_t h = h0; h < h0 + count; ++h) {
      const float factor = shape.is_relu ? params.factors[m * shape.list_heads() + h]
                                         : static_cast<float>(shape.scale) * static_cast<const float*>(p.d_scores)[m];
      q.load(static_cast<const T*>(shape.q) +
                 shape.q_stride.at(t / shape.packed.seqlen, t % shape.packed.seqlen, first_head + h),
             dim, params.is_aligned);
      sum.add(factor, q);
    }
  }
  __syncwarp();
  sum.add_groups();
  if (group != 0) return;
  if (piece.slot < 0) {
    sum.store(static_cast<T*>(p.dk_sum) + to * dim, dim);
  } else {
    sum.store(params.partial + (piece.slot * gridDim.y + blockIdx.y) * dim, dim);
  }
}

/// Grid: (windows, key heads of a row).
template <typename T>
__global__ void __launch_bounds__(32)
    chunk_scores_bwd_add_kernel(const __grid_constant__ ChunkScoresKernelParams params) {
  const ChunkScoresParams& p = params.p;
  const ScorePieces pieces{p.starts, p.max_rows, p.num_lookups()};
  Piece first;
  const int64_t num_pieces = pieces.find_cut(blockIdx.x, first);
  if (num_pieces == 0) return;
  const int64_t to = d_key_row(p, first.segment, blockIdx.y), dim = p.shape.dim;
  if (to < 0) return;
  for (int64_t d = threadIdx.x; d < dim; d += 32) {
    float sum = 0.f;
    for (int64_t i = 0; i < num_pieces; ++i) {
      sum += params.partial[(ScorePieces::slot_of(blockIdx.x, i) * gridDim.y + blockIdx.y) * dim + d];
    }
    static_cast<T*>(p.dk_sum)[to * dim + d] = static_cast<T>(sum);
  }
}

}  // namespace remora
