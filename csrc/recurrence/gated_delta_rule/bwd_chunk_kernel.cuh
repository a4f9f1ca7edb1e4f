// Backward pass of the gated delta rule, second kernel: all gradients of one state interval, chunk by chunk.
//
//   P = K S;  R' = V - e^G P;  r = R' - Y (beta R');  U = beta r;  dV = beta X;  dbeta = <X, r>
//   dA = tril(s dO U^T);  dL = -strict(dV U^T)
//   dQ = s e^G dO S^T + (dA * D) K
//   dK = -e^G dV S^T + (dL * D) K + e^{G_C - G} U dS^T + (dA * D)^T Q + (dL * D)^T K
//   dg_t = sum_{j < t <= i} M_ij + sum_{i >= t} later_i + sum_{j < t} earlier_j + e^{G_C} <S, dS>
//   M = dA * (Q K^T * D) + dL * (K K^T * D), without the diagonal; later, earlier: row dots of the S and dS terms
//
//   q, k          [B, T, H, K]            T, strided
//   v, d_o        [B, T, HV, V]           T
//   dv            [B, T, HV, V]           T: X of the state kernel on entry, dV on exit
//   saved_states  [slots, HV, K, V]       TSaved, entering every kStateInterval tokens
//   d_states      [chunk slots, HV, V, HEAD_DIM]  TSaved, leaving each chunk, of the state kernel
//   inverses      [chunk slots, HV]       CausalTile of -Y, of the state kernel
//   dq, dk        [B, T, H, K]            T
//   dg, dbeta     [B, T, HV]              float
//
// Grid: one CTA per (state slot, key head). It walks the value heads of its group and blocks of STATE_V columns of V;
// for each, the chunks of the interval; for each chunk, V in tiles of BLOCK_V. The columns of the state stay in shared
// memory and move on from chunk to chunk. A warp owns 16 tokens and one of four parts of the columns: of K for dQ and
// dK, of the V tile for r, of the chunk for dA and dL. All that is linear in the columns of V is summed over the
// blocks. The gate gradient takes the rectangle form: each term carries exactly the decay it depends on, nothing
// cancels.
#pragma once
#include "common/barrier.cuh"
#include "common/copy.cuh"
#include "common/hints.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "recurrence/gated_delta_rule/bwd_traits.cuh"
#include "recurrence/sequence.cuh"

namespace remora {

/// Rows of a matrix, which may lie anywhere, to a tile, zeros outside of the first rows and columns; from another type
/// with a conversion. One short body for all cases: the instruction cache is small. A thread copies two pieces of a
/// row, whose place takes more instructions than a copy; which one first depends on the row, for the banks.
template <typename T, int ROWS, int COLS, int kNumThreads, typename RowAt>
__device__ __forceinline__ void copy_rows(uint32_t dst, const RowAt& row_at, int num_rows, int num_cols,
                                          bool is_aligned) {
  using TSource = std::remove_cvref_t<decltype(*row_at(0))>;
  constexpr int kElements = 16 / sizeof(T), kPieces = 2, kUnits = COLS / kPieces / kElements;
#pragma unroll 1
  for (int i = threadIdx.x; i < ROWS * kUnits; i += kNumThreads) {
    const int row = i / kUnits, first = i % kUnits * kElements + row / 2 % 2 * (COLS / 2);
    const TSource* src = row_at(row < num_rows ? row : 0);
    if (std::is_same_v<T, TSource> && is_aligned) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int col = first ^ piece * (COLS / 2);
        const bool valid = row < num_rows && col < num_cols;
        cp_async_16(dst + SmemTile<T, COLS>::offset(row, col), src + (valid ? col : 0), valid);
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        const int col = first ^ piece * (COLS / 2);
        union {
          uint4 vector;
          T element[kElements];
        } x;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const bool valid = row < num_rows && col + e < num_cols;
          x.element[e] = valid ? static_cast<T>(src[col + e]) : static_cast<T>(0.f);
        }
        store_shared(dst + SmemTile<T, COLS>::offset(row, col), x.vector);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ float dot(const FragB<T>& a, const FragB<T>& b) {
  if constexpr (sizeof(T) == 4) {
    return a.r[0] * b.r[0] + a.r[1] * b.r[1] + a.r[2] * b.r[2] + a.r[3] * b.r[3];
  } else {
    const float2 a0 = unpack<T>(a.r[0]), a1 = unpack<T>(a.r[1]), b0 = unpack<T>(b.r[0]), b1 = unpack<T>(b.r[1]);
    return a0.x * b0.x + a0.y * b0.y + a1.x * b1.x + a1.y * b1.y;
  }
}

/// Sum over the lanes at or above this one.
__device__ __forceinline__ float warp_suffix_sum(float x) {
  const int lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const float above = __shfl_down_sync(kFullWarp, x, delta);
    x = lane_idx + delta < 32 ? x + above : x;
  }
  return x;
}

/// Two neighbouring pieces of 8 columns of a row, of which lanes hold two each, to `out` and the 15 elements behind it.
/// For 16-bit types neighbouring lanes exchange halves so that a row gets whole sectors. The whole warp calls it.
template <typename T>
__device__ __forceinline__ void store_row(T* out, float2 lo, float2 hi, bool valid, int num_cols, bool is_aligned) {
  const int lane = threadIdx.x % 4;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col = half * 8 + lane * 2;
      const float2 x = half == 0 ? lo : hi;
      if (is_aligned) {
        if (valid && col < num_cols) *reinterpret_cast<float2*>(out + col) = x;
      } else {
        if (valid && col < num_cols) out[col] = x.x;
        if (valid && col + 1 < num_cols) out[col + 1] = x.y;
      }
    }
  } else {
    const uint32_t first = pack<T>(lo.x, lo.y), second = pack<T>(hi.x, hi.y);
    const bool is_odd = lane % 2;
    const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? first : second, 1);
    const int col = lane % 2 * 8 + lane / 2 * 4;
    union {
      uint2 vector;
      T element[4];
    } x;
    x.vector = is_odd ? make_uint2(other, second) : make_uint2(first, other);
    if (is_aligned) {
      if (valid && col < num_cols) *reinterpret_cast<uint2*>(out + col) = x.vector;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (valid && col + e < num_cols) out[col + e] = x.element[e];
      }
    }
  }
}

/// Place of a thread in the grid of warps, 16 rows by one part of the columns, and in the C fragments of its warp.
struct WarpPlace {
  int thread_idx = read_thread_idx();  // anew, or what follows from it would take registers all the time
  int warp_idx = thread_idx / 32;
  int row_block = warp_idx / kBwdParts;
  int row0 = row_block * 16;
  // Warps w, w + 4, ... share a tensor core: each gets its share of the parts below the diagonal.
  int part = warp_idx % kBwdParts ^ (row_block >> 1 | (row_block & 1) << 1);
  int lane_idx = thread_idx % 32;
  int row = lane_idx / 4;
  int col = thread_idx % 4 * 2;
  __device__ __forceinline__ int token(int i) const { return row0 + row + i * 8; }
};

/// Moves a tile of the state from the beginning of a chunk to its end. `u`: U weighted with k_out.
template <class Traits>
__device__ __forceinline__ void advance_state(uint32_t k, uint32_t state, uint32_t u, float decay) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::BLOCK_V>;
  constexpr int kCols = 32, kColBlocks = Traits::BLOCK_V / kCols, kTiles = kCols / 8;
  const WarpPlace place;
#pragma unroll 1
  for (int block = threadIdx.x / 32; block < Traits::HEAD_DIM / 16 * kColBlocks; block += Traits::kNumWarps) {
    const int row0 = block / kColBlocks * 16, col0 = block % kColBlocks * kCols;
    FragC s[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 x = Tile::load_pair(state, row0 + place.row + i * 8, col0 + n * 8 + place.col);
        s[n].r[2 * i] = decay * x.x;
        s[n].r[2 * i + 1] = decay * x.y;
      }
    }
#pragma unroll 1
    for (int step = 0; step < Traits::BLOCK_T; step += 16) {
      const FragA<T> a = SmemTile<T, Traits::HEAD_DIM>::load_a_trans(k, step, row0);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        FragB<T> b[2];
        Tile::load_b_trans(b, u, step, col0 + n * 8);
        mma_rounded(s[n], a, b[0]);
        mma_rounded(s[n + 1], a, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Tile::store_pair(state, row0 + place.row + i * 8, col0 + n * 8 + place.col, s[n].r[2 * i], s[n].r[2 * i + 1]);
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    gated_delta_rule_bwd_chunk_kernel(const __grid_constant__ GatedDeltaRuleBwdParams params,
                                      const typename Traits::TSaved* __restrict__ d_states,
                                      const uint8_t* __restrict__ inverses, float4* __restrict__ group_sums,
                                      const bool is_aligned) {
  using T = typename Traits::T;
  using TY = typename Traits::TY;
  using TSaved = typename Traits::TSaved;
  using Smem = typename Traits::Smem;
  using Epilogue = typename Smem::Epilogue;
  constexpr int BLOCK_T = Traits::BLOCK_T, BLOCK_V = Traits::BLOCK_V, STATE_V = Traits::STATE_V;
  constexpr int HEAD_DIM = Traits::HEAD_DIM, NUM_BLOCKS = BLOCK_T / 16;
  constexpr int kNumThreads = Traits::kNumThreads, kNumWarps = Traits::kNumWarps, kNumStages = Traits::kNumStages;
  // Columns of a part; the chunk and the V tile may have fewer than four parts of 16.
  constexpr int PART_K = HEAD_DIM / kBwdParts, PART_V = 16, PART_T = 16;
  constexpr int kTilesK = PART_K / 8;
  static_assert(PART_V * kBwdParts >= BLOCK_V && PART_T * kBwdParts >= BLOCK_T);
  using KeyTile = SmemTile<T, HEAD_DIM>;
  using ValueTile = SmemTile<T, BLOCK_V>;
  using Residual = SmemTile<TY, BLOCK_V>;
  using Inverse = CausalTile<TY, BLOCK_T>;
  using Weights = CausalTile<T, BLOCK_T>;

  extern __shared__ __align__(128) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const uint32_t smem_q = smem_address(smem.q), smem_residual = smem_address(smem.residual);

  const RecurrenceShape& shape = params.shape;
  {
    const Chunk interval =
        find_chunk<kStateInterval>(shape, params.cu_seqlens, blockIdx.x / static_cast<uint32_t>(shape.num_heads));
    if (interval.num_tokens == 0) return;
    if (threadIdx.x == 0) smem.interval = interval;
    for (int i = threadIdx.x; i < kStateInterval; i += kNumThreads) {
      const int64_t position = interval.first_token + min(i, interval.num_tokens - 1);
      const TokenRow row = row_at(shape, params.rows, position);
      smem.place[i] = {static_cast<int>(row.batch), static_cast<int>(row.token)};
    }
  }
  __syncthreads();
  // What is rarely needed lies in shared memory: accumulators fill the registers.
  const auto num_chunks = [&] { return (smem.interval.num_tokens + BLOCK_T - 1) / BLOCK_T; };
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const float scale = static_cast<float>(params.scale);
  const int64_t gate_stride = shape.num_value_heads, value_stride = gate_stride * value_dim;

  // Passes: value heads of the group, blocks of V
  int pass = 0;
  do {
    __syncthreads();
    if (threadIdx.x == 0) {
      const int num_v_blocks = (value_dim + STATE_V - 1) / STATE_V, v_begin = pass % num_v_blocks * STATE_V;
      const Chunk& interval = smem.interval;
      const auto num_heads = static_cast<uint32_t>(shape.num_heads);
      const int64_t slot = blockIdx.x / num_heads, key_head = blockIdx.x % num_heads;
      const int group_size = static_cast<uint32_t>(shape.num_value_heads) / num_heads;
      const int64_t head = key_head * group_size + pass / num_v_blocks;
      const int64_t first_token = interval.first_token - interval.chunk_idx * kStateInterval;
      const int64_t chunk_slot =
          first_chunk_slot<BLOCK_T>({first_token, 0}, interval.seq_idx) + interval.chunk_idx * Traits::kChunksPerState;
      auto& to = smem.source;
      to.q = static_cast<const T*>(params.q) + key_head * params.q_stride.head;
      to.k = static_cast<const T*>(params.k) + key_head * params.k_stride.head;
      const TokenStrides d_o_stride = {shape.seqlen * value_stride, value_stride, 0};
      to.value[0] = static_cast<const T*>(params.v) + head * params.v_stride.head + v_begin;
      to.value[1] = static_cast<const T*>(params.dv) + head * value_dim + v_begin;
      to.value[2] = static_cast<const T*>(params.d_o) + head * value_dim + v_begin;
      to.value_stride[0] = params.v_stride;
      to.value_stride[1] = to.value_stride[2] = d_o_stride;
      to.state = static_cast<const TSaved*>(params.saved_states) + (slot * gate_stride + head) * head_dim * value_dim +
                 v_begin;
      to.d_state = d_states + ((chunk_slot * gate_stride + head) * value_dim + v_begin) * HEAD_DIM;
      to.inverse = inverses + (chunk_slot * gate_stride + head) * Inverse::SIZE;
      to.head = head;
      to.key_head = key_head;
      to.num_cols = min(STATE_V, value_dim - v_begin);
      to.num_tiles = (to.num_cols + BLOCK_V - 1) / BLOCK_V;
      to.pass = pass;
      to.is_last = pass + 1 == group_size * num_v_blocks;
      to.adds = v_begin > 0;
    }
    __syncthreads();

    const auto tokens_of = [&](int chunk_idx) { return min(BLOCK_T, smem.interval.num_tokens - chunk_idx * BLOCK_T); };
    const auto offset_of = [&](const TokenStrides& stride, int token) {
      const auto& place = smem.place[token];
      return place.batch * stride.batch + place.token * stride.token;
    };
    const auto row_of = [&](int token) { return smem.place[token].batch * shape.seqlen + smem.place[token].token; };
    const auto load_keys = [&](uint32_t dst, const T* src, const TokenStrides& stride, int chunk_idx) {
      copy_rows<T, BLOCK_T, HEAD_DIM, kNumThreads>(
          dst, [&](int row) { return src + offset_of(stride, chunk_idx * BLOCK_T + row); }, tokens_of(chunk_idx),
          head_dim, is_aligned);
    };
    const auto stage_of = [&](int chunk_idx, int tile) ->
        typename Smem::Stage& { return smem.stage[(chunk_idx * smem.source.num_tiles + tile) % kNumStages]; };
    const auto load_step = [&](int chunk_idx, int tile) {
      typename Smem::Stage& stage = stage_of(chunk_idx, tile);
      const int v0 = tile * BLOCK_V, buffer = chunk_idx % kNumStages;
      const int num_cols = min(BLOCK_V, smem.source.num_cols - v0);
      if (tile == 0) {
        load_keys(smem_address(smem.k[buffer]), smem.source.k, params.k_stride, chunk_idx);
        if (threadIdx.x < BLOCK_T) {
          const bool valid = threadIdx.x < tokens_of(chunk_idx);
          const int64_t at = row_of(valid ? chunk_idx * BLOCK_T + threadIdx.x : 0) * gate_stride + smem.source.head;
          cp_async_4(smem_address(&smem.coef[buffer].beta[threadIdx.x]), static_cast<const float*>(params.beta) + at,
                     valid);
          if (params.g == nullptr) {
            smem.coef[buffer].g[threadIdx.x] = 0.f;
          } else {
            cp_async_4(smem_address(&smem.coef[buffer].g[threadIdx.x]), static_cast<const float*>(params.g) + at,
                       valid);
          }
        }
        const uint8_t* inverse = smem.source.inverse + chunk_idx * gate_stride * Inverse::SIZE;
#pragma unroll 1
        for (int i = threadIdx.x * 16; i < Inverse::SIZE; i += kNumThreads * 16) {
          cp_async_16(smem_address(smem.y[buffer]) + i, inverse + i, true);
        }
      }
      if (chunk_idx == 0) {
        copy_rows<T, HEAD_DIM, BLOCK_V, kNumThreads>(
            smem_address(smem.state[tile]), [&](int row) { return smem.source.state + int64_t{row} * value_dim + v0; },
            head_dim, num_cols, is_aligned);
      }
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {
        copy_rows<T, BLOCK_T, BLOCK_V, kNumThreads>(
            smem_address(stage.value[i]),
            [&](int row) {
              return smem.source.value[i] + offset_of(smem.source.value_stride[i], chunk_idx * BLOCK_T + row) + v0;
            },
            tokens_of(chunk_idx), num_cols, is_aligned);
        if (i == 0) cp_async_commit();
      }
      copy_rows<T, BLOCK_V, HEAD_DIM, kNumThreads>(
          smem_address(stage.d_state),
          [&](int row) { return smem.source.d_state + (chunk_idx * value_stride + v0 + row) * HEAD_DIM; }, num_cols,
          HEAD_DIM, true);
      cp_async_commit();
    };

    FragC dq[kTilesK], dk_row[kTilesK], dk_col[kTilesK], da[2], dl[2];
    // Behind a chunk, not before its first tile, where every tile would choose between each number and zero.
    const auto clear_sums = [&] {
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) dq[n] = dk_row[n] = dk_col[n] = {};
      da[0] = da[1] = dl[0] = dl[1] = {};
    };
    clear_sums();
    // One copy of every piece of code: the first turn of two stages only loads.
    int chunk_idx = 0, tile = kNumStages == 2 ? -1 : 0;
#pragma unroll 1
    while (chunk_idx < num_chunks()) {
      if (kNumStages == 2) cp_async_wait<1>();
      __syncthreads();
      if (tile == 0) load_keys(smem_q, smem.source.q, params.q_stride, chunk_idx);
      cp_async_commit();
      {
        const bool is_last = tile + 1 == smem.source.num_tiles;
        const int load_chunk = kNumStages == 2 ? chunk_idx + is_last : chunk_idx;
        const int load_tile = kNumStages == 1 ? tile : is_last ? 0 : tile + 1;
        if (load_chunk < num_chunks()) {
          load_step(load_chunk, load_tile);
        } else {
          cp_async_commit();
          cp_async_commit();
        }
      }
      if (tile < 0) {
        tile = 0;
        continue;
      }
      if (kNumStages == 1) {
        cp_async_wait<1>();
        __syncthreads();
      }
      typename Smem::Stage& stage = stage_of(chunk_idx, tile);
      WarpPlace place;
      const int buffer = chunk_idx % kNumStages;
      const uint32_t smem_k = smem_address(smem.k[buffer]), smem_y = smem_address(smem.y[buffer]);
      ChunkCoefficients<BLOCK_T>& coef = smem.coef[buffer];
      const uint32_t smem_state = smem_address(smem.state[tile]), smem_d_state = smem_address(stage.d_state);
      const uint32_t smem_u = smem_address(stage.value[0]), smem_dv = smem_address(stage.value[1]);
      const uint32_t smem_d_o = smem_address(stage.value[2]);
      const int col0 = place.part * PART_V, value_place = ValueTile::offset(place.token(0), col0 + place.col);
      const bool has_columns = col0 < BLOCK_V;

      // Gates and norms, beside P
      if (tile == 0) {
        prepare_norms<T, HEAD_DIM, BLOCK_T, kNumWarps, false>({smem_k, 0, 0, 0, 0, &coef}, params.use_qk_l2norm,
                                                              place.warp_idx);
      }
      FragC r[2] = {};
      if (has_columns) {
        // float: rolled up, or the addresses of the many narrow loads spill
#pragma unroll(sizeof(T) == 4 ? 1 : 2)
        for (int step = 0; step < HEAD_DIM; step += 16) {
          const FragA<T> a = KeyTile::load_a(smem_k, place.row0, step);
          FragB<T> b[2];
          ValueTile::load_b_trans(b, smem_state, step, col0);
          mma_rounded(r[0], a, b[0]);
          mma_rounded(r[1], a, b[1]);
        }
      }
      if (tile == 0) __syncthreads();

      // beta R', for 16-bit Y within the range of fp16
      float beta[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) beta[i] = coef.beta[place.token(i)];
      if (has_columns) {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float k_in = coef.rstd_k[place.token(i)] * exp2_approx(coef.cumsum[place.token(i)]);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float2 value = ValueTile::load_pair(ValueTile::place(smem_u, value_place, i * 8, n * 8));
            float (&x)[4] = r[n].r;
            x[2 * i] = value.x - k_in * x[2 * i];
            x[2 * i + 1] = value.y - k_in * x[2 * i + 1];
            largest = fmaxf(largest, fabsf(beta[i]) * fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
          }
        }
        float down = 1.f;
        if constexpr (sizeof(TY) == 2) {
#pragma unroll
          for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, mask));
          const HalfRange range(largest);
          down = range.down;
          if (place.lane_idx == 0) smem.residual_up[place.part][place.row_block] = range.up;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float weight = beta[i] * down;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Residual::store_pair(Residual::place(smem_residual, value_place, i * 8, n * 8), weight * r[n].r[2 * i],
                                 weight * r[n].r[2 * i + 1]);
          }
        }
      }
      cp_async_wait<kNumStages == 2 ? 3 : 0>();
      __syncthreads();

      // r, U, dV and dbeta
      if (has_columns) {
#pragma unroll
        for (int j = 0; j < NUM_BLOCKS; ++j) {  // past the diagonal for nothing, but without a branch
          const bool is_causal = j <= place.row_block;
          const FragA<TY> a =
              SmemBlock<TY>::load_a(smem_y + Inverse::block(place.row_block, is_causal ? j : place.row_block));
          FragB<TY> b[2];
          Residual::load_b_trans(b, smem_residual, j * 16, col0);
          const float up = sizeof(TY) == 2 ? smem.residual_up[place.part][j] : 1.f;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            FragC correction = {};
            mma(correction, a, b[n]);  // -Y
#pragma unroll
            for (int i = 0; i < 4; ++i) r[n].r[i] = is_causal ? fmaf(up, correction.r[i], r[n].r[i]) : r[n].r[i];
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float dbeta = 0.f;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint32_t u = ValueTile::place(smem_u, value_place, i * 8, n * 8);
            const uint32_t dv = ValueTile::place(smem_dv, value_place, i * 8, n * 8);
            const float2 x = ValueTile::load_pair(dv);
            dbeta += x.x * r[n].r[2 * i] + x.y * r[n].r[2 * i + 1];
            ValueTile::store_pair(u, beta[i] * r[n].r[2 * i], beta[i] * r[n].r[2 * i + 1]);
            ValueTile::store_pair(dv, beta[i] * x.x, beta[i] * x.y);
          }
          dbeta = warp_sum<4>(dbeta);
          float& sum = smem.dbeta_sums[place.part][place.token(i)];
          if (place.col == 0) sum = tile == 0 ? dbeta : sum + dbeta;
        }
      }
      __syncthreads();
      {
        constexpr int kElements = 16 / sizeof(T), kUnits = BLOCK_V / kElements;
        const int num_cols = smem.source.num_cols - tile * BLOCK_V;
#pragma unroll 1
        for (int i = threadIdx.x; i < BLOCK_T * kUnits; i += kNumThreads) {
          const int row = i / kUnits, col = i % kUnits * kElements;
          if (row >= tokens_of(chunk_idx) || col >= num_cols) continue;
          union {
            float4 vector;
            T element[kElements];
          } x;
          x.vector = load_shared_4(smem_dv + ValueTile::offset(row, col));
          T* out = const_cast<T*>(smem.source.value[1]) + row_of(chunk_idx * BLOCK_T + row) * value_stride +
                   tile * BLOCK_V + col;
          if (is_aligned) {
            *reinterpret_cast<float4*>(out) = x.vector;
          } else {
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
              if (col + e < num_cols) out[e] = x.element[e];
            }
          }
        }
      }
      const bool advances = chunk_idx + 1 < num_chunks();
      if (advances && has_columns) {  // in place of beta R'
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = place.token(i);
          const float k_out = coef.rstd_k[token] * exp2_approx(coef.decay_at(BLOCK_T - 1) - coef.decay_at(token));
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            ValueTile::store_pair(ValueTile::place(smem_residual, value_place, i * 8, n * 8),
                                  beta[i] * k_out * r[n].r[2 * i], beta[i] * k_out * r[n].r[2 * i + 1]);
          }
        }
      }

      place = WarpPlace();
      // Products that contract V
      float state_dot = 0.f;
#pragma unroll 1
      for (int step = 0; step < BLOCK_V; step += 16) {
        const FragA<T> a_d_o = ValueTile::load_a(smem_d_o, place.row0, step);
        const FragA<T> a_dv = ValueTile::load_a(smem_dv, place.row0, step);
        const FragA<T> a_u = ValueTile::load_a(smem_u, place.row0, step);
        if (place.part <= place.row_block) {
          FragB<T> b[2];
          ValueTile::load_b(b, smem_u, place.part * PART_T, step);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_rounded(da[h], a_d_o, b[h]);
            mma_rounded(dl[h], a_dv, b[h]);
          }
        }
#pragma unroll
        for (int n = 0; n < kTilesK; n += 2) {
          FragB<T> b[2], b_d[2];
          ValueTile::load_b(b, smem_state, place.part * PART_K + n * 8, step);
          KeyTile::load_b_trans(b_d, smem_d_state, step, place.part * PART_K + n * 8);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_rounded(dq[n + h], a_d_o, b[h]);
            mma_rounded(dk_row[n + h], a_dv, b[h]);
            mma_rounded(dk_col[n + h], a_u, b_d[h]);
          }
          if ((step / 16 + n / 2) % NUM_BLOCKS == place.row_block) state_dot += dot(b[0], b_d[0]) + dot(b[1], b_d[1]);
        }
      }
      state_dot = warp_sum(state_dot);
      if (place.lane_idx == 0) {
        float& sum = smem.state_dots[place.warp_idx];
        sum = tile == 0 ? state_dot : sum + state_dot;
      }
      if (advances) {
        __syncthreads();
        advance_state<Traits>(smem_k, smem_state, smem_residual, exp2_approx(coef.cumsum[BLOCK_T - 1]));
      }
      if (tile + 1 < smem.source.num_tiles) {
        ++tile;
        continue;
      }

      // Last tile of the chunk: the rest works in its stage, which nothing is loaded to meanwhile.
      const int num_tokens = tokens_of(chunk_idx), first_place = chunk_idx * BLOCK_T;
      Epilogue& epilogue = reinterpret_cast<Epilogue&>(stage_of(chunk_idx, tile));
      static_assert(sizeof(Epilogue) <= sizeof(typename Smem::Stage));
      const uint32_t smem_a = smem_address(epilogue.a), smem_l = smem_address(epilogue.l);
      cp_async_wait<kNumStages == 2 ? 2 : 0>();
      __syncthreads();
      if (params.use_qk_l2norm) {
        if (place.part == 0) compute_rstd<T, HEAD_DIM>(smem_q, place.row0, coef.rstd_q);
        __syncthreads();
      }

      place = WarpPlace();
      const int key_place = KeyTile::offset(place.token(0), place.part * PART_K + place.col);
      // dQ and dK in units of the unnormalised q and k; sums over tokens of the gate gradient
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = place.token(i);
        const float decay = exp2_approx(coef.cumsum[token]);
        const float q_weight = scale * coef.rstd_q[token] * decay, row_weight = -coef.rstd_k[token] * decay;
        const float col_weight = coef.rstd_k[token] * exp2_approx(coef.decay_at(BLOCK_T - 1) - coef.decay_at(token));
        float later = 0.f, earlier = 0.f;
#pragma unroll
        for (int n = 0; n < kTilesK; ++n) {
          const float2 q = KeyTile::load_pair(KeyTile::place(smem_q, key_place, i * 8, n * 8));
          const float2 k = KeyTile::load_pair(KeyTile::place(smem_k, key_place, i * 8, n * 8));
          float *to_q = &dq[n].r[2 * i], *to_row = &dk_row[n].r[2 * i], *to_col = &dk_col[n].r[2 * i];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float q_e = e == 0 ? q.x : q.y, k_e = e == 0 ? k.x : k.y;
            to_q[e] *= q_weight;
            to_row[e] *= row_weight;
            to_col[e] *= col_weight;
            later += q_e * to_q[e] + k_e * to_row[e];
            earlier += k_e * to_col[e];
            to_row[e] += to_col[e];
          }
        }
        later = warp_sum<4>(later), earlier = warp_sum<4>(earlier);
        if (place.col == 0) {
          epilogue.row_sums[0][place.part][token] = later;
          epilogue.row_sums[1][place.part][token] = earlier;
        }
      }
      FragC(&dk)[kTilesK] = dk_row;

      place = WarpPlace();
      // dA * D and dL * D with the norms folded in, and the rectangle sums of M: over the columns before t, then down
      // the rows from t on
      const int token0 = place.part * PART_T;
      const bool is_causal = place.part <= place.row_block;
      float column[2][2] = {};
      if (is_causal) {
        FragC qk[2] = {}, kk[2] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : 2)
        for (int step = 0; step < HEAD_DIM; step += 16) {
          const FragA<T> a_q = KeyTile::load_a(smem_q, place.row0, step);
          const FragA<T> a_k = KeyTile::load_a(smem_k, place.row0, step);
          FragB<T> b[2];
          KeyTile::load_b(b, smem_k, token0, step);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_rounded(qk[h], a_q, b[h]);
            mma_rounded(kk[h], a_k, b[h]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = place.token(i);
          const auto row_decay = coef.decay_at(row);
          const float weight_a = scale * coef.rstd_q[row], weight_l = -coef.rstd_k[row];
          float carry = 0.f;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int col = token0 + n * 8 + place.col;
            float m[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int distance = row - col - e;
              const float decay = exp2_approx(fminf(row_decay - coef.decay_at(col + e), 0.f)) * coef.rstd_k[col + e];
              float &x = da[n].r[2 * i + e], &y = dl[n].r[2 * i + e];
              x = distance >= 0 ? x * (weight_a * decay) : 0.f;
              y = distance > 0 ? y * (weight_l * decay) : 0.f;
              m[e] = distance > 0 ? x * qk[n].r[2 * i + e] + y * kk[n].r[2 * i + e] : 0.f;
            }
            float prefix = m[0] + m[1];
#pragma unroll
            for (int delta = 1; delta < 4; delta *= 2) {
              const float below = __shfl_up_sync(kFullWarp, prefix, delta, 4);
              prefix = place.lane_idx % 4 >= delta ? prefix + below : prefix;
            }
            const float below = __shfl_up_sync(kFullWarp, prefix, 1, 4);
            const float before = carry + (place.lane_idx % 4 == 0 ? 0.f : below);
            column[n][0] += row >= col ? before : 0.f;
            column[n][1] += row >= col + 1 ? before + m[0] : 0.f;
            carry += __shfl_sync(kFullWarp, prefix, 3, 4);
          }
          if (place.col == 0) epilogue.row_sums[2][place.part][row] = carry;
        }
        SmemBlock<T>::store_c(smem_a + Weights::block(place.row_block, place.part), da);
        SmemBlock<T>::store_c(smem_l + Weights::block(place.row_block, place.part), dl);
      }
      __syncthreads();

      place = WarpPlace();
      // Columns of the parts before this one; meanwhile a warp above the diagonal sums over the tokens.
      if (is_causal) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = place.token(i);
          float before = 0.f;
#pragma unroll 1
          for (int part = 0; part < place.part; ++part) before += epilogue.row_sums[2][part][row];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) column[n][e] += row >= token0 + n * 8 + place.col + e ? before : 0.f;
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) column[n][e] += __shfl_xor_sync(kFullWarp, column[n][e], mask);
            if (place.row == 0) epilogue.column_sums[place.row_block][token0 + n * 8 + place.col + e] = column[n][e];
          }
        }
      }
      const bool sums_gates = place.row_block == 0 && place.part == kBwdParts - 1;
      constexpr int kTokensPerLane = BLOCK_T / 32;
      float dg[kTokensPerLane];
      if (sums_gates) {
        float state_term = 0.f;
#pragma unroll
        for (int warp = 0; warp < kNumWarps; ++warp) state_term += smem.state_dots[warp];
        state_term *= exp2_approx(coef.cumsum[BLOCK_T - 1]);
        float later[kTokensPerLane] = {}, earlier[kTokensPerLane] = {}, later_sum = 0.f, earlier_sum = 0.f;
#pragma unroll
        for (int e = 0; e < kTokensPerLane; ++e) {
          const int token = place.lane_idx * kTokensPerLane + e;
          float dbeta = 0.f;
#pragma unroll
          for (int part = 0; part < kBwdParts; ++part) {
            later[e] += epilogue.row_sums[0][part][token];
            earlier[e] += epilogue.row_sums[1][part][token];
            if (part * PART_V < BLOCK_V) dbeta += smem.dbeta_sums[part][token];
          }
          if (token < num_tokens) {
            float& to = static_cast<float*>(params.dbeta)[row_of(first_place + token) * gate_stride + smem.source.head];
            to = (smem.source.adds ? to : 0.f) + dbeta;
          }
          later_sum += later[e];
          earlier_sum += earlier[e];
        }
        const float later_above = __shfl_down_sync(kFullWarp, warp_suffix_sum(later_sum), 1);
        const float earlier_below = __shfl_up_sync(kFullWarp, warp_inclusive_sum(earlier_sum), 1);
        float from_above = place.lane_idx == 31 ? 0.f : later_above,
              from_below = place.lane_idx == 0 ? 0.f : earlier_below;
#pragma unroll
        for (int e = kTokensPerLane - 1; e >= 0; --e) {
          from_above += later[e];
          dg[e] = state_term + from_above;
        }
#pragma unroll
        for (int e = 0; e < kTokensPerLane; ++e) {
          dg[e] += from_below;
          from_below += earlier[e];
        }
      }
      __syncthreads();
      if (sums_gates) {
#pragma unroll
        for (int e = 0; e < kTokensPerLane; ++e) {
          const int token = place.lane_idx * kTokensPerLane + e;
#pragma unroll 1
          for (int block = token / 16; block < NUM_BLOCKS; ++block) dg[e] += epilogue.column_sums[block][token];
          if (token >= num_tokens || params.dg == nullptr) continue;
          const int64_t at = row_of(first_place + token) * gate_stride + smem.source.head;
          float& to = static_cast<float*>(params.dg)[at];
          to = (smem.source.adds ? to : 0.f) + dg[e];
        }
      }

      place = WarpPlace();
      // Products that contract the chunk
#pragma unroll 1
      for (int j = 0; j <= place.row_block; ++j) {
        const FragA<T> a = SmemBlock<T>::load_a(smem_a + Weights::block(place.row_block, j));
        const FragA<T> l = SmemBlock<T>::load_a(smem_l + Weights::block(place.row_block, j));
#pragma unroll
        for (int n = 0; n < kTilesK; n += 2) {
          FragB<T> b[2];
          KeyTile::load_b_trans(b, smem_k, j * 16, place.part * PART_K + n * 8);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_rounded(dq[n + h], a, b[h]);
            mma_rounded(dk[n + h], l, b[h]);
          }
        }
      }
#pragma unroll 1
      for (int i = place.row_block; i < NUM_BLOCKS; ++i) {
        const FragA<T> a = SmemBlock<T>::load_a_trans(smem_a + Weights::block(i, place.row_block));
        const FragA<T> l = SmemBlock<T>::load_a_trans(smem_l + Weights::block(i, place.row_block));
#pragma unroll
        for (int n = 0; n < kTilesK; n += 2) {
          FragB<T> b_q[2], b_k[2];
          KeyTile::load_b_trans(b_q, smem_q, i * 16, place.part * PART_K + n * 8);
          KeyTile::load_b_trans(b_k, smem_k, i * 16, place.part * PART_K + n * 8);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_rounded(dk[n + h], a, b_q[h], l, b_k[h]);
          }
        }
      }

      tile = 0;
      ++chunk_idx;

      // Sum over the passes, in their order
      if (smem.source.pass > 0 || !smem.source.is_last) {
        float4* sums =
            group_sums +
            (blockIdx.x * int64_t{Traits::kChunksPerState} + chunk_idx - 1) * int64_t{2 * kTilesK * kNumThreads} +
            threadIdx.x;
#pragma unroll
        for (int n = 0; n < 2 * kTilesK; ++n) {
          float (&x)[4] = n < kTilesK ? dq[n].r : dk[n - kTilesK].r;
          float4& sum = sums[n * kNumThreads];
          if (smem.source.pass > 0) x[0] += sum.x, x[1] += sum.y, x[2] += sum.z, x[3] += sum.w;
          if (!smem.source.is_last) sum = {x[0], x[1], x[2], x[3]};
        }
        if (!smem.source.is_last) {
          clear_sums();
          continue;
        }
      }

      // Norms
      if (params.use_qk_l2norm) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = place.token(i);
          float q_dot = 0.f, k_dot = 0.f;
#pragma unroll
          for (int n = 0; n < kTilesK; ++n) {
            const float2 q = KeyTile::load_pair(KeyTile::place(smem_q, key_place, i * 8, n * 8));
            const float2 k = KeyTile::load_pair(KeyTile::place(smem_k, key_place, i * 8, n * 8));
            q_dot += q.x * dq[n].r[2 * i] + q.y * dq[n].r[2 * i + 1];
            k_dot += k.x * dk[n].r[2 * i] + k.y * dk[n].r[2 * i + 1];
          }
          q_dot = warp_sum<4>(q_dot), k_dot = warp_sum<4>(k_dot);
          if (place.col == 0) {
            epilogue.row_sums[0][place.part][token] = q_dot;
            epilogue.row_sums[1][place.part][token] = k_dot;
          }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = place.token(i);
          const float q_rstd = coef.rstd_q[token], k_rstd = coef.rstd_k[token];
          float q_dot = 0.f, k_dot = 0.f;
#pragma unroll
          for (int part = 0; part < kBwdParts; ++part) {
            q_dot += epilogue.row_sums[0][part][token];
            k_dot += epilogue.row_sums[1][part][token];
          }
          q_dot *= q_rstd * q_rstd, k_dot *= k_rstd * k_rstd;
#pragma unroll
          for (int n = 0; n < kTilesK; ++n) {
            const float2 q = KeyTile::load_pair(KeyTile::place(smem_q, key_place, i * 8, n * 8));
            const float2 k = KeyTile::load_pair(KeyTile::place(smem_k, key_place, i * 8, n * 8));
            dq[n].r[2 * i] -= q.x * q_dot;
            dq[n].r[2 * i + 1] -= q.y * q_dot;
            dk[n].r[2 * i] -= k.x * k_dot;
            dk[n].r[2 * i + 1] -= k.y * k_dot;
          }
        }
      }
      place = WarpPlace();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = place.token(i);
        const bool valid = token < num_tokens;
        const int64_t row = row_of(first_place + token);
        const int64_t out = (row * shape.num_heads + smem.source.key_head) * head_dim + place.part * PART_K;
#pragma unroll
        for (int n = 0; n < kTilesK; n += 2) {
          const int left = head_dim - place.part * PART_K - n * 8;
          const auto pair = [&](const FragC& x) { return make_float2(x.r[2 * i], x.r[2 * i + 1]); };
          store_row(static_cast<T*>(params.dq) + out + n * 8, pair(dq[n]), pair(dq[n + 1]), valid, left, is_aligned);
          store_row(static_cast<T*>(params.dk) + out + n * 8, pair(dk[n]), pair(dk[n + 1]), valid, left, is_aligned);
        }
      }
      clear_sums();
    }
    pass = smem.source.pass + 1;
  } while (!smem.source.is_last);
}

}  // namespace remora
