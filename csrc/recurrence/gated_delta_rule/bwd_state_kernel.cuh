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
//   inverses            [chunk slots, HV]  CausalTile of -Y, for the chunk kernel; of the CTA of the first columns of V
//   d_final_state, d_initial_state       [N, HV, K, V] or [N, HV, V, K], float
//
// Grid: one CTA per (span, value head, BLOCK_V columns of V). Warps 0..3 carry dS^T of 16 columns each in
// accumulators, which are operands of the next product as they are. Groups of four further warps load Q, K, dO and
// prepare A and Y of the chunks ahead, in turn. Named barriers hand the stages over.
//
// Where sequences are cut into spans, a summary pass first computes what every span but the first of a sequence makes
// of dS: with dO from zero, and without dO from columns of the identity (as the forward pass, fwd_kernel.cuh).
#pragma once
#include "common/barrier.cuh"
#include "common/copy.cuh"
#include "common/hints.cuh"
#include "common/math.cuh"
#include "recurrence/gated_delta_rule/bwd_chunk_kernel.cuh"
#include "recurrence/gated_delta_rule/span_maps.cuh"

namespace remora {

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

/// A power of two that lifts the operands of dS of a chunk whose first decay is 2^cumsum back into the range of half.
template <typename T>
__device__ __forceinline__ float lift_of(float cumsum) {
  if constexpr (!std::is_same_v<T, __half>) return 1.f;
  return __uint_as_float(static_cast<uint32_t>(127.f + fminf(fmaxf(ceilf(-cumsum), 0.f), 100.f)) << 23);
}

/// Which tokens and columns this CTA walks. Output pass: the sequences' last spans, then those of spans that another
/// one has handed dS to; summary pass: the spans that hand it on. False: none.
template <int BLOCK_T, int BLOCK_V>
__device__ __forceinline__ bool find_walk(BwdWalk& walk, const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                          const SpanMaps& maps, bool is_summary) {
  const auto tiles_of = [](int64_t width) { return static_cast<uint32_t>((width + BLOCK_V - 1) / BLOCK_V); };
  const uint32_t num_v_tiles = tiles_of(shape.value_dim), num_heads = static_cast<uint32_t>(shape.num_value_heads);
  const uint32_t num_tiles = num_v_tiles + (is_summary ? tiles_of(shape.head_dim) : 0);
  const uint32_t tile = blockIdx.x % num_tiles, index = blockIdx.x / num_tiles / num_heads;
  const bool has_slot = is_summary || index >= shape.num_seqs;
  walk.head = blockIdx.x / num_tiles % num_heads;
  walk.slot = is_summary ? index : index - shape.num_seqs;
  walk.seq_idx = has_slot ? find_map_owner(shape, cu_seqlens, maps, walk.slot) : index;
  const Sequence seq = find_sequence(shape, cu_seqlens, walk.seq_idx);
  const int64_t last_span = max(seq.num_tokens - 1, int64_t{0}) / maps.span_tokens;
  const int64_t from_first = walk.slot - first_map_slot(seq, maps.span_tokens);
  if (has_slot && (from_first < 0 || from_first >= last_span)) return false;
  const int64_t span = has_slot ? from_first + is_summary : last_span, begin = span * maps.span_tokens;
  walk.is_first = span == 0;
  walk.is_last = span == last_span;
  walk.is_transition = tile >= num_v_tiles;
  walk.writes_inverse = tile == 0 && !is_summary;
  walk.v0 = static_cast<int>(walk.is_transition ? tile - num_v_tiles : tile) * BLOCK_V;
  walk.first_token = seq.first_token + begin;
  walk.num_tokens = static_cast<int>(min(maps.span_tokens, seq.num_tokens - begin));
  walk.chunk_slot = first_chunk_slot<BLOCK_T>(seq, walk.seq_idx) + begin / BLOCK_T;
  // Nobody asks what becomes of other dS in a last span: it starts from what is known.
  return !(walk.is_transition && walk.is_last);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kNumThreads, 1)
    gated_delta_rule_bwd_state_kernel(const __grid_constant__ GatedDeltaRuleBwdParams params,
                                      typename Traits::TSaved* __restrict__ d_states, uint8_t* __restrict__ inverses,
                                      const SpanMaps maps, const bool is_summary, const bool is_aligned) {
  using T = typename Traits::T;
  using TY = typename Traits::TY;
  using Smem = typename Traits::Smem;
  constexpr int BLOCK_T = Traits::BLOCK_T, BLOCK_V = Traits::BLOCK_V, HEAD_DIM = Traits::HEAD_DIM;
  constexpr int kNumChainWarps = Traits::kNumChainWarps;
  constexpr int kNumGroups = Traits::kNumGroups, kNumStages = Traits::kNumStages, kNumInputs = Traits::kNumInputs;
  constexpr int kTilesT = BLOCK_T / 8, kTilesK = HEAD_DIM / 8;
  using KeyTile = SmemTile<T, HEAD_DIM>;
  using ValueTile = SmemTile<T, BLOCK_V>;

  extern __shared__ __align__(128) uint8_t smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);

  const int warp_idx = threadIdx.x / 32;
  const RecurrenceShape& shape = params.shape;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  {
    BwdWalk walk;
    if (!find_walk<BLOCK_T, BLOCK_V>(walk, shape, params.cu_seqlens, maps, is_summary)) return;
    walk.first = params.rows == nullptr ? row_at(shape, nullptr, walk.first_token) : TokenRow{0, 0, 0};
    if (threadIdx.x == 0) smem.walk = walk;
  }
  __syncthreads();
  const BwdWalk& walk = smem.walk;
  const int num_chunks = (walk.num_tokens + BLOCK_T - 1) / BLOCK_T;
  const bool is_routed = params.rows != nullptr;
  const int64_t value_stride = shape.num_value_heads * value_dim;

  // A hand-over counts the chain and one group.
  constexpr int kHandOverThreads = (kNumChainWarps + Traits::kNumPrepareWarps) * 32;
  if (warp_idx >= kNumChainWarps) {
    constexpr int kGroupThreads = Traits::kNumPrepareWarps * 32;
    const int group_idx = warp_idx / Traits::kNumPrepareWarps - kNumChainWarps / Traits::kNumPrepareWarps;
    const int thread_idx = threadIdx.x % kGroupThreads;
    const TokenStrides &q_stride = params.q_stride, &k_stride = params.k_stride;
    const TokenStrides d_o_stride = {shape.seqlen * value_stride, value_stride, value_dim};
    const auto load = [&](int iteration) {
      typename Smem::Input& input = smem.input[iteration % kNumInputs];
      if (iteration >= kNumInputs) named_barrier_sync(Traits::kRead + iteration % kNumInputs, kHandOverThreads);
      const int64_t token = (num_chunks - 1 - iteration) * int64_t{BLOCK_T};
      const int num_tokens = min(BLOCK_T, walk.num_tokens - static_cast<int>(token));
      // Pointers are made anew, for want of registers.
      const TokenRow& first = walk.first;
      const int64_t key_head = walk.head / (shape.num_value_heads / shape.num_heads);
      const T* gmem_q = static_cast<const T*>(params.q) + first.offset(q_stride) + key_head * q_stride.head;
      const T* gmem_k = static_cast<const T*>(params.k) + first.offset(k_stride) + key_head * k_stride.head;
      const int64_t token_head = first.row * shape.num_value_heads + walk.head;
      const T* gmem_d_o =
          static_cast<const T*>(params.d_o) + token_head * value_dim + (walk.is_transition ? 0 : walk.v0);
      const int num_cols = walk.is_transition ? 0 : min(BLOCK_V, value_dim - walk.v0);
      const int32_t* rows = is_routed ? params.rows + walk.first_token + token : nullptr;
      const int64_t ahead = is_routed ? 0 : token, gate = token_head + ahead * shape.num_value_heads;
      load_gates(input.coef, params.g == nullptr ? nullptr : static_cast<const float*>(params.g) + gate,
                 static_cast<const float*>(params.beta) + gate, shape.num_value_heads, shape, rows, num_tokens,
                 thread_idx);
      if (thread_idx < num_tokens) {
        input.rows[thread_idx] = is_routed ? static_cast<int32_t>(routed_row(shape, rows[thread_idx]).row)
                                           : static_cast<int>(token) + thread_idx;
      }
      load_tokens<T, BLOCK_T, HEAD_DIM, kGroupThreads>(smem_address(input.k), gmem_k + ahead * k_stride.token, k_stride,
                                                       shape, rows, num_tokens, head_dim, is_aligned, thread_idx);
      load_tokens<T, BLOCK_T, HEAD_DIM, kGroupThreads>(smem_address(input.q), gmem_q + ahead * q_stride.token, q_stride,
                                                       shape, rows, num_tokens, head_dim, is_aligned, thread_idx);
      load_tokens<T, BLOCK_T, BLOCK_V, kGroupThreads>(smem_address(input.d_o), gmem_d_o + ahead * value_stride,
                                                      d_o_stride, shape, rows, num_tokens, num_cols, is_aligned,
                                                      thread_idx);
      cp_async_commit();
    };

    if (Traits::kLoadsAhead && group_idx < num_chunks) load(group_idx);
    for (int iteration = group_idx; iteration < num_chunks; iteration += kNumGroups) {
      const int stage_idx = iteration % kNumStages;
      typename Smem::Input& input = smem.input[iteration % kNumInputs];
      typename Smem::Stage& stage = smem.stage[stage_idx];
      const ChunkTiles<BLOCK_T> tiles = {smem_address(input.k),
                                         smem_address(input.q),
                                         smem_address(stage.a),
                                         smem_address(stage.y),
                                         smem_address(smem.scratch[group_idx]),
                                         &input.coef};
      const float scale = static_cast<float>(params.scale);
      const int group_warp = warp_idx % Traits::kNumPrepareWarps, barrier = Traits::kPrepareRole + group_idx;
      if (!Traits::kLoadsAhead) load(iteration);
      cp_async_wait<0>();
      role_barrier<Traits::kNumPrepareWarps>(barrier);
      prepare_coefficients<T, HEAD_DIM, BLOCK_T, Traits::kNumPrepareWarps, true>(tiles, scale, params.use_qk_l2norm,
                                                                                 group_warp, barrier);
      if (iteration >= kNumStages) named_barrier_sync(Traits::kEmpty + stage_idx, kHandOverThreads);
      prepare_pairs<T, HEAD_DIM, BLOCK_T, Traits::kNumPrepareWarps, true>(tiles, scale, group_warp);
      if (Traits::kLoadsAhead && iteration + kNumGroups < num_chunks) load(iteration + kNumGroups);
      role_barrier<Traits::kNumPrepareWarps>(barrier);
      prepare_inverse<TY, BLOCK_T, Traits::kNumPrepareWarps>(tiles, group_warp, barrier);
      if (walk.writes_inverse) {
        role_barrier<Traits::kNumPrepareWarps>(barrier);
        constexpr int kSize = CausalTile<TY, BLOCK_T>::SIZE;
        const int64_t slot = walk.chunk_slot + num_chunks - 1 - iteration;
        uint8_t* inverse = inverses + (slot * shape.num_value_heads + walk.head) * kSize;
        for (int i = thread_idx * 16; i < kSize; i += kGroupThreads * 16) {
          *reinterpret_cast<float4*>(inverse + i) = load_shared_4(tiles.y + i);
        }
      }
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
  const int thread_idx = read_thread_idx();
  const int lane_idx = thread_idx % 32, row = lane_idx / 4, col = lane_idx % 4 * 2;
  auto& target = smem.target[warp_idx];
  FragC d_state[kTilesK] = {};
  {
    const int64_t head = walk.head;
    const int warp_v0 = walk.v0 + warp_idx * 16, num_cols = (walk.is_transition ? head_dim : value_dim) - warp_v0;
    const int64_t k_stride = params.state_v_first ? 1 : value_dim, v_stride = params.state_v_first ? head_dim : 1;
    const int64_t state = (walk.seq_idx * shape.num_value_heads + head) * head_dim * value_dim + warp_v0 * v_stride;
    float* map = span_map(shape, maps, walk.slot, head) + warp_v0;
    // Every lane writes the same.
    target.d_state = d_states + ((walk.chunk_slot * shape.num_value_heads + head) * value_dim + warp_v0) * HEAD_DIM;
    target.x = static_cast<T*>(params.dv) + (walk.first.row * shape.num_value_heads + head) * value_dim + warp_v0;
    target.num_v = is_summary ? 0 : num_cols;
    StatePlace<float> exit = {nullptr, k_stride, v_stride, head_dim, num_cols};
    if (is_summary) {
      exit = {map, value_dim, 1, head_dim, num_cols};
      if (walk.is_transition) exit = {map + int64_t{head_dim} * value_dim, head_dim, 1, head_dim, num_cols};
    } else if (walk.is_first && params.d_initial_state != nullptr) {
      exit.data = static_cast<float*>(params.d_initial_state) + state;
    }
    target.exit = exit;
    __syncwarp();

    if (walk.is_transition) {
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d_state[n].r[i] = n * 8 + col + i % 2 == warp_v0 + row + i / 2 * 8 ? 1.f : 0.f;
      }
    } else if (walk.is_last ? params.d_final_state != nullptr : !is_summary) {
      StatePlace<const float> entry = {map, value_dim, 1, head_dim, num_cols};
      if (walk.is_last) {
        entry = {static_cast<const float*>(params.d_final_state) + state, k_stride, v_stride, head_dim, num_cols};
      }
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) {
        entry.for_each(n, [&](int i, const float& x) { d_state[n].r[i] = x; });
      }
    }
  }

  int stage_idx = 0, input_idx = 0;
  for (int chunk_idx = num_chunks - 1; chunk_idx >= 0; --chunk_idx) {
    named_barrier_sync(Traits::kFull + stage_idx, kHandOverThreads);
    typename Smem::Input& input = smem.input[input_idx];
    typename Smem::Stage& stage = smem.stage[stage_idx];
    const uint32_t smem_q = smem_address(input.q), smem_k = smem_address(input.k), smem_d_o = smem_address(input.d_o);
    const uint32_t smem_a = smem_address(stage.a), smem_y = smem_address(stage.y);
    const ChunkCoefficients<BLOCK_T>& coef = input.coef;

    // dU^T; dS^T leaves on the way
    auto* gmem_d_state = target.d_state + chunk_idx * (value_stride * HEAD_DIM);
    FragC du[kTilesT] = {};
#pragma unroll
    for (int step = 0; step < kTilesK; step += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto pair = [&](const FragC& x) { return make_float2(x.r[2 * i], x.r[2 * i + 1]); };
        store_row(gmem_d_state + (row + i * 8) * HEAD_DIM + step * 8, pair(d_state[step]), pair(d_state[step + 1]),
                  row + i * 8 < target.num_v, 16, true);
      }
      const FragA<T> a = make_a<T>(d_state[step], d_state[step + 1]);
#pragma unroll
      for (int n = 0; n < kTilesT; n += 2) {
        FragB<T> b[2];
        KeyTile::load_b(b, smem_k, n * 8, step * 8);
        mma_rounded(du[n], a, b[0]);
        mma_rounded(du[n + 1], a, b[1]);
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
        mma_rounded(du[2 * j], a, b[0]);
        mma_rounded(du[2 * j + 1], a, b[1]);
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

    const int num_tokens = min(BLOCK_T, walk.num_tokens - chunk_idx * BLOCK_T), num_v = target.num_v;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < kTilesT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int lane = read_thread_idx() % 32, token = n * 8 + lane % 4 * 2 + e, v = lane / 4;
          if (token >= num_tokens) continue;
          T* const out = target.x + input.rows[token] * value_stride + v;
          if (v < num_v) out[0] = x[n].r[e];
          if (v + 8 < num_v) out[8] = x[n].r[2 + e];
        }
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
          mma_rounded(d_state[n + h], a_d_o, b_q[h], a_x, b_k[h]);
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

    // 16-bit X leaves through the warp's own columns of dO.
    if constexpr (sizeof(T) == 2) {
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
        T* out = target.x + input.rows[token] * value_stride + unit_col;
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
    if (chunk_idx >= kNumInputs) named_barrier_arrive(Traits::kRead + input_idx, kHandOverThreads);
    stage_idx = next_in_ring(stage_idx, kNumStages);
    input_idx = next_in_ring(input_idx, kNumInputs);
  }

  const StatePlace<float> exit_place = smem.target[read_thread_idx() / 32].exit;
  if (exit_place.data != nullptr) {
#pragma unroll
    for (int n = 0; n < kTilesK; ++n) {
      exit_place.for_each(n, [&](int i, float& x) { x = d_state[n].r[i]; });
    }
  }
}

}  // namespace remora
