// What the kernels of prefix attention share: which rows a CTA works on, what they see, and the two products.
#pragma once
#include <type_traits>

#include "common/copy.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/smem_tile.cuh"
#include "segment/prefix_attention/params.h"
#include "segment/prefix_attention/traits.h"

namespace remora {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

/// Rows [first, first + count) of one key head of a sequence: row r is token r / group, query head r % group of it.
struct RowTile {
  AttentionSpan tokens;
  int64_t seq_idx;
  int kv_head, group, first, count;

  __device__ __forceinline__ RowTile(const PrefixAttentionInputs& in, int block, int64_t slot, int kv_head_idx)
      : kv_head(kv_head_idx), group(static_cast<int>(in.shape.group())) {
    const AttentionSlots slots = in.row_slots(block);
    seq_idx = slots.owner(slot);
    tokens = in.tokens(seq_idx);
    const int64_t begin = (slot - slots.first_slot(seq_idx)) * block, left = tokens.length * group - begin;
    first = static_cast<int>(begin), count = static_cast<int>(left < 0 ? 0 : left < block ? left : block);
  }
  /// Of row `i` of the tile; of the last one behind it.
  __device__ __forceinline__ int token(int i) const { return (first + min(i, count - 1)) / group; }
  __device__ __forceinline__ int head(int i) const { return kv_head * group + (first + min(i, count - 1)) % group; }
  __device__ __forceinline__ int64_t offset(const AttentionStrides& stride, int i) const {
    return stride.offset(tokens.batch, tokens.begin + token(i), head(i));
  }
  /// In a contiguous [B, T, H].
  __device__ __forceinline__ int64_t place(const AttentionShape& shape, int i) const {
    return (tokens.batch * shape.seqlen + tokens.begin + token(i)) * shape.num_heads + head(i);
  }
};

/// Rows [0, num_rows) and columns [0, dims) of a tile of ROWS x HEAD_DIM, zeros elsewhere. src(row) is its address.
template <typename T, int ROWS, int HEAD_DIM, int kNumThreads, typename Source>
__device__ __forceinline__ void load_tile(uint32_t dst, const T* any, const Source& src, int num_rows, int dims,
                                          bool is_aligned) {
  using Tile = SmemTile<T, HEAD_DIM>;
  constexpr int kElements = 16 / sizeof(T), kUnits = HEAD_DIM / kElements;
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * kUnits; i += kNumThreads) {
    const int row = i / kUnits, col = i % kUnits * kElements;
    const bool is_valid = row < num_rows && col < dims;
    const T* const unit = is_valid ? src(row) + col : any;
    if (is_aligned) {
      cp_async_16(dst + Tile::offset(row, col), unit, is_valid);
    } else {
      store_shared(dst + Tile::offset(row, col), load_unaligned_16(unit, is_valid ? dims - col : 0));
    }
  }
}

/// The rows of one warp: C fragments m, halves `half` of 8 rows each; lanes of a quad share theirs.
template <int M_TILES>
struct WarpRows {
  int begin[M_TILES][2], end[M_TILES][2];  // keys that a row sees
  int lowest, highest;                     // that any row of the warp sees
  int all_begin, all_end;                  // that all of them see

  __device__ __forceinline__ static int row_of(int m, int half) {
    return threadIdx.x / 32 * 16 * M_TILES + m * 16 + half * 8 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ WarpRows(const PrefixAttentionInputs& in, const AttentionKeys& source,
                                      const AttentionSpan& keys, const RowTile& rows) {
    lowest = static_cast<int>(keys.length), highest = 0, all_begin = 0, all_end = lowest;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row_of(m, half), token = rows.token(i);
        const int64_t place = rows.tokens.batch * in.shape.seqlen + rows.tokens.begin + token;
        const KeyRange range = i < rows.count ? source.visible(keys, token, place) : KeyRange{0, 0};
        begin[m][half] = range.begin, end[m][half] = range.end;
        all_begin = max(all_begin, range.begin), all_end = min(all_end, range.end);
        if (range.begin < range.end) lowest = min(lowest, range.begin), highest = max(highest, range.end);
      }
    }
    lowest = warp_min(lowest), highest = warp_max(highest);
    all_begin = warp_max(all_begin), all_end = warp_min(all_end);
  }

  /// Blocks of 16 keys of the tile from key `first` on of which the warp sees any: [block_begin, block_end).
  __device__ __forceinline__ int block_begin(int first) const { return max(lowest - first, 0) / 16; }
  __device__ __forceinline__ int block_end(int first) const { return (max(highest - first, 0) + 15) / 16; }
  __device__ __forceinline__ bool all_see(int first) const { return all_begin <= first && first + 16 <= all_end; }
};

/// c = rows [a_row, a_row + 16 M_TILES) of tile a times the transpose of rows [16 n] of tile b, for blocks n of 16 rows
/// in [n_begin, n_end).
template <typename T, int HEAD_DIM, int M_TILES, int NUM_BLOCKS>
__device__ __forceinline__ void multiply_rows(FragC (&c)[M_TILES][2 * NUM_BLOCKS], uint32_t a_tile, int a_row,
                                              uint32_t b_tile, int n_begin, int n_end) {
  using Tile = SmemTile<T, HEAD_DIM>;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * NUM_BLOCKS; ++n) c[m][n] = {};
  }
#pragma unroll(sizeof(T) == 4 ? 3 : HEAD_DIM / 16)
  for (int k = 0; k < HEAD_DIM; k += 16) {
    FragA<T> a[M_TILES];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) a[m] = Tile::load_a(a_tile, a_row + m * 16, k);
#pragma unroll
    for (int n = 0; n < NUM_BLOCKS; ++n) {
      if (n < n_begin || n >= n_end) continue;
      FragB<T> b[2];
      Tile::load_b(b, b_tile, n * 16, k);
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        mma_rounded(c[m][2 * n], a[m], b[0]);
        mma_rounded(c[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

/// Replaces what is not finite by zero; whether there was any.
template <typename T>
__device__ __forceinline__ bool clear_not_finite(FragB<T>& b) {
  bool found = false;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (float& x : b.r) {
      const bool is_finite = (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
      x = is_finite ? x : 0.f, found |= !is_finite;
    }
  } else {
    constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
#pragma unroll
    for (uint32_t& x : b.r) {
      const uint32_t bad =
          ((x & kExponent) == kExponent ? 0xffffu : 0u) | ((x >> 16 & kExponent) == kExponent ? 0xffff0000u : 0u);
      x &= ~bad, found |= bad != 0;
    }
  }
  return found;
}

/// sums += a times what clear_not_finite took away from rows [k0, k0 + 16) of the tile. An element of a that is zero
/// stands for a row that is not seen.
template <typename T, int HEAD_DIM, int M_TILES>
__device__ __forceinline__ void add_not_finite(FragC (&sums)[M_TILES][HEAD_DIM / 8], const FragA<T> (&a)[M_TILES],
                                               uint32_t tile, int k0) {
  const int lane_idx = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k < 16; ++k) {
    float weight[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 low = pair_of<T>(a[m], half), high = pair_of<T>(a[m], 2 + half);
        const float even = k < 8 ? low.x : high.x, odd = k < 8 ? low.y : high.y;
        weight[m][half] = __shfl_sync(kFullWarp, k % 2 == 0 ? even : odd, lane_idx / 4 * 4 + k % 8 / 2);
      }
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      const float2 x = SmemTile<T, HEAD_DIM>::load_pair(tile, k0 + k, n * 8 + lane_idx % 4 * 2);
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = sums[m][n].r + 2 * half;
          if (weight[m][half] != 0.f && !isfinite(x.x)) to[0] += weight[m][half] * x.x;
          if (weight[m][half] != 0.f && !isfinite(x.y)) to[1] += weight[m][half] * x.y;
        }
      }
    }
  }
}

/// sums += a times rows [k0, k0 + 16) of the tile. is_masked: some elements of a are zero because their row must not be
/// seen; what is not finite then counts only where it is.
template <typename T, int HEAD_DIM, int M_TILES>
__device__ __forceinline__ void add_product(FragC (&sums)[M_TILES][HEAD_DIM / 8], const FragA<T> (&a)[M_TILES],
                                            uint32_t tile, int k0, bool is_masked) {
  bool found = false;
#pragma unroll
  for (int n = 0; n < HEAD_DIM; n += 16) {
    FragB<T> b[2];
    SmemTile<T, HEAD_DIM>::load_b_trans(b, tile, k0, n);
    if (is_masked) {
      found |= clear_not_finite(b[0]);
      found |= clear_not_finite(b[1]);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      mma_rounded(sums[m][n / 8], a[m], b[0]);
      mma_rounded(sums[m][n / 8 + 1], a[m], b[1]);
    }
  }
  if (is_masked && __any_sync(kFullWarp, found)) add_not_finite<T, HEAD_DIM, M_TILES>(sums, a, tile, k0);
}

/// Elements col and col + 1 of a row of `dims`, col even; zeros behind it.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* row, int col, int dims, bool is_aligned) {
  if (is_aligned) {
    if (col >= dims) return {0.f, 0.f};
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float2*>(row + col);
    } else {
      return unpack<T>(*reinterpret_cast<const uint32_t*>(row + col));
    }
  }
  return {col < dims ? static_cast<float>(row[col]) : 0.f, col + 1 < dims ? static_cast<float>(row[col + 1]) : 0.f};
}

/// Writes 16 rows of C fragments as rows of `dims` elements, through rows [row0, row0 + 16) of a tile that only this
/// warp uses. to(row) is the address of row `row` of the 16, of which there are num_rows.
template <typename T, int HEAD_DIM, typename Target>
__device__ __forceinline__ void store_rows(const FragC (&c)[HEAD_DIM / 8], uint32_t tile, int row0, int num_rows,
                                           int dims, bool is_aligned, const Target& to) {
  using Tile = SmemTile<T, HEAD_DIM>;
  constexpr int kElements = 16 / sizeof(T), kUnits = HEAD_DIM / kElements;
  const int lane_idx = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Tile::store_pair(tile, row0 + half * 8 + lane_idx / 4, n * 8 + lane_idx % 4 * 2, c[n].r[2 * half],
                       c[n].r[2 * half + 1]);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane_idx; i < 16 * kUnits; i += 32) {
    const int row = i / kUnits, col = i % kUnits * kElements;
    if (row >= num_rows || col >= dims) continue;
    union {
      float4 vector;
      T element[kElements];
    } unit;
    unit.vector = load_shared_4(tile + Tile::offset(row0 + row, col));
    T* const dst = to(row) + col;
    if (is_aligned) {
      *reinterpret_cast<float4*>(dst) = unit.vector;
    } else {
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        if (col + j < dims) dst[j] = unit.element[j];
      }
    }
  }
}

/// Lowest and highest key that any row of the CTA sees: a collective of all threads. smem [2 kNumWarps].
template <int kNumWarps>
__device__ __forceinline__ KeyRange range_of_cta(int lowest, int highest, int* smem) {
  if constexpr (kNumWarps == 1) return {lowest, highest};
  __syncthreads();
  if (threadIdx.x % 32 == 0) smem[threadIdx.x / 32] = lowest, smem[kNumWarps + threadIdx.x / 32] = highest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) {
    lowest = min(lowest, smem[warp]), highest = max(highest, smem[kNumWarps + warp]);
  }
  return {lowest, highest};
}

}  // namespace remora
