// Backward pass of the gated delta rule, first kernel: the gradient of the state, walking chunks right to left.
// Everything is transposed, rows are columns of V, so that a warp needs no other warp's results:
//
//   dU^T = dS^T (K e^{G_C - G})^T + (dO^T A)                    A: with scale, norms and decay
//   X^T  = dU^T - (beta dU)^T Y
//   dS^T = e^{G_C} dS^T + (dO s e^G)^T Q - (beta X e^G)^T K
//
//   q, k                [B, T, H, K]     T, strided
//   d_o                 [B, T, HV, V]    T
//   dv                  [B, T, HV, V]    T: X, for the chunk kernel
//   d_states            [chunk slots, HV, V, HEAD_DIM]  TSaved: gradient of the state that leaves each chunk
//   d_final_state, d_initial_state       [N, HV, K, V] or [N, HV, V, K], float
//
// Grid: one CTA per (sequence, value head, BLOCK_V columns of V). Warps 0..3 carry dS^T of 16 columns each in
// accumulators, which are operands of the next product as they are. Groups of four further warps load Q, K, dO and
// prepare A and Y of the chunks ahead, in turn. Named barriers hand the stages over: kFull + stage, kEmpty + stage.
#pragma once
#include "common/barrier.cuh"
#include "common/copy.cuh"
#include "recurrence/gated_delta_rule/bwd_chunk_kernel.cuh"

namespace remora {

/// Where dS^T of a warp lies in the tensors [N, HV, K, V] or [N, HV, V, K].
struct StatePlace {
  int64_t offset, k_stride, v_stride;
  int num_k, num_v;  // within the warp's 16 columns of V
  int lane_idx;

  template <typename Body>
  __device__ __forceinline__ void for_each(int tile, const Body& body) const {
    const int row = lane_idx / 4, col = lane_idx % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = tile * 8 + col + i % 2, v = row + i / 2 * 8;
      if (k < num_k && v < num_v) body(i, offset + k * k_stride + v * v_stride);
    }
  }
};

/// Stores 16 columns of dS^T in rows of HEAD_DIM elements. Neighbouring lanes exchange halves so that a row gets whole
/// sectors.
template <typename TSaved, int HEAD_DIM>
__device__ __forceinline__ void store_d_state(TSaved* rows, const FragC& lo, const FragC& hi, int num_rows) {
  const int row = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    TSaved* out = rows + (row + i * 8) * HEAD_DIM;
    const bool valid = row + i * 8 < num_rows;
    if constexpr (sizeof(TSaved) == 4) {
      if (valid) {
        *reinterpret_cast<float2*>(out + lane * 2) = {lo.r[2 * i], lo.r[2 * i + 1]};
        *reinterpret_cast<float2*>(out + 8 + lane * 2) = {hi.r[2 * i], hi.r[2 * i + 1]};
      }
    } else {
      const uint32_t first = pack<TSaved>(lo.r[2 * i], lo.r[2 * i + 1]);
      const uint32_t second = pack<TSaved>(hi.r[2 * i], hi.r[2 * i + 1]);
      const bool is_odd = lane % 2;
      const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? first : second, 1);
      if (valid) {
        *reinterpret_cast<uint2*>(out + lane % 2 * 8 + lane / 2 * 4) =
            is_odd ? make_uint2(other, second) : make_uint2(first, other);
      }
    }
  }
}

/// A power of two that lifts the operands of dS of a chunk whose first decay is 2^cumsum back into the range of half.
template <typename T>
__device__ __forceinline__ float lift_of(float cumsum) {
  if constexpr (!std::is_same_v<T, __half>) return 1.f;
  return __uint_as_float(static_cast<uint32_t>(127.f + fminf(fmaxf(ceilf(-cumsum), 0.f), 100.f)) << 23);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    gated_delta_rule_bwd_state_kernel(const __grid_constant__ GatedDeltaRuleBwdParams params,
                                      typename Traits::TSaved* __restrict__ d_states, const bool is_aligned) {
  using T = typename Traits::T;
  using TY = typename Traits::TY;
  using Smem = typename Traits::Smem;
  constexpr int BLOCK_T = Traits::BLOCK_T, BLOCK_V = Traits::BLOCK_V, HEAD_DIM = Traits::HEAD_DIM;
  constexpr int kNumChainWarps = Traits::kNumChainWarps;
  constexpr int kNumGroups = Traits::kNumGroups, kNumStages = Traits::kNumStages;
  constexpr int kTilesT = BLOCK_T / 8, kTilesK = HEAD_DIM / 8;
  using KeyTile = SmemTile<T, HEAD_DIM>;
  using ValueTile = SmemTile<T, BLOCK_V>;

  extern __shared__ __align__(128) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);

  const int warp_idx = threadIdx.x / 32;
  const RecurrenceShape& shape = params.shape;
  const int64_t num_v_tiles = (shape.value_dim + BLOCK_V - 1) / BLOCK_V;
  const int64_t head = blockIdx.x / num_v_tiles % shape.num_value_heads;
  const int64_t seq_idx = blockIdx.x / num_v_tiles / shape.num_value_heads;
  const int64_t key_head = head / (shape.num_value_heads / shape.num_heads);
  const Sequence seq = find_sequence(shape, params.cu_seqlens, seq_idx);
  // Offsets are those of the first token or, with rows, of the first row.
  const bool is_routed = params.rows != nullptr;
  const TokenRow first = is_routed ? TokenRow{0, 0, 0} : row_at(shape, nullptr, seq.first_token);
  const int seq_tokens = static_cast<int>(seq.num_tokens), num_chunks = (seq_tokens + BLOCK_T - 1) / BLOCK_T;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const int v0 = static_cast<int>(blockIdx.x % num_v_tiles) * BLOCK_V;
  const int64_t value_stride = shape.num_value_heads * value_dim;

  // A hand-over counts the chain and one group.
  constexpr int kHandOverThreads = (kNumChainWarps + Traits::kNumPrepareWarps) * 32;
  if (warp_idx >= kNumChainWarps) {
    constexpr int kGroupThreads = Traits::kNumPrepareWarps * 32;
    const int group_idx = warp_idx / Traits::kNumPrepareWarps - kNumChainWarps / Traits::kNumPrepareWarps;
    const int thread_idx = threadIdx.x % kGroupThreads;
    const TokenStrides &q_stride = params.q_stride, &k_stride = params.k_stride;
    const TokenStrides d_o_stride = {shape.seqlen * value_stride, value_stride, value_dim};
    const T* gmem_q = static_cast<const T*>(params.q) + first.offset(q_stride) + key_head * q_stride.head;
    const T* gmem_k = static_cast<const T*>(params.k) + first.offset(k_stride) + key_head * k_stride.head;
    const int64_t token_head = first.row * shape.num_value_heads + head;
    const T* gmem_d_o = static_cast<const T*>(params.d_o) + token_head * value_dim + v0;
    const int num_cols = min(BLOCK_V, value_dim - v0);

    for (int iteration = group_idx; iteration < num_chunks; iteration += kNumGroups) {
      const int stage_idx = iteration % kNumStages;
      typename Smem::Stage& stage = smem.stage[stage_idx];
      const int64_t token = (num_chunks - 1 - iteration) * int64_t{BLOCK_T};
      const int num_tokens = min(BLOCK_T, seq_tokens - static_cast<int>(token));
      const ChunkTiles<BLOCK_T> tiles = {smem_address(stage.k),
                                         smem_address(stage.q),
                                         smem_address(stage.a),
                                         smem_address(stage.y),
                                         smem_address(smem.scratch[group_idx]),
                                         &stage.coef};
      if (iteration >= kNumStages) named_barrier_sync(Traits::kEmpty + stage_idx, kHandOverThreads);
      const int32_t* rows = is_routed ? params.rows + seq.first_token + token : nullptr;
      const int64_t ahead = is_routed ? 0 : token, gate = token_head + ahead * shape.num_value_heads;
      load_gates(stage.coef, params.g == nullptr ? nullptr : static_cast<const float*>(params.g) + gate,
                 static_cast<const float*>(params.beta) + gate, shape.num_value_heads, shape, rows, num_tokens,
                 thread_idx);
      if (thread_idx < num_tokens) {
        stage.rows[thread_idx] = is_routed ? static_cast<int32_t>(routed_row(shape, rows[thread_idx]).row)
                                           : static_cast<int>(token) + thread_idx;
      }
      load_tokens<T, BLOCK_T, HEAD_DIM, kGroupThreads>(tiles.k, gmem_k + ahead * k_stride.token, k_stride, shape, rows,
                                                       num_tokens, head_dim, is_aligned, thread_idx);
      load_tokens<T, BLOCK_T, HEAD_DIM, kGroupThreads>(tiles.q, gmem_q + ahead * q_stride.token, q_stride, shape, rows,
                                                       num_tokens, head_dim, is_aligned, thread_idx);
      load_tokens<T, BLOCK_T, BLOCK_V, kGroupThreads>(smem_address(stage.d_o), gmem_d_o + ahead * value_stride,
                                                      d_o_stride, shape, rows, num_tokens, num_cols, is_aligned,
                                                      thread_idx);
      cp_async_commit();
      cp_async_wait<0>();
      role_barrier<Traits::kNumPrepareWarps>(Traits::kPrepareRole + group_idx);
      prepare_chunk<T, HEAD_DIM, BLOCK_T, Traits::kNumPrepareWarps, true, TY>(
          tiles, static_cast<float>(params.scale), params.use_qk_l2norm, warp_idx % Traits::kNumPrepareWarps,
          Traits::kPrepareRole + group_idx);
      if constexpr (std::is_same_v<T, __half>) {  // each thread what it wrote itself
        const float lift = lift_of<T>(tiles.coef->cumsum[0]);
        for (int i = thread_idx; i < BLOCK_T; i += kGroupThreads) {
          tiles.coef->q_in[i] *= lift;
          tiles.coef->k_in[i] *= lift;
        }
      }
      named_barrier_arrive(Traits::kFull + stage_idx, kHandOverThreads);
    }
    return;
  }

  // Read anew where a register would spill otherwise.
  const int thread_idx = !std::is_same_v<T, __nv_bfloat16> ? read_thread_idx() : static_cast<int>(threadIdx.x);
  const int lane_idx = thread_idx % 32, row = lane_idx / 4, col = lane_idx % 4 * 2;
  const int warp_v0 = v0 + warp_idx * 16;
  auto& target = smem.target[warp_idx];
  // Every lane writes the same.
  target.d_state =
      d_states +
      ((first_chunk_slot<BLOCK_T>(seq, seq_idx) * shape.num_value_heads + head) * value_dim + warp_v0) * HEAD_DIM;
  target.x = static_cast<T*>(params.dv) + (first.row * shape.num_value_heads + head) * value_dim + warp_v0;
  target.value_stride = value_stride;
  target.num_tokens = seq_tokens;
  target.num_v = value_dim - warp_v0;
  target.state_offset = (seq_idx * shape.num_value_heads + head) * head_dim * value_dim +
                        warp_v0 * int64_t{params.state_v_first ? head_dim : 1};
  __syncwarp();
  const auto state_place = [&] {
    const int thread_idx = read_thread_idx();
    const auto& from = smem.target[thread_idx / 32];
    return StatePlace{from.state_offset,
                      params.state_v_first ? 1 : value_dim,
                      params.state_v_first ? head_dim : 1,
                      head_dim,
                      from.num_v,
                      thread_idx % 32};
  };
  FragC d_state[kTilesK] = {};
  if (params.d_final_state != nullptr) {
    const StatePlace from = state_place();
#pragma unroll
    for (int n = 0; n < kTilesK; ++n) {
      from.for_each(n,
                    [&](int i, int64_t at) { d_state[n].r[i] = static_cast<const float*>(params.d_final_state)[at]; });
    }
  }

  int stage_idx = 0;
  for (int chunk_idx = num_chunks - 1; chunk_idx >= 0; --chunk_idx) {
    named_barrier_sync(Traits::kFull + stage_idx, kHandOverThreads);
    typename Smem::Stage& stage = smem.stage[stage_idx];
    const uint32_t smem_q = smem_address(stage.q), smem_k = smem_address(stage.k), smem_d_o = smem_address(stage.d_o);
    const uint32_t smem_a = smem_address(stage.a), smem_y = smem_address(stage.y);
    const ChunkCoefficients<BLOCK_T>& coef = stage.coef;

    // dU^T; dS^T leaves on the way
    auto* gmem_d_state = target.d_state + chunk_idx * (target.value_stride * HEAD_DIM);
    FragC du[kTilesT] = {};
#pragma unroll
    for (int step = 0; step < kTilesK; step += 2) {
      store_d_state<typename Traits::TSaved, HEAD_DIM>(gmem_d_state + step * 8, d_state[step], d_state[step + 1],
                                                       target.num_v);
      const FragA<T> a = make_a<T>(d_state[step], d_state[step + 1]);
#pragma unroll
      for (int n = 0; n < kTilesT; n += 2) {
        FragB<T> b[2];
        KeyTile::load_b(b, smem_k, n * 8, step * 8);
        mma(du[n], a, b[0]);
        mma(du[n + 1], a, b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTilesT; ++n) {
      const float2 weight = *reinterpret_cast<const float2*>(&coef.k_out[n * 8 + col]);
#pragma unroll
      for (int i = 0; i < 4; ++i) du[n].r[i] *= i % 2 ? weight.y : weight.x;
    }
#pragma unroll
    for (int i = 0; i < kTilesT / 2; ++i) {
      const FragA<T> a = ValueTile::load_a_trans(smem_d_o, i * 16, warp_idx * 16);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        FragB<T> b[2];
        SmemBlock<T>::load_b_trans(b, smem_a + CausalTile<T, BLOCK_T>::block(i, j));
        mma(du[2 * j], a, b[0]);
        mma(du[2 * j + 1], a, b[1]);
      }
    }

    // X^T in place of dU^T, for 16-bit Y within the range of fp16
    FragC(&x)[kTilesT] = du;
    float up[2] = {1.f, 1.f};
    if constexpr (sizeof(TY) == 2) {
      float largest[2] = {}, down[2];
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
        const float2 beta = *reinterpret_cast<const float2*>(&coef.beta[n * 8 + col]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest[i / 2] = fmaxf(largest[i / 2], fabsf((i % 2 ? beta.y : beta.x) * x[n].r[i]));
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullWarp, largest[h], 1));
        largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullWarp, largest[h], 2));
        const HalfRange range(largest[h]);
        down[h] = range.down;
        up[h] = range.up;
      }
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n].r[i] *= down[i / 2];
      }
    }
#pragma unroll
    for (int i = 0; i < kTilesT / 2; ++i) {  // block i is still dU^T when it becomes an operand
      FragC beta_du[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 beta = *reinterpret_cast<const float2*>(&coef.beta[i * 16 + h * 8 + col]);
#pragma unroll
        for (int e = 0; e < 4; ++e) beta_du[h].r[e] = x[2 * i + h].r[e] * (e % 2 ? beta.y : beta.x);
      }
      const FragA<TY> a = make_a<TY>(beta_du[0], beta_du[1]);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        FragB<TY> b[2];
        SmemBlock<TY>::load_b_trans(b, smem_y + CausalTile<TY, BLOCK_T>::block(i, j));  // -Y
        mma(x[2 * j], a, b[0]);
        mma(x[2 * j + 1], a, b[1]);
      }
    }
    if constexpr (sizeof(TY) == 2) {
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n].r[i] *= up[i / 2];
      }
    }

    // dS^T, lifted
    const float decay = exp2_approx(coef.cumsum[BLOCK_T - 1]) * lift_of<T>(coef.cumsum[0]);
#pragma unroll
    for (int n = 0; n < kTilesK; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d_state[n].r[i] *= decay;
    }
#pragma unroll
    for (int i = 0; i < kTilesT / 2; ++i) {
      FragA<T> a_d_o = ValueTile::load_a_trans(smem_d_o, i * 16, warp_idx * 16);
      FragC beta_x[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = i * 16 + h * 8 + col;
        const float2 q_in = *reinterpret_cast<const float2*>(&coef.q_in[token]);
        const float2 k_in = *reinterpret_cast<const float2*>(&coef.k_in[token]);
        const float2 beta = *reinterpret_cast<const float2*>(&coef.beta[token]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 pair = pair_of(a_d_o, 2 * h + e);
          set_pair(a_d_o, 2 * h + e, make_float2(pair.x * q_in.x, pair.y * q_in.y));
          beta_x[h].r[2 * e] = x[2 * i + h].r[2 * e] * (-beta.x * k_in.x);
          beta_x[h].r[2 * e + 1] = x[2 * i + h].r[2 * e + 1] * (-beta.y * k_in.y);
        }
      }
      const FragA<T> a_x = make_a<T>(beta_x[0], beta_x[1]);
#pragma unroll
      for (int n = 0; n < kTilesK; n += 2) {
        FragB<T> b_q[2], b_k[2];
        KeyTile::load_b_trans(b_q, smem_q, i * 16, n * 8);
        KeyTile::load_b_trans(b_k, smem_k, i * 16, n * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma(d_state[n + h], a_d_o, b_q[h]);
          mma(d_state[n + h], a_x, b_k[h]);
        }
      }
    }
    if constexpr (std::is_same_v<T, __half>) {
      const float lower = 1.f / lift_of<T>(coef.cumsum[0]);
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d_state[n].r[i] *= lower;
      }
    }

    // X leaves through the warp's own columns of dO.
    const int num_tokens = min(BLOCK_T, target.num_tokens - chunk_idx * BLOCK_T), num_v = target.num_v;
    const int64_t value_stride = target.value_stride;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = n * 8 + col + i % 2, v = row + i / 2 * 8;
          if (token < num_tokens && v < num_v) target.x[stage.rows[token] * value_stride + v] = x[n].r[i];
        }
      }
    } else {
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t pair = transpose_8x8(pack<T>(x[n].r[2 * h], x[n].r[2 * h + 1]));
          store_shared(smem_d_o + ValueTile::offset(n * 8 + row, warp_idx * 16 + h * 8 + col), pair);
        }
      }
      __syncwarp();
      const int unit_col = lane_idx % 2 * 8;
#pragma unroll
      for (int token0 = 0; token0 < BLOCK_T; token0 += 16) {
        const int token = token0 + lane_idx / 2;
        if (token >= num_tokens || unit_col >= num_v) continue;
        union {
          float4 vector;
          T element[8];
        } unit;
        unit.vector = load_shared_4(smem_d_o + ValueTile::offset(token, warp_idx * 16 + unit_col));
        T* out = target.x + stage.rows[token] * value_stride + unit_col;
        if (is_aligned) {
          *reinterpret_cast<float4*>(out) = unit.vector;
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (unit_col + e < num_v) out[e] = unit.element[e];
          }
        }
      }
    }
    if (chunk_idx >= kNumStages) named_barrier_arrive(Traits::kEmpty + stage_idx, kHandOverThreads);
    stage_idx = kNumStages == 2 ? stage_idx ^ 1 : stage_idx + 1 == kNumStages ? 0 : stage_idx + 1;
  }

  if (params.d_initial_state != nullptr) {
    const StatePlace to = state_place();
#pragma unroll
    for (int n = 0; n < kTilesK; ++n) {
      to.for_each(n, [&](int i, int64_t at) { static_cast<float*>(params.d_initial_state)[at] = d_state[n].r[i]; });
    }
  }
}

}  // namespace remora
