// Backward pass of the gated delta rule, second kernel: all gradients of one chunk of BLOCK_T tokens.
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
//   dq, dk        [B, T, H, K]            T
//   dg, dbeta     [B, T, HV]              float
//
// Grid: one CTA per (chunk slot, key head). It walks the value heads of its group, and V in tiles of BLOCK_V. A warp
// owns 16 tokens and one half of the columns: of K for dQ and dK, of the V tile for r, of the chunk for dA and dL. The
// state of a chunk that does not begin at a saved one is recomputed from the chunks in between, tile by tile.
// The gate gradient takes the rectangle form: each term carries exactly the decay it depends on, nothing cancels.
#pragma once
#include "common/barrier.cuh"
#include "common/copy.cuh"
#include "common/reduce.cuh"
#include "recurrence/gated_delta_rule/bwd_traits.cuh"
#include "recurrence/sequence.cuh"

namespace remora {

/// copy_tile_async, or a conversion from a wider type.
template <typename T, int ROWS, int COLS, int kNumThreads, typename TSource>
__device__ __forceinline__ void load_tile(uint32_t dst, const TSource* src, int64_t stride, int num_rows, int num_cols,
                                          bool is_aligned) {
  if constexpr (std::is_same_v<T, TSource>) {
    copy_tile_async<T, ROWS, COLS, kNumThreads>(dst, src, stride, num_rows, num_cols, is_aligned, threadIdx.x);
  } else {
    for (int i = threadIdx.x; i < ROWS * COLS / 2; i += kNumThreads) {
      const int row = i / (COLS / 2), col = i % (COLS / 2) * 2;
      const float x = row < num_rows && col < num_cols ? src[row * stride + col] : 0.f;
      const float y = row < num_rows && col + 1 < num_cols ? src[row * stride + col + 1] : 0.f;
      SmemTile<T, COLS>::store_pair(dst, row, col, x, y);
    }
  }
}

/// Rows of a chunk of tokens to a tile. `src` is the first of them or, with `rows`, the first row of the tensor, and
/// `rows` those of the chunk.
template <typename T, int ROWS, int COLS, int kNumThreads>
__device__ __forceinline__ void load_tokens(uint32_t dst, const T* src, const TokenStrides& stride,
                                            const RecurrenceShape& shape, const int32_t* rows, int num_rows,
                                            int num_cols, bool is_aligned, int thread_idx) {
  if (rows == nullptr) {
    copy_tile_async<T, ROWS, COLS, kNumThreads>(dst, src, stride.token, num_rows, num_cols, is_aligned, thread_idx);
    return;
  }
  constexpr int kElements = 16 / sizeof(T), kUnits = COLS / kElements;
  const int col = thread_idx % kUnits * kElements;
#pragma unroll 1
  for (int row = thread_idx / kUnits; row < ROWS; row += kNumThreads / kUnits) {
    const bool valid = row < num_rows && col < num_cols;
    const T* from = valid ? src + routed_row(shape, rows[row]).offset(stride) + col : src;
    const uint32_t to = dst + SmemTile<T, COLS>::offset(row, col);
    if (is_aligned) {
      cp_async_16(to, from, valid);
    } else {
      store_shared(to, load_unaligned_16(from, valid ? num_cols - col : 0));
    }
  }
}

/// Writes the first rows and columns of a tile to global memory: to rows of `stride` elements from `dst` on or, with
/// `rows`, to those of them.
template <typename T, int ROWS, int COLS, int kNumThreads>
__device__ __forceinline__ void store_tokens(T* dst, int64_t stride, const RecurrenceShape& shape, const int32_t* rows,
                                             int num_rows, int num_cols, uint32_t src, bool is_aligned) {
  constexpr int kElements = 16 / sizeof(T), kUnits = COLS / kElements;
  for (int i = threadIdx.x; i < ROWS * kUnits; i += kNumThreads) {
    const int row = i / kUnits, col = i % kUnits * kElements;
    if (row >= num_rows || col >= num_cols) continue;
    union {
      float4 vector;
      T element[kElements];
    } x;
    x.vector = load_shared_4(src + SmemTile<T, COLS>::offset(row, col));
    T* out = dst + (rows == nullptr ? row : routed_row(shape, rows[row]).row) * stride + col;
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

/// g (null: 0) and beta of the tokens of a chunk, zero past its end; pointers and `rows` as those of load_tokens.
template <int BLOCK_T>
__device__ __forceinline__ void load_gates(ChunkCoefficients<BLOCK_T>& coef, const float* g, const float* beta,
                                           int64_t stride, const RecurrenceShape& shape, const int32_t* rows,
                                           int num_tokens, int thread_idx) {
  if (thread_idx >= BLOCK_T) return;
  const bool valid = thread_idx < num_tokens;
  const int64_t row = !valid ? 0 : rows == nullptr ? thread_idx : routed_row(shape, rows[thread_idx]).row;
  cp_async_4(smem_address(&coef.beta[thread_idx]), beta + row * stride, valid);
  if (g == nullptr) {
    coef.g[thread_idx] = 0.f;
  } else {
    cp_async_4(smem_address(&coef.g[thread_idx]), g + row * stride, valid);
  }
}

/// Powers of two that bring numbers of magnitude up to `largest` to the upper range of fp16, and back. `down` stays
/// below 2^61, so that what it scales beside them does not overflow.
struct HalfRange {
  float down = 1.f, up = 1.f;
  __device__ __forceinline__ explicit HalfRange(float largest) {
    constexpr uint32_t kTop = 13;
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 80u), 240u);
    down = __uint_as_float((254 + kTop - exponent) << 23);
    up = __uint_as_float((exponent - kTop) << 23);
  }
};

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

/// Place of a thread in the grid of warps: 16 rows by one of two halves, and in the C fragments of its warp.
struct WarpPlace {
  int warp_idx = threadIdx.x / 32;
  int row_block = warp_idx / 2;
  int row0 = row_block * 16;
  int half = warp_idx % 2;
  int row = threadIdx.x % 32 / 4;
  int col = threadIdx.x % 4 * 2;
  __device__ __forceinline__ int token(int i) const { return row0 + row + i * 8; }
};

/// r of a chunk in C fragments. Contains barriers of the CTA, the last one after writing beta R'.
template <class Traits>
__device__ __forceinline__ void compute_residual(FragC (&r)[Traits::BLOCK_V / 16], typename Traits::Smem& smem,
                                                 uint32_t k, uint32_t state, uint32_t v, uint32_t y,
                                                 const ChunkCoefficients<Traits::BLOCK_T>& coef) {
  using T = typename Traits::T;
  using TY = typename Traits::TY;
  constexpr int kTiles = Traits::BLOCK_V / 16;
  const WarpPlace place;
  const int col0 = place.half * (Traits::BLOCK_V / 2);
  FragC p[kTiles] = {};
  // float: rolled up, or the addresses of the many narrow loads spill
#pragma unroll(sizeof(T) == 4 ? 1 : Traits::HEAD_DIM / 16)
  for (int step = 0; step < Traits::HEAD_DIM; step += 16) {
    const FragA<T> a = SmemTile<T, Traits::HEAD_DIM>::load_a(k, place.row0, step);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      FragB<T> b[2];
      SmemTile<T, Traits::BLOCK_V>::load_b_trans(b, state, step, col0 + n * 8);
      mma(p[n], a, b[0]);
      mma(p[n + 1], a, b[1]);
    }
  }
  float beta[2], largest = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float decay = coef.k_in[place.token(i)];
    beta[i] = coef.beta[place.token(i)];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 value = SmemTile<T, Traits::BLOCK_V>::load_pair(v, place.token(i), col0 + n * 8 + place.col);
      float (&x)[4] = r[n].r;
      x[2 * i] = value.x - decay * p[n].r[2 * i];
      x[2 * i + 1] = value.y - decay * p[n].r[2 * i + 1];
      largest = fmaxf(largest, fabsf(beta[i]) * fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
    }
  }
  float up = 1.f;
  if constexpr (sizeof(TY) == 2) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, mask));
    if (threadIdx.x % 32 == 0) smem.warp_values[place.warp_idx] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < Traits::kNumWarps; ++warp) largest = fmaxf(largest, smem.warp_values[warp]);
    const HalfRange range(largest);
    beta[0] *= range.down;
    beta[1] *= range.down;
    up = range.up;
  }
  const uint32_t residual = smem_address(smem.residual);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      SmemTile<TY, Traits::BLOCK_V>::store_pair(residual, place.token(i), col0 + n * 8 + place.col,
                                                beta[i] * r[n].r[2 * i], beta[i] * r[n].r[2 * i + 1]);
    }
  }
  __syncthreads();
  FragC correction[kTiles] = {};
  for (int j = 0; j <= place.row_block; ++j) {
    const FragA<TY> a = SmemBlock<TY>::load_a(y + CausalTile<TY, Traits::BLOCK_T>::block(place.row_block, j));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      FragB<TY> b[2];
      SmemTile<TY, Traits::BLOCK_V>::load_b_trans(b, residual, j * 16, col0 + n * 8);
      mma(correction[n], a, b[0]);
      mma(correction[n + 1], a, b[1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[n].r[i] += up * correction[n].r[i];  // y holds -Y
  }
}

/// Moves a tile of the state from the beginning of an earlier chunk to its end, given r of that chunk. `u`: room for
/// the weighted r. Ends with a barrier of the CTA.
template <class Traits>
__device__ __forceinline__ void advance_state(const FragC (&r)[Traits::BLOCK_V / 16], uint32_t k, uint32_t state,
                                              uint32_t u, const ChunkCoefficients<Traits::BLOCK_T>& coef) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::BLOCK_V>;
  constexpr int kTiles = Traits::BLOCK_V / 8;
  const WarpPlace place;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float weight = coef.beta[place.token(i)] * coef.k_out[place.token(i)];
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      Tile::store_pair(u, place.token(i), place.half * (Traits::BLOCK_V / 2) + n * 8 + place.col,
                       weight * r[n].r[2 * i], weight * r[n].r[2 * i + 1]);
    }
  }
  __syncthreads();
  const float decay = exp2_approx(coef.cumsum[Traits::BLOCK_T - 1]);
  for (int row0 = place.warp_idx * 16; row0 < Traits::HEAD_DIM; row0 += Traits::kNumWarps * 16) {
    FragC s[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 x = Tile::load_pair(state, row0 + place.row + i * 8, n * 8 + place.col);
        s[n].r[2 * i] = decay * x.x;
        s[n].r[2 * i + 1] = decay * x.y;
      }
    }
#pragma unroll(sizeof(T) == 4 ? 1 : Traits::BLOCK_T / 16)
    for (int step = 0; step < Traits::BLOCK_T; step += 16) {
      const FragA<T> a = SmemTile<T, Traits::HEAD_DIM>::load_a_trans(k, step, row0);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        FragB<T> b[2];
        Tile::load_b_trans(b, u, step, n * 8);
        mma(s[n], a, b[0]);
        mma(s[n + 1], a, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Tile::store_pair(state, row0 + place.row + i * 8, n * 8 + place.col, s[n].r[2 * i], s[n].r[2 * i + 1]);
      }
    }
  }
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    gated_delta_rule_bwd_chunk_kernel(const __grid_constant__ GatedDeltaRuleBwdParams params,
                                      const typename Traits::TSaved* __restrict__ d_states,
                                      float4* __restrict__ group_sums, const bool is_aligned) {
  using T = typename Traits::T;
  using TSaved = typename Traits::TSaved;
  using Smem = typename Traits::Smem;
  constexpr int BLOCK_T = Traits::BLOCK_T, BLOCK_V = Traits::BLOCK_V, HEAD_DIM = Traits::HEAD_DIM;
  constexpr int kNumThreads = Traits::kNumThreads, kNumWarps = Traits::kNumWarps, kNumStages = Traits::kNumStages;
  constexpr int HALF_T = BLOCK_T / 2, HALF_V = BLOCK_V / 2, HALF_K = HEAD_DIM / 2;
  constexpr int kTilesT = HALF_T / 8, kTilesV = HALF_V / 8, kTilesK = HALF_K / 8;
  // Eight warps prepare the chunk and the one before it side by side; four prepare earlier chunks as they come.
  constexpr bool kPreparesBoth = kNumWarps == 8;
  static_assert(kPreparesBoth ? Traits::kChunksPerState == 2 : kNumWarps == 4);
  using KeyTile = SmemTile<T, HEAD_DIM>;
  using ValueTile = SmemTile<T, BLOCK_V>;
  using Weights = CausalTile<T, BLOCK_T>;

  extern __shared__ __align__(128) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  const uint32_t smem_k = smem_address(smem.k), smem_q = smem_address(smem.q);
  const uint32_t smem_a = smem_address(smem.weights.a), smem_l = smem_address(smem.weights.l);
  const uint32_t smem_y[2] = {smem_address(smem.y[0]), smem_address(smem.y[1])};

  const WarpPlace place;
  const int lane_idx = threadIdx.x % 32;
  const RecurrenceShape& shape = params.shape;
  const auto num_heads = static_cast<uint32_t>(shape.num_heads);
  const int64_t slot = blockIdx.x / num_heads, key_head = blockIdx.x % num_heads;
  const Chunk chunk = find_chunk<BLOCK_T>(shape, params.cu_seqlens, slot);
  if (chunk.num_tokens == 0) return;
  const int num_tokens = chunk.num_tokens;
  // Of the chunk; offsets are those of its first token or, with rows, of the first row.
  const int32_t* rows = params.rows == nullptr ? nullptr : params.rows + chunk.first_token;
  const TokenRow first = rows == nullptr ? row_at(shape, nullptr, chunk.first_token) : TokenRow{0, 0, 0};
  const int num_earlier = static_cast<int>(chunk.chunk_idx % Traits::kChunksPerState);
  const int64_t state_slot = first_state_slot(chunk.first_token - chunk.chunk_idx * BLOCK_T, chunk.seq_idx) +
                             chunk.chunk_idx / Traits::kChunksPerState;

  const int group_size = static_cast<uint32_t>(shape.num_value_heads) / num_heads;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const float scale = static_cast<float>(params.scale);
  const TokenStrides &q_stride = params.q_stride, &k_stride = params.k_stride, &v_stride = params.v_stride;
  const T* gmem_k = static_cast<const T*>(params.k) + first.offset(k_stride) + key_head * k_stride.head;
  load_tokens<T, BLOCK_T, HEAD_DIM, kNumThreads>(smem_k, gmem_k, k_stride, shape, rows, num_tokens, head_dim,
                                                 is_aligned, threadIdx.x);
  if (threadIdx.x == 0) {
    smem.source.k = gmem_k;
    smem.source.rows = rows;
    smem.source.q = static_cast<const T*>(params.q) + first.offset(q_stride) + key_head * q_stride.head;
  }

  for (int group_idx = 0; group_idx < group_size; ++group_idx) {
    const int64_t head = key_head * group_size + group_idx;
    const int64_t gate_stride = shape.num_value_heads;
    const int64_t token_head = first.row * gate_stride + head;  // of [B, T, HV]
    const int64_t value_stride = gate_stride * value_dim;
    const TokenStrides d_o_stride = {shape.seqlen * value_stride, value_stride, value_dim};
    if (threadIdx.x == 0) {
      auto& to = smem.source;
      to.v = static_cast<const T*>(params.v) + first.offset(v_stride) + head * v_stride.head;
      to.d_o = static_cast<const T*>(params.d_o) + token_head * value_dim;
      to.dv = static_cast<T*>(params.dv) + token_head * value_dim;
      to.state =
          static_cast<const TSaved*>(params.saved_states) + (state_slot * gate_stride + head) * head_dim * value_dim;
      to.d_state = d_states + (slot * gate_stride + head) * value_dim * HEAD_DIM;
      to.g = params.g == nullptr ? nullptr : static_cast<const float*>(params.g) + token_head;
      to.beta = static_cast<const float*>(params.beta) + token_head;
    }
    __syncthreads();

    const auto earlier_rows = [&](int num_back) {
      return smem.source.rows == nullptr ? nullptr : smem.source.rows - num_back * BLOCK_T;
    };
    const auto load_earlier_keys = [&](int num_back) {
      const int64_t back = smem.source.rows == nullptr ? num_back * BLOCK_T : 0;
      load_tokens<T, BLOCK_T, HEAD_DIM, kNumThreads>(smem_q, smem.source.k - back * k_stride.token, k_stride, shape,
                                                     earlier_rows(num_back), BLOCK_T, head_dim, is_aligned,
                                                     threadIdx.x);
      load_gates(smem.coef[1], smem.source.g == nullptr ? nullptr : smem.source.g - back * gate_stride,
                 smem.source.beta - back * gate_stride, gate_stride, shape, earlier_rows(num_back), BLOCK_T,
                 threadIdx.x);
    };
    const auto load_values = [&](uint32_t dst, const T* src, const TokenStrides& stride, int num_back, int v0) {
      load_tokens<T, BLOCK_T, BLOCK_V, kNumThreads>(
          dst, src - (smem.source.rows == nullptr ? num_back * BLOCK_T : 0) * stride.token + v0, stride, shape,
          earlier_rows(num_back), num_back > 0 ? BLOCK_T : num_tokens, min(BLOCK_V, value_dim - v0), is_aligned,
          threadIdx.x);
    };
    const auto load_stage = [&](typename Smem::Stage& stage, int v0) {
      const int num_cols = min(BLOCK_V, value_dim - v0);
      load_tile<T, HEAD_DIM, BLOCK_V, kNumThreads>(smem_address(stage.state), smem.source.state + v0, value_dim,
                                                   head_dim, num_cols, is_aligned);
      load_values(smem_address(stage.u), smem.source.v, v_stride, 0, v0);
      load_values(smem_address(stage.dv), smem.source.dv, d_o_stride, 0, v0);
      load_values(smem_address(stage.d_o), smem.source.d_o, d_o_stride, 0, v0);
      load_tile<T, BLOCK_V, HEAD_DIM, kNumThreads>(smem_address(stage.d_state),
                                                   smem.source.d_state + int64_t{v0} * HEAD_DIM, HEAD_DIM, num_cols,
                                                   HEAD_DIM, true);
      if (kPreparesBoth && num_earlier > 0) {
        load_values(smem_address(stage.earlier_u), smem.source.v, v_stride, 1, v0);
      }
      cp_async_commit();
    };
    const auto chunk_tiles = [&](int idx, uint32_t keys, uint32_t scratch) {
      return ChunkTiles<BLOCK_T>{keys, 0, 0, smem_address(smem.y[idx]), scratch, &smem.coef[idx]};
    };

    // Gates, norms and inverses
    load_gates(smem.coef[0], smem.source.g, smem.source.beta, gate_stride, shape, smem.source.rows, num_tokens,
               threadIdx.x);
    if (kPreparesBoth && num_earlier > 0) load_earlier_keys(1);
    cp_async_commit();
    if constexpr (kNumStages == 2) {
      load_stage(smem.stage[0], 0);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const int role = place.warp_idx / 4;
    if (role == 0 || num_earlier > 0) {
      auto& pairs = reinterpret_cast<typename Smem::Pairs&>(smem.stage[kNumStages - 1]);
      static_assert(sizeof(typename Smem::Pairs) <= sizeof(typename Smem::Stage));
      prepare_chunk<T, HEAD_DIM, BLOCK_T, 4, false, typename Traits::TY>(
          chunk_tiles(role, role == 0 ? smem_k : smem_q, smem_address(pairs.scratch[role])), scale,
          params.use_qk_l2norm, place.warp_idx % 4, 1 + role);
    }
    __syncthreads();
    int earlier_ready = kPreparesBoth ? 1 : 0;  // how many chunks back coef[1] and y[1] are

    FragC dq[kTilesK] = {}, dk_row[kTilesK] = {}, dk_col[kTilesK] = {};
    FragC da[kTilesT] = {}, dl[kTilesT] = {};
    float dbeta[2] = {}, state_dot[2] = {};
    int stage_idx = 0;
    for (int v0 = 0; v0 < value_dim; v0 += BLOCK_V) {
      typename Smem::Stage& stage = smem.stage[stage_idx];
      const bool is_last = v0 + BLOCK_V >= value_dim;
      if constexpr (kNumStages == 2) {
        stage_idx ^= 1;
        if (is_last) {
          cp_async_wait<0>();
        } else {
          load_stage(smem.stage[stage_idx], v0 + BLOCK_V);
          cp_async_wait<1>();
        }
      } else {
        load_stage(stage, v0);
        cp_async_wait<0>();
      }
      __syncthreads();
      const uint32_t smem_state = smem_address(stage.state), smem_d_state = smem_address(stage.d_state);
      const uint32_t smem_u = smem_address(stage.u), smem_dv = smem_address(stage.dv);
      const uint32_t smem_d_o = smem_address(stage.d_o), smem_earlier_u = smem_address(stage.earlier_u);

      // The state that enters the chunk
      for (int num_back = num_earlier; num_back > 0; --num_back) {
        if constexpr (!kPreparesBoth) {
          static_assert(sizeof(smem.residual) >= CausalTile<float, BLOCK_T>::SIZE || kPreparesBoth);
          load_values(smem_earlier_u, smem.source.v, v_stride, num_back, v0);
          const bool is_ready = earlier_ready == num_back;
          if (!is_ready) load_earlier_keys(num_back);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
          if (!is_ready) {
            prepare_chunk<T, HEAD_DIM, BLOCK_T, 4, false, typename Traits::TY>(
                chunk_tiles(1, smem_q, smem_address(smem.residual)), scale, params.use_qk_l2norm, place.warp_idx, 1);
            __syncthreads();
            earlier_ready = num_back;
          }
        }
        FragC r[kTilesV];
        compute_residual<Traits>(r, smem, smem_q, smem_state, smem_earlier_u, smem_y[1], smem.coef[1]);
        advance_state<Traits>(r, smem_q, smem_state, smem_earlier_u, smem.coef[1]);
      }
      if (is_last) {
        load_tokens<T, BLOCK_T, HEAD_DIM, kNumThreads>(smem_q, smem.source.q, q_stride, shape, smem.source.rows,
                                                       num_tokens, head_dim, is_aligned, threadIdx.x);
        cp_async_commit();
      }

      // U, dV and dbeta
      {
        FragC r[kTilesV];
        compute_residual<Traits>(r, smem, smem_k, smem_state, smem_u, smem_y[0], smem.coef[0]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = place.token(i);
          const float beta = smem.coef[0].beta[token];
#pragma unroll
          for (int n = 0; n < kTilesV; ++n) {
            const int col = place.half * HALF_V + n * 8 + place.col;
            const float2 x = ValueTile::load_pair(smem_dv, token, col);
            dbeta[i] += x.x * r[n].r[2 * i] + x.y * r[n].r[2 * i + 1];
            ValueTile::store_pair(smem_u, token, col, beta * r[n].r[2 * i], beta * r[n].r[2 * i + 1]);
            ValueTile::store_pair(smem_dv, token, col, beta * x.x, beta * x.y);
          }
        }
      }
      __syncthreads();
      store_tokens<T, BLOCK_T, BLOCK_V, kNumThreads>(smem.source.dv + v0, value_stride, shape, smem.source.rows,
                                                     num_tokens, min(BLOCK_V, value_dim - v0), smem_dv, is_aligned);

      // Products that contract V
#pragma unroll 1
      for (int step = 0; step < BLOCK_V; step += 16) {
        const FragA<T> a_d_o = ValueTile::load_a(smem_d_o, place.row0, step);
        const FragA<T> a_dv = ValueTile::load_a(smem_dv, place.row0, step);
        const FragA<T> a_u = ValueTile::load_a(smem_u, place.row0, step);
#pragma unroll
        for (int n = 0; n < kTilesT; n += 2) {
          if (place.half * HALF_T + n * 8 > place.row0) continue;
          FragB<T> b[2];
          ValueTile::load_b(b, smem_u, place.half * HALF_T + n * 8, step);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma(da[n + h], a_d_o, b[h]);
            mma(dl[n + h], a_dv, b[h]);
          }
        }
#pragma unroll
        for (int n = 0; n < kTilesK; n += 2) {
          FragB<T> b[2], b_d[2];
          ValueTile::load_b(b, smem_state, place.half * HALF_K + n * 8, step);
          KeyTile::load_b_trans(b_d, smem_d_state, step, place.half * HALF_K + n * 8);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma(dq[n + h], a_d_o, b[h]);
            mma(dk_row[n + h], a_dv, b[h]);
            mma(dk_col[n + h], a_u, b_d[h]);
          }
          if (n / 2 % (kNumWarps / 2) == place.row_block) {
            state_dot[0] += dot(b[0], b_d[0]);
            state_dot[1] += dot(b[1], b_d[1]);
          }
        }
      }
      __syncthreads();
    }

    ChunkCoefficients<BLOCK_T>& coef = smem.coef[0];
    cp_async_wait<0>();
    __syncthreads();
    if (params.use_qk_l2norm && place.half == 0) compute_rstd<T, HEAD_DIM>(smem_q, place.row0, coef.rstd_q);
    __syncthreads();

    // dQ and dK in units of the unnormalised q and k; sums over tokens of the gate gradient
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = place.token(i);
      const float q_weight = scale * coef.rstd_q[token] * exp2_approx(coef.cumsum[token]);
      const float row_weight = -coef.k_in[token], col_weight = coef.k_out[token];
      float later = 0.f, earlier = 0.f;
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) {
        const int col = place.half * HALF_K + n * 8 + place.col;
        const float2 q = KeyTile::load_pair(smem_q, token, col), k = KeyTile::load_pair(smem_k, token, col);
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
      const float dbeta_sum = warp_sum<4>(dbeta[i]);
      if (place.col == 0) {
        smem.row_sums[0][place.half][token] = later;
        smem.row_sums[1][place.half][token] = earlier;
        smem.row_sums[2][place.half][token] = dbeta_sum;
      }
    }
    FragC(&dk)[kTilesK] = dk_row;
    const float state_sum = warp_sum(state_dot[0] + state_dot[1]);
    if (lane_idx == 0) smem.warp_values[place.warp_idx] = state_sum;

    // dA * D and dL * D with the norms folded in, and the rectangle sums of M: over the columns before t within the
    // warp's half, then down the rows from t on
    {
      FragC qk[kTilesT] = {}, kk[kTilesT] = {};
#pragma unroll 2
      for (int step = 0; step < HEAD_DIM; step += 16) {
        const FragA<T> a_q = KeyTile::load_a(smem_q, place.row0, step);
        const FragA<T> a_k = KeyTile::load_a(smem_k, place.row0, step);
#pragma unroll
        for (int n = 0; n < kTilesT; n += 2) {
          if (place.half * HALF_T + n * 8 > place.row0) continue;
          FragB<T> b[2];
          KeyTile::load_b(b, smem_k, place.half * HALF_T + n * 8, step);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma(qk[n + h], a_q, b[h]);
            mma(kk[n + h], a_k, b[h]);
          }
        }
      }
      float column[kTilesT][2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = place.token(i);
        const auto row_decay = coef.decay_at(row);
        const float weight_a = scale * coef.rstd_q[row], weight_l = -coef.rstd_k[row];
        float carry = 0.f;
#pragma unroll
        for (int n = 0; n < kTilesT; ++n) {
          const int col = place.half * HALF_T + n * 8 + place.col;
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
            prefix = lane_idx % 4 >= delta ? prefix + below : prefix;
          }
          const float below = __shfl_up_sync(kFullWarp, prefix, 1, 4);
          const float before = carry + (lane_idx % 4 == 0 ? 0.f : below);
          column[n][0] += row >= col ? before : 0.f;
          column[n][1] += row >= col + 1 ? before + m[0] : 0.f;
          carry += __shfl_sync(kFullWarp, prefix, 3, 4);
        }
        if (place.half == 0 && place.col == 0) smem.row_sums[3][0][row] = carry;
      }
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) column[n][e] += __shfl_xor_sync(kFullWarp, column[n][e], mask);
          if (place.row == 0) {
            smem.column_sums[place.row_block][place.half * HALF_T + n * 8 + place.col + e] = column[n][e];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesT; n += 2) {
        const int col_block = (place.half * HALF_T + n * 8) / 16;
        if (col_block > place.row_block) continue;
        SmemBlock<T>::store_c(smem_a + Weights::block(place.row_block, col_block), {da[n], da[n + 1]});
        SmemBlock<T>::store_c(smem_l + Weights::block(place.row_block, col_block), {dl[n], dl[n + 1]});
      }
    }
    __syncthreads();

    if (place.warp_idx == 0) {
      float state_term = 0.f;
#pragma unroll
      for (int warp = 0; warp < kNumWarps; ++warp) state_term += smem.warp_values[warp];
      state_term *= exp2_approx(coef.cumsum[BLOCK_T - 1]);
      float dg[BLOCK_T / 32], carry = 0.f;
#pragma unroll
      for (int part = BLOCK_T / 32 - 1; part >= 0; --part) {
        const int token = part * 32 + lane_idx;
        const float later = warp_suffix_sum(smem.row_sums[0][0][token] + smem.row_sums[0][1][token]);
        // Rows of M in the first half of the columns, for tokens of the second
        const float first_half = warp_suffix_sum(token >= HALF_T ? smem.row_sums[3][0][token] : 0.f);
        dg[part] = state_term + (carry + later) + (token >= HALF_T ? first_half : 0.f);
        carry += __shfl_sync(kFullWarp, later, 0);
#pragma unroll
        for (int block = 0; block < BLOCK_T / 16; ++block) dg[part] += smem.column_sums[block][token];
      }
      carry = 0.f;
#pragma unroll
      for (int part = 0; part < BLOCK_T / 32; ++part) {
        const int token = part * 32 + lane_idx;
        const float earlier = warp_inclusive_sum(smem.row_sums[1][0][token] + smem.row_sums[1][1][token]);
        const float below = __shfl_up_sync(kFullWarp, earlier, 1);
        dg[part] += carry + (lane_idx == 0 ? 0.f : below);
        carry += __shfl_sync(kFullWarp, earlier, 31);
        if (token < num_tokens) {
          const int64_t row = smem.source.rows == nullptr ? token : routed_row(shape, smem.source.rows[token]).row;
          if (params.dg != nullptr) static_cast<float*>(params.dg)[token_head + row * gate_stride] = dg[part];
          static_cast<float*>(params.dbeta)[token_head + row * gate_stride] =
              smem.row_sums[2][0][token] + smem.row_sums[2][1][token];
        }
      }
    }

    // Products that contract the chunk
    for (int j = 0; j <= place.row_block; ++j) {
      const FragA<T> a = SmemBlock<T>::load_a(smem_a + Weights::block(place.row_block, j));
      const FragA<T> l = SmemBlock<T>::load_a(smem_l + Weights::block(place.row_block, j));
#pragma unroll
      for (int n = 0; n < kTilesK; n += 2) {
        FragB<T> b[2];
        KeyTile::load_b_trans(b, smem_k, j * 16, place.half * HALF_K + n * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma(dq[n + h], a, b[h]);
          mma(dk[n + h], l, b[h]);
        }
      }
    }
    for (int i = place.row_block; i < BLOCK_T / 16; ++i) {
      const FragA<T> a = SmemBlock<T>::load_a_trans(smem_a + Weights::block(i, place.row_block));
      const FragA<T> l = SmemBlock<T>::load_a_trans(smem_l + Weights::block(i, place.row_block));
#pragma unroll
      for (int n = 0; n < kTilesK; n += 2) {
        FragB<T> b_q[2], b_k[2];
        KeyTile::load_b_trans(b_q, smem_q, i * 16, place.half * HALF_K + n * 8);
        KeyTile::load_b_trans(b_k, smem_k, i * 16, place.half * HALF_K + n * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma(dk[n + h], a, b_q[h]);
          mma(dk[n + h], l, b_k[h]);
        }
      }
    }

    // Sum over the value heads of the group, in their order
    if (group_size > 1) {
      float4* sums = group_sums + blockIdx.x * int64_t{2 * kTilesK * kNumThreads} + threadIdx.x;
#pragma unroll
      for (int n = 0; n < 2 * kTilesK; ++n) {
        float (&x)[4] = n < kTilesK ? dq[n].r : dk[n - kTilesK].r;
        float4& sum = sums[n * kNumThreads];
        if (group_idx > 0) x[0] += sum.x, x[1] += sum.y, x[2] += sum.z, x[3] += sum.w;
        if (group_idx + 1 < group_size) sum = {x[0], x[1], x[2], x[3]};
      }
    }
    __syncthreads();
    if (group_idx + 1 < group_size) continue;

    // Norms, and out through the tiles of q and k
    float dots[2][2] = {};
    if (params.use_qk_l2norm) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = place.token(i);
        float q_dot = 0.f, k_dot = 0.f;
#pragma unroll
        for (int n = 0; n < kTilesK; ++n) {
          const int col = place.half * HALF_K + n * 8 + place.col;
          const float2 q = KeyTile::load_pair(smem_q, token, col), k = KeyTile::load_pair(smem_k, token, col);
          q_dot += q.x * dq[n].r[2 * i] + q.y * dq[n].r[2 * i + 1];
          k_dot += k.x * dk[n].r[2 * i] + k.y * dk[n].r[2 * i + 1];
        }
        q_dot = warp_sum<4>(q_dot), k_dot = warp_sum<4>(k_dot);
        if (place.col == 0) {
          smem.row_sums[0][place.half][token] = q_dot;
          smem.row_sums[1][place.half][token] = k_dot;
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = place.token(i);
        const float q_rstd = coef.rstd_q[token], k_rstd = coef.rstd_k[token];
        dots[0][i] = q_rstd * q_rstd * (smem.row_sums[0][0][token] + smem.row_sums[0][1][token]);
        dots[1][i] = k_rstd * k_rstd * (smem.row_sums[1][0][token] + smem.row_sums[1][1][token]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = place.token(i);
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) {
        const int col = place.half * HALF_K + n * 8 + place.col;
        const float2 q = KeyTile::load_pair(smem_q, token, col), k = KeyTile::load_pair(smem_k, token, col);
        KeyTile::store_pair(smem_q, token, col, dq[n].r[2 * i] - q.x * dots[0][i],
                            dq[n].r[2 * i + 1] - q.y * dots[0][i]);
        KeyTile::store_pair(smem_k, token, col, dk[n].r[2 * i] - k.x * dots[1][i],
                            dk[n].r[2 * i + 1] - k.y * dots[1][i]);
      }
    }
    __syncthreads();
    const int64_t out_stride = shape.num_heads * head_dim, out = first.row * out_stride + key_head * head_dim;
    store_tokens<T, BLOCK_T, HEAD_DIM, kNumThreads>(static_cast<T*>(params.dq) + out, out_stride, shape,
                                                    smem.source.rows, num_tokens, head_dim, smem_q, is_aligned);
    store_tokens<T, BLOCK_T, HEAD_DIM, kNumThreads>(static_cast<T*>(params.dk) + out, out_stride, shape,
                                                    smem.source.rows, num_tokens, head_dim, smem_k, is_aligned);
  }
}

}  // namespace remora
