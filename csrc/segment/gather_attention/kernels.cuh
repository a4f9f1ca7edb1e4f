// Attention to chosen blocks on tensor cores.
//
//   q, o [B, T, H, D]   k, v [B, S, Hk, D]   idx [B, T, Hs, n]   (GatherAttentionInputs)
//
// fwd, bwd query   a CTA owns a query of 16 heads that share list and keys; a warp takes every kWarps-th tile of 16
// keys
//                  of the list, across its blocks, or of two levels every kWarps-th block, twice: once for its softmax,
//                  once for the sums. Warps fill tiles of their own with cp.async and meet only at the end.
// bwd keys         a CTA owns up to KEYS keys of a block and a piece of the lookups that chose it (pieces.cuh), a warp
// 16
//                  of the keys; 16 query rows at a time pass by. Scores are transposed, keys by queries, so that they
//                  are operands of both sums as they are.
// bwd add          adds the pieces of blocks that were cut
//
// Probabilities are 2^(x log2(e) - shift) by ex2.approx. Keys that are not visible are zeros in shared memory and are
// selected away.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/copy.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "segment/gather_attention/kernels_launch.h"
#include "segment/pieces.cuh"

namespace remora {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

using GatherPieces = PlanPieces<kGatherLookups>;

template <typename T, int HEAD_DIM>
struct GatherTraits {
  static constexpr int ROW_SIZE = HEAD_DIM * sizeof(T);
  static constexpr int kWarps = ROW_SIZE >= 512 ? 2 : 4;
  static constexpr int kStages = ROW_SIZE >= 1024 ? 1 : 2;
  static constexpr int TILE_SIZE = 16 * ROW_SIZE;
  /// Rows of queries (and their gradients), then stages of keys and values of every warp, later their sums.
  static constexpr int query_smem(int num_query_tiles) {
    return num_query_tiles * TILE_SIZE + kWarps * kStages * 2 * TILE_SIZE;
  }

  // Channels that a CTA sums; float operands take twice the registers.
  static constexpr int QUERY_DIM = HEAD_DIM < 512 / sizeof(T) ? HEAD_DIM : 512 / sizeof(T);
  static constexpr int KEY_DIM = HEAD_DIM < 256 / sizeof(T) ? HEAD_DIM : 256 / sizeof(T);
  static constexpr int KEYS = ROW_SIZE >= 1024 ? 32 : 64;  // of a CTA of bwd keys
  static constexpr int keys_smem(int num_warps) { return (num_warps + kStages) * 2 * TILE_SIZE; }
};

struct GatherFwdKernelParams {
  GatherAttentionFwdParams p;
  bool is_aligned;  // rows of q, k and v allow 16-byte pieces
};

struct GatherBwdKernelParams {
  GatherAttentionBwdParams p;
  bool is_aligned;
  float* losses;   // as lse: what a softmax subtracts from dP, <dO, o> - d_lse, of two levels times the weight
  float* partial;  // [slots, key heads of a row, block, 2, D]
};

/// 16 rows of up to HEAD_DIM channels to a tile, by `num_threads` threads; offset_of(row) is negative where there is no
/// row, and is asked by whole warps.
template <typename T, int HEAD_DIM, typename OffsetOf>
__device__ __forceinline__ void copy_16_rows(uint32_t dst, const T* src, const OffsetOf& offset_of, int dim,
                                             bool is_aligned, int thread_idx, int num_threads) {
  using Tile = SmemTile<T, HEAD_DIM>;
  constexpr int kElements = 16 / sizeof(T), kUnits = HEAD_DIM / kElements;
  constexpr int kUnroll = kUnits >= 64 ? 1 : 4;  // more would spill registers
#pragma unroll kUnroll
  for (int unit = thread_idx; unit < 16 * kUnits; unit += num_threads) {
    const int row = unit / kUnits, col = unit % kUnits * kElements;
    const int64_t offset = offset_of(row);
    const bool valid = offset >= 0 && col < dim;
    if (is_aligned) {
      cp_async_16(dst + Tile::offset(row, col), valid ? src + offset + col : src, valid);
    } else {
      store_shared(dst + Tile::offset(row, col), load_unaligned_16(src + offset + col, valid ? dim - col : 0));
    }
  }
}

/// c [16, 16] = products of the 16 rows of two tiles.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void multiply_tiles(FragC (&c)[2], uint32_t smem_a, uint32_t smem_b) {
  using Tile = SmemTile<T, HEAD_DIM>;
  constexpr int kUnroll = HEAD_DIM * sizeof(T) >= 1024 ? 4 : HEAD_DIM / 16;  // more would spill registers
  c[0] = {}, c[1] = {};
#pragma unroll kUnroll
  for (int k0 = 0; k0 < HEAD_DIM; k0 += 16) {
    const FragA<T> a = Tile::load_a(smem_a, 0, k0);
    FragB<T> b[2];
    Tile::load_b(b, smem_b, 0, k0);
    mma_rounded(c[0], a, b[0]);
    mma_rounded(c[1], a, b[1]);
  }
}

/// sums [16, OUT_DIM] += p [16, 16] times channels [col0, col0 + OUT_DIM) of the 16 rows of a tile.
template <typename T, int HEAD_DIM, int kCount>
__device__ __forceinline__ void accumulate_tile(FragC (&sums)[kCount], const FragC (&p)[2], uint32_t smem_tile,
                                                int col0) {
  using Tile = SmemTile<T, HEAD_DIM>;
  const FragA<T> a = make_a<T>(p[0], p[1]);
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) {
    FragB<T> b[2];
    Tile::load_b_trans(b, smem_tile, 0, col0 + n * 16);
    mma_rounded(sums[2 * n], a, b[0]);
    mma_rounded(sums[2 * n + 1], a, b[1]);
  }
}

/// The query of a CTA: up to 16 heads of a unit.
struct GatherQuery {
  int64_t b, t, first_head, list, key_head, part;
  int num_heads;
  VisibleKeys visible;

  __device__ __forceinline__ GatherQuery(const GatherAttentionInputs& in, int64_t block_idx) {
    const int64_t parts = in.parts_of_unit(), of_unit = block_idx % parts, unit = block_idx / parts % in.num_units();
    t = block_idx / parts / in.num_units() % in.packed.seqlen;
    b = block_idx / parts / in.num_units() / in.packed.seqlen;
    first_head = unit * in.unit_heads() + of_unit * 16;
    num_heads = static_cast<int>(min(in.unit_heads() - of_unit * 16, int64_t{16}));
    list = first_head / in.list_heads(), key_head = first_head / in.group();
    part = unit % in.heads_of_row() * parts + of_unit;
    visible = visible_keys(in, t);
  }
  __device__ __forceinline__ int64_t row(const GatherAttentionInputs& in, int head) const {
    return (b * in.packed.seqlen + t) * in.num_heads + first_head + head;
  }
  __device__ __forceinline__ int64_t first_lookup(const GatherAttentionInputs& in) const {
    return ((b * in.packed.seqlen + t) * in.num_lists + list) * in.num_chosen;
  }
};

/// The tiles of keys that a warp of such a CTA takes.
template <int kWarps>
struct GatherSteps {
  int num_chosen, block, tiles_of_block, warp_idx;
  bool is_two_level;

  __device__ __forceinline__ GatherSteps(const GatherAttentionInputs& in, int warp_idx)
      : num_chosen(static_cast<int>(in.num_chosen)),
        block(static_cast<int>(in.block)),
        tiles_of_block((block + 15) / 16),
        warp_idx(warp_idx),
        is_two_level(in.is_two_level()) {}

  __device__ __forceinline__ int count() const {
    if (is_two_level) return (num_chosen - warp_idx + kWarps - 1) / kWarps * 2 * tiles_of_block;
    const int64_t tiles = (int64_t{num_chosen} * block + 15) / 16;
    return static_cast<int>((tiles - warp_idx + kWarps - 1) / kWarps);
  }
  __device__ __forceinline__ int block_of(int step) const { return warp_idx + step / (2 * tiles_of_block) * kWarps; }
  __device__ __forceinline__ bool is_second(int step) const { return step / tiles_of_block % 2 == 1; }
  __device__ __forceinline__ bool ends_first(int step) const {
    return step % (2 * tiles_of_block) == tiles_of_block - 1;
  }
  /// Key of the batch row that this lane's row of the tile is, -1 for none. Lanes from 16 on repeat the others.
  __device__ __forceinline__ int key(int step, const int32_t* idx, const VisibleKeys& visible) const {
    const int lane = threadIdx.x % 16;
    int m, offset;
    if (is_two_level) {
      m = block_of(step), offset = step % tiles_of_block * 16 + lane;
    } else {
      const int64_t position = (int64_t{step} * kWarps + warp_idx) * 16 + lane;
      m = static_cast<int>(position / block), offset = static_cast<int>(position % block);
    }
    if (m >= num_chosen) return -1;
    const int64_t index = idx[m];
    if (offset >= visible.count(index, block)) return -1;
    return static_cast<int>(visible.key_begin + index * block + offset);
  }
};

/// Keys and values of a step to the warp's stage. Returns the rows that are keys.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ uint32_t copy_keys(const GatherAttentionInputs& in, const GatherQuery& query, int key,
                                              bool with_values, uint32_t stage, bool is_aligned) {
  const int lane_idx = threadIdx.x % 32, dim = static_cast<int>(in.dim);
  const uint32_t valid = __ballot_sync(kFullWarp, key >= 0) & 0xffffu;
  if (valid != 0) {
    const auto offset_in = [&](const HeadStrides& stride) {
      return [&, stride](int row) {
        const int of_row = __shfl_sync(kFullWarp, key, row);
        return of_row < 0 ? int64_t{-1} : stride.at(query.b, of_row, query.key_head);
      };
    };
    copy_16_rows<T, HEAD_DIM>(stage, static_cast<const T*>(in.k), offset_in(in.k_stride), dim, is_aligned, lane_idx,
                              32);
    if (with_values) {
      copy_16_rows<T, HEAD_DIM>(stage + GatherTraits<T, HEAD_DIM>::TILE_SIZE, static_cast<const T*>(in.v),
                                offset_in(in.v_stride), dim, is_aligned, lane_idx, 32);
    }
  }
  cp_async_commit();
  return valid;
}

/// Runs compute(step, valid, stage) for all steps of the warp, with keys in the stage where `valid` is not zero.
template <typename T, int HEAD_DIM, typename Compute>
__device__ __forceinline__ void for_steps(const GatherAttentionInputs& in, const GatherQuery& query, uint32_t smem,
                                          bool values_first, bool is_aligned, const Compute& compute) {
  using Traits = GatherTraits<T, HEAD_DIM>;
  const GatherSteps<Traits::kWarps> steps(in, threadIdx.x / 32);
  const int32_t* idx = in.idx + query.first_lookup(in);
  const uint32_t smem_warp = smem + threadIdx.x / 32 * Traits::kStages * 2 * Traits::TILE_SIZE;
  const int num_steps = steps.count();
  const auto stage_of = [&](int step) { return smem_warp + step % Traits::kStages * 2 * Traits::TILE_SIZE; };
  const auto copy = [&](int step) -> uint32_t {
    if (step >= num_steps) return cp_async_commit(), 0u;
    const bool with_values = values_first || !steps.is_two_level || steps.is_second(step);
    return copy_keys<T, HEAD_DIM>(in, query, steps.key(step, idx, query.visible), with_values, stage_of(step),
                                  is_aligned);
  };
  uint32_t valid = copy(0);
  for (int step = 0; step < num_steps; ++step) {
    uint32_t next = 0;
    if constexpr (Traits::kStages > 1) next = copy(step + 1);
    cp_async_wait<Traits::kStages - 1>();
    __syncwarp();
    compute(steps, step, valid, stage_of(step));
    __syncwarp();
    if constexpr (Traits::kStages == 1) next = copy(step + 1);
    valid = next;
  }
  cp_async_wait<0>();
}

/// The rows of the CTA's heads of a tensor [B, T, H, D] to a tile, by all threads.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void copy_heads(const GatherQuery& query, const void* src, const HeadStrides& stride,
                                           int dim, uint32_t dst, bool is_aligned) {
  const auto offset_of = [&](int row) {
    return row < query.num_heads ? stride.at(query.b, query.t, query.first_head + row) : int64_t{-1};
  };
  copy_16_rows<T, HEAD_DIM>(dst, static_cast<const T*>(src), offset_of, dim, is_aligned, threadIdx.x,
                            32 * GatherTraits<T, HEAD_DIM>::kWarps);
}

/// Elements of a row of sums in shared memory: four rows cover the banks.
template <int OUT_DIM>
constexpr int kSumStride = OUT_DIM + 8;

/// Sums of a warp to shared memory [16][kSumStride].
template <int OUT_DIM>
__device__ __forceinline__ void store_sums(float* smem_sums, const FragC (&sums)[OUT_DIM / 8]) {
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < OUT_DIM / 8; ++n) {
    float* to = smem_sums + row * kSumStride<OUT_DIM> + n * 8 + col;
    *reinterpret_cast<float2*>(to) = make_float2(sums[n].r[0], sums[n].r[1]);
    *reinterpret_cast<float2*>(to + 8 * kSumStride<OUT_DIM>) = make_float2(sums[n].r[2], sums[n].r[3]);
  }
}

__device__ __forceinline__ float quad_sum(float x) { return warp_sum<4>(x); }
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

/// Whether the key of column 8 n + 2 (lane % 4) + e of a C fragment is valid.
__device__ __forceinline__ bool is_valid_key(uint32_t valid, int n, int e) {
  return valid >> (n * 8 + threadIdx.x % 4 * 2 + e) & 1;
}

/// log2 of the sum of 2^x that has greatest term 2^greatest, as a shift: nothing, or only -infinity, gives zeros.
__device__ __forceinline__ float shift_of_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(32 * GatherTraits<T, HEAD_DIM>::kWarps, 2)
    gather_attention_fwd_kernel(const __grid_constant__ GatherFwdKernelParams params) {
  using Traits = GatherTraits<T, HEAD_DIM>;
  constexpr int kWarps = Traits::kWarps, OUT_DIM = Traits::QUERY_DIM;
  const GatherAttentionInputs& in = params.p.in;
  const GatherQuery query(in, blockIdx.x);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32, dim = static_cast<int>(in.dim);
  const int col0 = blockIdx.y * OUT_DIM;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ float smem_greatest[kWarps][16], smem_total[kWarps][16];
  const uint32_t smem_q = smem_address(smem);
  copy_heads<T, HEAD_DIM>(query, in.q, in.q_stride, dim, smem_q, params.is_aligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const float scale = static_cast<float>(in.scale) * kLog2E;
  float* gmem_lse = static_cast<float*>(params.p.lse);
  FragC sums[OUT_DIM / 8] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of rows lane / 4 and row + 8; of this lane's keys
  float shift[2], weight = 1.f;                               // of two levels: of the block
  for_steps<T, HEAD_DIM>(in, query, smem_q + Traits::TILE_SIZE, false, params.is_aligned,
                         [&](const GatherSteps<kWarps>& steps, int step, uint32_t valid, uint32_t stage) {
                           const bool is_sum = !steps.is_two_level || steps.is_second(step);
                           if (valid != 0) {
                             FragC s[2];
                             multiply_tiles<T, HEAD_DIM>(s, smem_q, stage);
#pragma unroll
                             for (int half = 0; half < 2; ++half) {
                               if (!steps.is_two_level || !is_sum) {
                                 float found = greatest[half];
#pragma unroll
                                 for (int i = 0; i < 4; ++i) {
                                   const float x = s[i / 2].r[2 * half + i % 2] * scale;
                                   if (is_valid_key(valid, i / 2, i % 2)) found = fmaxf(found, x);
                                 }
                                 found = quad_max(found);
                                 shift[half] = found == -INFINITY ? 0.f : found;
                                 const float factor = exp2_approx(greatest[half] - shift[half]);
                                 total[half] *= factor;
                                 if (is_sum) {
#pragma unroll
                                   for (FragC& c : sums) c.r[2 * half] *= factor, c.r[2 * half + 1] *= factor;
                                 }
                                 greatest[half] = found;
                               }
#pragma unroll
                               for (int i = 0; i < 4; ++i) {
                                 float& x = s[i / 2].r[2 * half + i % 2];
                                 const float p = exp2_approx(fmaf(x, scale, -shift[half]));
                                 x = is_valid_key(valid, i / 2, i % 2) ? p : 0.f;
                                 if (!steps.is_two_level || !is_sum) total[half] += x;
                                 x *= weight;
                               }
                             }
                             if (is_sum) accumulate_tile<T, HEAD_DIM>(sums, s, stage + Traits::TILE_SIZE, col0);
                           }
                           if (steps.is_two_level && steps.ends_first(step)) {
                             const int m = steps.block_of(step);
#pragma unroll
                             for (int half = 0; half < 2; ++half) {
                               const int head = lane_idx / 4 + half * 8;
                               const float lse = (greatest[half] + log2f(quad_sum(total[half]))) * kLn2;
                               if (lane_idx % 4 == 0 && head < query.num_heads)
                                 gmem_lse[query.row(in, head) * in.num_chosen + m] = lse;
                               shift[half] = shift_of_lse(lse), greatest[half] = -INFINITY, total[half] = 0.f;
                             }
                             weight = static_cast<const float*>(in.weight)[query.first_lookup(in) + m];
                           } else if (steps.is_two_level && step % steps.tiles_of_block == steps.tiles_of_block - 1) {
                             weight = 1.f;
                           }
                         });

  // Sums of the warps
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(total[half]);
    if (lane_idx % 4 == 0) {
      smem_greatest[warp_idx][lane_idx / 4 + half * 8] = greatest[half];
      smem_total[warp_idx][lane_idx / 4 + half * 8] = total[half];
    }
  }
  __syncthreads();
  float* smem_sums = reinterpret_cast<float*>(smem + Traits::TILE_SIZE);
  store_sums<OUT_DIM>(smem_sums + warp_idx * 16 * kSumStride<OUT_DIM>, sums);
  __syncthreads();
  for (int i = threadIdx.x; i < query.num_heads * OUT_DIM; i += 32 * kWarps) {
    const int head = i / OUT_DIM, d = i % OUT_DIM;
    float all_greatest = -INFINITY, all = 0.f, o = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) all_greatest = fmaxf(all_greatest, smem_greatest[warp][head]);
    const float all_shift = all_greatest == -INFINITY ? 0.f : all_greatest;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float factor = in.is_two_level() ? 1.f : exp2_approx(smem_greatest[warp][head] - all_shift);
      all += smem_total[warp][head] * factor;
      o += smem_sums[(warp * 16 + head) * kSumStride<OUT_DIM> + d] * factor;
    }
    if (!in.is_two_level()) {
      o = all == 0.f ? 0.f : o / all;
      if (col0 + d == 0) gmem_lse[query.row(in, head)] = (all_greatest + log2f(all)) * kLn2;
    }
    if (col0 + d < dim) static_cast<T*>(params.p.o)[query.row(in, head) * dim + col0 + d] = static_cast<T>(o);
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(32 * GatherTraits<T, HEAD_DIM>::kWarps, 2)
    gather_attention_bwd_query_kernel(const __grid_constant__ GatherBwdKernelParams params) {
  using Traits = GatherTraits<T, HEAD_DIM>;
  constexpr int kWarps = Traits::kWarps, OUT_DIM = Traits::QUERY_DIM;
  const GatherAttentionBwdParams& p = params.p;
  const GatherAttentionInputs& in = p.in;
  const GatherQuery query(in, blockIdx.x);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32, dim = static_cast<int>(in.dim);
  const int col0 = blockIdx.y * OUT_DIM;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ float smem_loss[16];
  const uint32_t smem_q = smem_address(smem), smem_do = smem_q + Traits::TILE_SIZE;
  copy_heads<T, HEAD_DIM>(query, in.q, in.q_stride, dim, smem_q, params.is_aligned);
  copy_heads<T, HEAD_DIM>(query, p.d_o, p.d_o_stride, dim, smem_do, params.is_aligned);
  cp_async_commit();

  const float* gmem_lse = static_cast<const float*>(p.lse);
  const float* gmem_d_lse = static_cast<const float*>(p.d_lse);
  if (!in.is_two_level()) {
    for (int head = warp_idx; head < query.num_heads; head += kWarps) {
      const int64_t row = query.row(in, head);
      const T* d_o = static_cast<const T*>(p.d_o) + p.d_o_stride.at(query.b, query.t, query.first_head + head);
      float product = 0.f;
      for (int d = lane_idx; d < dim; d += 32) {
        product =
            fmaf(static_cast<float>(d_o[d]), static_cast<float>(static_cast<const T*>(p.o)[row * dim + d]), product);
      }
      product = warp_sum(product) - (gmem_d_lse != nullptr ? gmem_d_lse[row] : 0.f);
      if (gmem_lse[row] == -INFINITY) product = 0.f;
      if (lane_idx == 0) smem_loss[head] = product;
      if (lane_idx == 0 && col0 == 0) params.losses[row] = product;
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float shift[2] = {INFINITY, INFINITY}, loss[2] = {};
  if (!in.is_two_level()) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = lane_idx / 4 + half * 8;
      if (head >= query.num_heads) continue;
      shift[half] = shift_of_lse(gmem_lse[query.row(in, head)]), loss[half] = smem_loss[head];
    }
  }
  const float scale = static_cast<float>(in.scale), scale_log2 = scale * kLog2E;
  FragC sums[OUT_DIM / 8] = {};
  float weight = 1.f, product[2] = {};
  for_steps<T, HEAD_DIM>(
      in, query, smem_do + Traits::TILE_SIZE, true, params.is_aligned,
      [&](const GatherSteps<kWarps>& steps, int step, uint32_t valid, uint32_t stage) {
        const bool is_sum = !steps.is_two_level || steps.is_second(step);
        if (steps.is_two_level && step % (2 * steps.tiles_of_block) == 0) {
          const int m = steps.block_of(step);
          weight = static_cast<const float*>(in.weight)[query.first_lookup(in) + m];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int head = lane_idx / 4 + half * 8;
            product[half] = 0.f;
            shift[half] =
                head < query.num_heads ? shift_of_lse(gmem_lse[query.row(in, head) * in.num_chosen + m]) : INFINITY;
          }
        }
        if (valid != 0) {
          FragC s[2], dp[2];
          multiply_tiles<T, HEAD_DIM>(s, smem_q, stage);
          multiply_tiles<T, HEAD_DIM>(dp, smem_do, stage + Traits::TILE_SIZE);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int n = i / 4, half = i / 2 % 2, e = i % 2;
            float& x = s[n].r[2 * half + e];
            const float probability = exp2_approx(fmaf(x, scale_log2, -shift[half]));
            const float d = dp[n].r[2 * half + e];
            const bool is_key = is_valid_key(valid, n, e);
            if (!is_sum && is_key) product[half] = fmaf(probability, d, product[half]);
            x = is_key ? probability * fmaf(d, weight, -loss[half]) * scale : 0.f;
          }
          if (is_sum) accumulate_tile<T, HEAD_DIM>(sums, s, stage, col0);
        }
        if (steps.is_two_level && steps.ends_first(step)) {
          const int m = steps.block_of(step);
          float d_weight = 0.f;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int head = lane_idx / 4 + half * 8;
            const int64_t at = query.row(in, head) * in.num_chosen + m;
            product[half] = quad_sum(product[half]);
            if (head >= query.num_heads) continue;
            d_weight += product[half];
            loss[half] = weight * product[half];
            if (gmem_d_lse != nullptr && shift[half] != INFINITY) loss[half] -= gmem_d_lse[at];
            if (lane_idx % 4 == 0 && col0 == 0) params.losses[at] = loss[half];
          }
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) d_weight += __shfl_xor_sync(kFullWarp, d_weight, mask);
          if (lane_idx == 0 && col0 == 0) {
            static_cast<float*>(p.dweight)[(query.first_lookup(in) + m) * in.weight_parts() + query.part] = d_weight;
          }
        }
      });

  __syncthreads();
  float* smem_sums = reinterpret_cast<float*>(smem + 2 * Traits::TILE_SIZE);
  store_sums<OUT_DIM>(smem_sums + warp_idx * 16 * kSumStride<OUT_DIM>, sums);
  __syncthreads();
  for (int i = threadIdx.x; i < query.num_heads * OUT_DIM; i += 32 * kWarps) {
    const int head = i / OUT_DIM, d = i % OUT_DIM;
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += smem_sums[(warp * 16 + head) * kSumStride<OUT_DIM> + d];
    if (col0 + d < dim) static_cast<T*>(p.dq)[query.row(in, head) * dim + col0 + d] = static_cast<T>(sum);
  }
}

/// Grid: (pieces, [key heads of a row][parts of a block][slices of the channels]); a warp for 16 keys of a part.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(128, 2)
    gather_attention_bwd_keys_kernel(const __grid_constant__ GatherBwdKernelParams params) {
  using Traits = GatherTraits<T, HEAD_DIM>;
  using Tile = SmemTile<T, HEAD_DIM>;
  constexpr int OUT_DIM = Traits::KEY_DIM, kSlices = HEAD_DIM / OUT_DIM;
  const GatherAttentionBwdParams& p = params.p;
  const GatherAttentionInputs& in = p.in;
  const int num_threads = blockDim.x, warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int dim = static_cast<int>(in.dim), num_parts = static_cast<int>((in.block + Traits::KEYS - 1) / Traits::KEYS);
  const int col0 = blockIdx.y % kSlices * OUT_DIM,
            key0 = static_cast<int>(blockIdx.y) / kSlices % num_parts * Traits::KEYS;
  const int of_row = static_cast<int>(blockIdx.y) / kSlices / num_parts;
  const GatherPieces pieces{p.starts, p.max_rows, in.num_lookups()};
  const Piece piece = pieces.find(blockIdx.x);
  if (piece.empty()) return;
  const KeyBlock block = key_block(in, p.rows[piece.segment]);
  if (key0 >= block.size || col0 >= dim) return;
  const int64_t key_head = block.row_head * in.heads_of_row() + of_row;

  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ float smem_shift[Traits::kStages][16], smem_loss[Traits::kStages][16], smem_weight[Traits::kStages][16];
  __shared__ int smem_visible[Traits::kStages][16];
  const uint32_t smem_stages = smem_address(smem);
  const uint32_t smem_k = smem_stages + (Traits::kStages + warp_idx) * 2 * Traits::TILE_SIZE;
  const uint32_t smem_v = smem_k + Traits::TILE_SIZE;
  const auto key_in = [&](const HeadStrides& stride) {
    return [&, stride](int row) {
      const int key = key0 + warp_idx * 16 + row;
      return key < block.size ? stride.at(block.b, block.begin + key, key_head) : int64_t{-1};
    };
  };
  copy_16_rows<T, HEAD_DIM>(smem_k, static_cast<const T*>(in.k), key_in(in.k_stride), dim, params.is_aligned, lane_idx,
                            32);
  copy_16_rows<T, HEAD_DIM>(smem_v, static_cast<const T*>(in.v), key_in(in.v_stride), dim, params.is_aligned, lane_idx,
                            32);

  const int unit_heads = static_cast<int>(in.unit_heads());
  const int num_rows = static_cast<int>(piece.end - piece.begin) * unit_heads, num_tiles = (num_rows + 15) / 16;
  /// Every warp knows the 16 rows of a tile, lanes 0 to 15 one each.
  const auto copy = [&](int tile) {
    if (tile < num_tiles) {
      const int stage_idx = tile % Traits::kStages, i = tile * 16 + lane_idx % 16;
      int64_t q_offset = -1, d_o_offset = -1;
      float shift = INFINITY, loss = 0.f, weight = 0.f;
      int visible = 0;
      if (i < num_rows) {
        const int64_t lookup = clamp_to(p.order[piece.begin + i / unit_heads], 0, in.num_lookups() - 1);
        const int64_t row = lookup / in.num_chosen, m = lookup % in.num_chosen, list = row % in.num_lists;
        const int64_t t = row / in.num_lists % in.packed.seqlen, b = row / in.num_lists / in.packed.seqlen;
        const int64_t head = list * in.list_heads() + of_row * unit_heads + i % unit_heads;
        const int64_t out = (b * in.packed.seqlen + t) * in.num_heads + head;
        const int64_t at = in.is_two_level() ? out * in.num_chosen + m : out;
        q_offset = in.q_stride.at(b, t, head), d_o_offset = p.d_o_stride.at(b, t, head);
        if (warp_idx == 0) {
          shift = shift_of_lse(static_cast<const float*>(p.lse)[at]), loss = params.losses[at];
          weight = in.is_two_level() ? static_cast<const float*>(in.weight)[lookup] : 1.f;
          visible = static_cast<int>(visible_keys(in, t).count(block.index, in.block));
        }
      }
      if (warp_idx == 0 && lane_idx < 16) {
        smem_shift[stage_idx][lane_idx] = shift, smem_loss[stage_idx][lane_idx] = loss;
        smem_weight[stage_idx][lane_idx] = weight, smem_visible[stage_idx][lane_idx] = visible;
      }
      const uint32_t stage = smem_stages + stage_idx * 2 * Traits::TILE_SIZE;
      copy_16_rows<T, HEAD_DIM>(
          stage, static_cast<const T*>(in.q), [&](int row) { return __shfl_sync(kFullWarp, q_offset, row); }, dim,
          params.is_aligned, threadIdx.x, num_threads);
      copy_16_rows<T, HEAD_DIM>(
          stage + Traits::TILE_SIZE, static_cast<const T*>(p.d_o),
          [&](int row) { return __shfl_sync(kFullWarp, d_o_offset, row); }, dim, params.is_aligned, threadIdx.x,
          num_threads);
    }
    cp_async_commit();
  };

  const float scale = static_cast<float>(in.scale), scale_log2 = scale * kLog2E;
  FragC dk[OUT_DIM / 8] = {}, dv[OUT_DIM / 8] = {};
  copy(0);
  for (int tile = 0; tile < num_tiles; ++tile) {
    if constexpr (Traits::kStages > 1) copy(tile + 1);
    cp_async_wait<Traits::kStages - 1>();
    __syncthreads();
    const int stage_idx = tile % Traits::kStages;
    const uint32_t smem_q = smem_stages + stage_idx * 2 * Traits::TILE_SIZE, smem_do = smem_q + Traits::TILE_SIZE;
    FragC s[2], dp[2];  // [keys, queries]
    multiply_tiles<T, HEAD_DIM>(s, smem_k, smem_q);
    multiply_tiles<T, HEAD_DIM>(dp, smem_v, smem_do);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4, half = i / 2 % 2, e = i % 2, row = n * 8 + lane_idx % 4 * 2 + e;
      const int key = key0 + warp_idx * 16 + lane_idx / 4 + half * 8;
      const float weight = smem_weight[stage_idx][row];
      float &x = s[n].r[2 * half + e], &d = dp[n].r[2 * half + e];
      const bool is_visible = key < smem_visible[stage_idx][row];
      const float probability = exp2_approx(fmaf(x, scale_log2, -smem_shift[stage_idx][row]));
      x = is_visible ? probability * weight : 0.f;
      d = is_visible ? probability * fmaf(d, weight, -smem_loss[stage_idx][row]) * scale : 0.f;
    }
    accumulate_tile<T, HEAD_DIM>(dv, s, smem_do, col0);
    accumulate_tile<T, HEAD_DIM>(dk, dp, smem_q, col0);
    __syncthreads();
    if constexpr (Traits::kStages == 1) copy(tile + 1);
  }
  cp_async_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = key0 + warp_idx * 16 + lane_idx / 4 + half * 8;
    if (key >= block.size) continue;
    const int64_t row = (block.b * in.packed.key_seqlen + block.begin + key) * in.num_key_heads + key_head;
    T* gmem_dk = static_cast<T*>(p.dk) + row * dim;
    T* gmem_dv = static_cast<T*>(p.dv) + row * dim;
    float* gmem_partial = params.partial + ((piece.slot * in.heads_of_row() + of_row) * in.block + key) * 2 * dim;
#pragma unroll
    for (int i = 0; i < OUT_DIM / 4; ++i) {
      const int d = col0 + i / 2 * 8 + lane_idx % 4 * 2 + i % 2;
      if (d >= dim) continue;
      const float x = dk[i / 2].r[2 * half + i % 2], y = dv[i / 2].r[2 * half + i % 2];
      if (piece.slot < 0) {
        gmem_dk[d] = static_cast<T>(x), gmem_dv[d] = static_cast<T>(y);
      } else {
        gmem_partial[d] = x, gmem_partial[dim + d] = y;
      }
    }
  }
}

/// Grid: (windows, key heads of a row).
template <typename T>
__global__ void __launch_bounds__(128)
    gather_attention_bwd_add_kernel(const __grid_constant__ GatherBwdKernelParams params) {
  const GatherAttentionBwdParams& p = params.p;
  const GatherAttentionInputs& in = p.in;
  const GatherPieces pieces{p.starts, p.max_rows, in.num_lookups()};
  Piece first{};
  const int64_t num_pieces = pieces.find_cut(blockIdx.x, first);
  if (num_pieces == 0) return;
  const KeyBlock block = key_block(in, p.rows[first.segment]);
  const int64_t key_head = block.row_head * in.heads_of_row() + blockIdx.y;
  const int dim = static_cast<int>(in.dim);
  for (int i = threadIdx.x; i < block.size * 2 * dim; i += 128) {
    const int key = i / (2 * dim), d = i % dim;
    float sum = 0.f;
    for (int64_t j = 0; j < num_pieces; ++j) {
      const int64_t slot = GatherPieces::slot_of(blockIdx.x, j);
      sum += params.partial[((slot * in.heads_of_row() + blockIdx.y) * in.block) * 2 * dim + i];
    }
    const int64_t row = (block.b * in.packed.key_seqlen + block.begin + key) * in.num_key_heads + key_head;
    static_cast<T*>(i / dim % 2 == 0 ? p.dk : p.dv)[row * dim + d] = static_cast<T>(sum);
  }
}

}  // namespace remora
