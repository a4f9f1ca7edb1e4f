// Backward pass, with the weights recomputed from lse:
//
//   prefix_attention_bwd_tokens_kernel   delta = rowsum(dO O) - d_lse, and all that a token owes to itself
//   prefix_attention_bwd_sink_kernel     d_sink
//   prefix_attention_bwd_rows_kernel     dQ = scale dS K of a tile of rows, over the keys that they see
//   prefix_attention_bwd_keys_kernel     dK = scale dS^T Q, dV = P^T dO of a tile of keys, over the rows that see them
//
// with dS = P (dO V^T - delta). Nothing is added by two CTAs: sums run in the order of keys, of heads and of tokens.
#pragma once
#include "segment/prefix_attention/key_tiles.cuh"

namespace remora {

struct PrefixBwdKernelParams {
  PrefixAttentionBwdParams op;
  int source;       // of the keys kernel
  bool is_aligned;  // all rows lend themselves to pieces of 16 bytes
};

/// The workspace: delta, and scale dS of what a row sees of itself, [B, T, H] each.
struct RowGradients {
  float *delta, *own;

  __device__ __forceinline__ explicit RowGradients(const PrefixAttentionBwdParams& p) {
    const AttentionShape& s = p.in.shape;
    delta = static_cast<float*>(p.workspace), own = delta + s.batch * s.seqlen * s.num_heads;
  }
};

constexpr int kTokenThreads = 128;

/// Grid: a warp a token; key heads.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kTokenThreads)
    prefix_attention_bwd_tokens_kernel(const __grid_constant__ PrefixBwdKernelParams p) {
  constexpr int kPairs = HEAD_DIM / 64;
  const PrefixAttentionInputs& in = p.op.in;
  const AttentionShape& shape = in.shape;
  const int dims = static_cast<int>(shape.head_dim), group = static_cast<int>(shape.group());
  const int lane_idx = threadIdx.x % 32;
  const int64_t kv_head = blockIdx.y, place = int64_t{blockIdx.x} * (kTokenThreads / 32) + threadIdx.x / 32;
  if (place >= shape.batch * shape.seqlen) return;
  const int64_t batch = place / shape.seqlen, token = place - batch * shape.seqlen;
  const bool is_covered =
      in.cu_seqlens == nullptr || (token >= in.cu_seqlens[0] && token < in.cu_seqlens[shape.num_seqs]);
  const bool has_self = in.k_self != nullptr && is_covered;
  const RowGradients gradients(p.op);
  const auto load_row = [&](float2(&x)[kPairs], const void* data, int64_t offset) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x[i] = load_pair(static_cast<const T*>(data) + offset, i * 64 + lane_idx * 2, dims, p.is_aligned);
    }
  };
  const auto dot = [](const float2(&x)[kPairs], const float2(&y)[kPairs]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) sum = fmaf(x[i].y, y[i].y, fmaf(x[i].x, y[i].x, sum));
    return warp_sum(sum);
  };

  float2 k[kPairs] = {}, v[kPairs] = {}, dk[kPairs] = {}, dv[kPairs] = {};
  if (has_self) {
    load_row(k, in.k_self, in.k_self_stride.offset(batch, token, kv_head));
    load_row(v, in.v_self, in.v_self_stride.offset(batch, token, kv_head));
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t row = place * shape.num_heads + head;
    float2 d_o[kPairs], o[kPairs];
    load_row(d_o, p.op.d_o, p.op.d_o_stride.offset(batch, token, head));
    load_row(o, p.op.o, row * dims);
    float delta = dot(d_o, o), own = 0.f;
    if (p.op.d_lse != nullptr) delta -= static_cast<const float*>(p.op.d_lse)[row];
    if (has_self) {
      float2 q[kPairs];
      load_row(q, in.q, in.q_stride.offset(batch, token, head));
      const float scale = static_cast<float>(in.scale), score = dot(q, k) * scale;
      const float lse = static_cast<const float*>(p.op.lse)[row];
      const float weight = score == -kInfinity ? 0.f : exp2_approx((score - lse) * kLog2e);
      own = weight * (dot(d_o, v) - delta) * scale;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        dk[i] = {fmaf(own, q[i].x, dk[i].x), fmaf(own, q[i].y, dk[i].y)};
        dv[i] = {fmaf(weight, d_o[i].x, dv[i].x), fmaf(weight, d_o[i].y, dv[i].y)};
      }
    }
    if (lane_idx == 0) gradients.delta[row] = delta, gradients.own[row] = own;
  }
  if (in.k_self == nullptr) return;
  const auto store_row = [&](void* data, const float2(&x)[kPairs]) {
    T* const to = static_cast<T*>(data) + (place * shape.num_kv_heads + kv_head) * dims;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int col = i * 64 + lane_idx * 2;
      if (p.is_aligned && col < dims) {
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<float2*>(to + col) = x[i];
        } else {
          *reinterpret_cast<uint32_t*>(to + col) = pack<T>(x[i].x, x[i].y);
        }
        continue;
      }
      if (col < dims) to[col] = static_cast<T>(x[i].x);
      if (col + 1 < dims) to[col + 1] = static_cast<T>(x[i].y);
    }
  };
  store_row(p.op.dk_self, dk);
  store_row(p.op.dv_self, dv);
}

constexpr int kSinkThreads = 256;

/// Grid: one CTA a head.
static __global__ void __launch_bounds__(kSinkThreads)
    prefix_attention_bwd_sink_kernel(const __grid_constant__ PrefixBwdKernelParams p) {
  __shared__ float smem_sums[kSinkThreads / 32];
  const AttentionShape& shape = p.op.in.shape;
  const RowGradients gradients(p.op);
  const float sink = static_cast<const float*>(p.op.in.sink)[blockIdx.x];
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < shape.batch * shape.seqlen; i += kSinkThreads) {
    const int64_t row = i * shape.num_heads + blockIdx.x;
    const float lse = static_cast<const float*>(p.op.lse)[row];
    if (lse != -kInfinity) sum -= exp2_approx((sink - lse) * kLog2e) * gradients.delta[row];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) smem_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (const float part : smem_sums) total += part;
  static_cast<float*>(p.op.dsink)[blockIdx.x] = total;
}

template <typename T, int HEAD_DIM>
struct PrefixBwdRowsTraits {
  static constexpr AttentionConfig kConfig = attention_bwd_rows_config(sizeof(T), HEAD_DIM);
  static constexpr int kNumThreads = kConfig.num_threads(), BLOCK_M = kConfig.block_m(), BLOCK_N = kConfig.block_n;
  static constexpr int kNumStages = kConfig.num_stages, M_TILES = kConfig.m_tiles;
  static constexpr int ROWS_SIZE = BLOCK_M * HEAD_DIM * sizeof(T), TILE_SIZE = BLOCK_N * HEAD_DIM * sizeof(T);
  static constexpr int SMEM_SIZE = 2 * ROWS_SIZE + 2 * kNumStages * TILE_SIZE;
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(PrefixBwdRowsTraits<T, HEAD_DIM>::kNumThreads)
    prefix_attention_bwd_rows_kernel(const __grid_constant__ PrefixBwdKernelParams p) {
  using Traits = PrefixBwdRowsTraits<T, HEAD_DIM>;
  constexpr int M_TILES = Traits::M_TILES, BLOCK_M = Traits::BLOCK_M, BLOCK_N = Traits::BLOCK_N;
  constexpr int kNumThreads = Traits::kNumThreads, kNumStages = Traits::kNumStages, NUM_BLOCKS = BLOCK_N / 16;
  using Warp = WarpRows<M_TILES>;
  const PrefixAttentionInputs& in = p.op.in;
  const int dims = static_cast<int>(in.shape.head_dim);
  const RowTile rows(in, BLOCK_M, int64_t{gridDim.x} - 1 - blockIdx.x, blockIdx.y);
  if (rows.count == 0) return;
  const int lane_idx = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * M_TILES;

  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ int smem_range[2 * Traits::kConfig.num_warps];
  const uint32_t smem_q = smem_address(smem), smem_d_o = smem_q + Traits::ROWS_SIZE;
  const uint32_t smem_kv = smem_d_o + Traits::ROWS_SIZE;
  const T *const gmem_q = static_cast<const T*>(in.q), *const gmem_d_o = static_cast<const T*>(p.op.d_o);
  load_tile<T, BLOCK_M, HEAD_DIM, kNumThreads>(
      smem_q, gmem_q, [&](int row) { return gmem_q + rows.offset(in.q_stride, row); }, rows.count, dims, p.is_aligned);
  load_tile<T, BLOCK_M, HEAD_DIM, kNumThreads>(
      smem_d_o, gmem_d_o, [&](int row) { return gmem_d_o + rows.offset(p.op.d_o_stride, row); }, rows.count, dims,
      p.is_aligned);
  cp_async_commit();

  const RowGradients gradients(p.op);
  float lse[M_TILES][2], delta[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t place = rows.place(in.shape, Warp::row_of(m, half));
      const float x = static_cast<const float*>(p.op.lse)[place];
      lse[m][half] = isinf(x) ? kInfinity : x * kLog2e;  // of rows that see nothing every weight is 2^-inf
      delta[m][half] = gradients.delta[place];
    }
  }
  FragC dq[M_TILES][HEAD_DIM / 8] = {};
  const float scale = static_cast<float>(in.scale) * kLog2e;

#pragma unroll 1
  for (int s = 0; s < kNumKeySources; ++s) {
    const AttentionKeys& source = in.sources[s];
    if (source.length == 0) continue;
    const AttentionSpan keys = source.span(in.shape, rows.seq_idx);
    const Warp seen(in, source, keys, rows);
    const KeyRange range = range_of_cta<Traits::kConfig.num_warps>(seen.lowest, seen.highest, smem_range);
    const int first_tile = range.begin / BLOCK_N, last_tile = (range.end + BLOCK_N - 1) / BLOCK_N;
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
        FragC scores[M_TILES][2 * NUM_BLOCKS], products[M_TILES][2 * NUM_BLOCKS];
        multiply_rows<T, HEAD_DIM, M_TILES, NUM_BLOCKS>(scores, smem_q, warp_row, smem_k, n_begin, n_end);
        multiply_rows<T, HEAD_DIM, M_TILES, NUM_BLOCKS>(products, smem_d_o, warp_row, smem_v, n_begin, n_end);
#pragma unroll
        for (int n = 0; n < NUM_BLOCKS; ++n) {
          if (n < n_begin || n >= n_end) continue;
          const bool is_masked = !seen.all_see(first + n * 16);
          FragA<T> d_scores[M_TILES];
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float* const bias = bias_of(source, keys, rows.head(Warp::row_of(m, half)));
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int e = 2 * half + j % 2, key = first + n * 16 + j / 2 * 8 + lane_idx % 4 * 2 + j % 2;
                float& x = scores[m][2 * n + j / 2].r[e];
                x *= scale;
                if (bias != nullptr && key < keys.length) x = fmaf(bias[key], kLog2e, x);
                x = exp2_approx(x - lse[m][half]) * (products[m][2 * n + j / 2].r[e] - delta[m][half]);
                if (is_masked && (key < seen.begin[m][half] || key >= seen.end[m][half])) x = 0.f;
              }
            }
            d_scores[m] = make_a<T>(scores[m][2 * n], scores[m][2 * n + 1]);
          }
          add_product<T, HEAD_DIM, M_TILES>(dq, d_scores, smem_k, n * 16, is_masked);
        }
      }
      __syncthreads();
    }
  }

  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Warp::row_of(m, half);
      const float own = in.k_self == nullptr ? 0.f : gradients.own[rows.place(in.shape, row)];
      const T* const k = static_cast<const T*>(in.k_self) +
                         in.k_self_stride.offset(rows.tokens.batch, rows.tokens.begin + rows.token(row), rows.kv_head);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        float* const x = dq[m][n].r + 2 * half;
        x[0] *= static_cast<float>(in.scale), x[1] *= static_cast<float>(in.scale);
        if (own == 0.f) continue;
        const float2 y = load_pair(k, n * 8 + lane_idx % 4 * 2, dims, p.is_aligned);
        x[0] = fmaf(own, y.x, x[0]), x[1] = fmaf(own, y.y, x[1]);
      }
    }
    const int first = warp_row + m * 16;
    store_rows<T, HEAD_DIM>(dq[m], smem_q, first, rows.count - first, dims, p.is_aligned, [&](int row) {
      return static_cast<T*>(p.op.dq) + rows.place(in.shape, first + row) * dims;
    });
  }
}

/// Of the rows of one stage of the keys kernel, in shared memory.
template <int BLOCK_N>
struct StageRows {
  float lse[BLOCK_N], delta[BLOCK_N];
  int begin[BLOCK_N], end[BLOCK_N];  // keys that a row sees
  struct {
    int lowest, highest, all_begin, all_end;
  } block[BLOCK_N / 16];  // as in WarpRows, of 16 rows
};

template <typename T, int HEAD_DIM>
struct PrefixBwdKeysTraits {
  static constexpr AttentionConfig kConfig = attention_bwd_keys_config(sizeof(T), HEAD_DIM);
  static constexpr int kNumThreads = kConfig.num_threads(), BLOCK_M = kConfig.block_m(), BLOCK_N = kConfig.block_n;
  static constexpr int kNumStages = kConfig.num_stages;
  /// Registers hold the sums of one of dk and dv: the grid's z tells which.
  static constexpr bool kIsSplit = HEAD_DIM > 128;
  static constexpr int KEYS_SIZE = BLOCK_M * HEAD_DIM * sizeof(T), TILE_SIZE = BLOCK_N * HEAD_DIM * sizeof(T);
  static constexpr int SMEM_SIZE =
      2 * KEYS_SIZE + kNumStages * (2 * TILE_SIZE + static_cast<int>(sizeof(StageRows<BLOCK_N>)));
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(PrefixBwdKeysTraits<T, HEAD_DIM>::kNumThreads)
    prefix_attention_bwd_keys_kernel(const __grid_constant__ PrefixBwdKernelParams p) {
  using Traits = PrefixBwdKeysTraits<T, HEAD_DIM>;
  constexpr int BLOCK_M = Traits::BLOCK_M, BLOCK_N = Traits::BLOCK_N, NUM_BLOCKS = BLOCK_N / 16;
  constexpr int kNumThreads = Traits::kNumThreads, kNumStages = Traits::kNumStages;
  static_assert(Traits::kConfig.m_tiles == 1);
  constexpr bool kIsSplit = Traits::kIsSplit;
  const PrefixAttentionInputs& in = p.op.in;
  const AttentionKeys& source = in.sources[p.source];
  const int dims = static_cast<int>(in.shape.head_dim), group = static_cast<int>(in.shape.group());
  const int kv_head = blockIdx.y, part = blockIdx.z;  // of dv, dk
  const AttentionSlots slots = in.key_slots(p.source, BLOCK_M);
  const int64_t seq_idx = slots.owner(blockIdx.x);
  const AttentionSpan keys = source.span(in.shape, seq_idx), tokens = in.tokens(seq_idx);
  const int first_key = static_cast<int>((blockIdx.x - slots.first_slot(seq_idx)) * BLOCK_M);
  const int num_keys = min(static_cast<int>(keys.length) - first_key, BLOCK_M);
  if (num_keys <= 0) return;
  const int lane_idx = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16;

  extern __shared__ __align__(128) unsigned char smem[];
  const uint32_t smem_k = smem_address(smem), smem_v = smem_k + Traits::KEYS_SIZE;
  const uint32_t smem_stages = smem_v + Traits::KEYS_SIZE;
  auto* const stage_rows =
      reinterpret_cast<StageRows<BLOCK_N>*>(smem + 2 * Traits::KEYS_SIZE + kNumStages * 2 * Traits::TILE_SIZE);
  const auto load_keys = [&](uint32_t to, const void* data, const AttentionStrides& stride) {
    const T* const base = static_cast<const T*>(data) + stride.offset(keys.batch, keys.begin + first_key, kv_head);
    const int64_t stride_token = stride.token;
    load_tile<T, BLOCK_M, HEAD_DIM, kNumThreads>(
        to, base, [=](int row) { return base + row * stride_token; }, num_keys, dims, p.is_aligned);
  };
  load_keys(smem_k, source.k, source.k_stride);
  load_keys(smem_v, source.v, source.v_stride);
  cp_async_commit();

  // Tokens that see any of the keys; all heads of the group, one after the other.
  int64_t begin = 0, end = keys.is_covered ? tokens.length : 0;
  if (source.n_visible == nullptr) {
    const int64_t last = source.rule.end_token(first_key + num_keys - 1), first = source.rule.first_token(first_key);
    begin = first < begin ? begin : first, end = last < end ? last : end;
  }
  const int first_token = static_cast<int>(begin);
  const int num_tiles = end > begin ? static_cast<int>((end - begin + BLOCK_N - 1) / BLOCK_N) : 0;
  const int num_steps = num_tiles * group;
  const RowGradients gradients(p.op);

  const auto load_step = [&](int step) {
    if (step < num_steps) {
      const int stage = step % kNumStages, token = first_token + step % num_tiles * BLOCK_N;
      const int head = kv_head * group + step / num_tiles, count = static_cast<int>(end) - token;
      const uint32_t to = smem_stages + stage * 2 * Traits::TILE_SIZE;
      const auto load_rows = [&](uint32_t dst, const void* data, const AttentionStrides& stride) {
        const T* const base = static_cast<const T*>(data) + stride.offset(tokens.batch, tokens.begin + token, head);
        const int64_t stride_token = stride.token;
        load_tile<T, BLOCK_N, HEAD_DIM, kNumThreads>(
            dst, base, [=](int row) { return base + row * stride_token; }, count, dims, p.is_aligned);
      };
      load_rows(to, in.q, in.q_stride);
      load_rows(to + Traits::TILE_SIZE, p.op.d_o, p.op.d_o_stride);
      if (threadIdx.x < (BLOCK_N + 31) / 32 * 32) {
        const int i = threadIdx.x % BLOCK_N;
        StageRows<BLOCK_N>& stage_row = stage_rows[stage];
        const int64_t place = tokens.batch * in.shape.seqlen + tokens.begin + token + min(i, count - 1);
        const KeyRange range = i < count ? source.visible(keys, token + i, place) : KeyRange{0, 0};
        const bool is_empty = range.begin >= range.end;
        const float lse = static_cast<const float*>(p.op.lse)[place * in.shape.num_heads + head];
        const int lowest = warp_min<16>(is_empty ? INT32_MAX : range.begin);
        const int highest = warp_max<16>(is_empty ? 0 : range.end);
        const int all_begin = warp_max<16>(range.begin), all_end = warp_min<16>(range.end);
        if (threadIdx.x < BLOCK_N) {
          stage_row.lse[i] = isinf(lse) ? kInfinity : lse * kLog2e;
          stage_row.delta[i] = gradients.delta[place * in.shape.num_heads + head];
          stage_row.begin[i] = range.begin, stage_row.end[i] = range.end;
          if (i % 16 == 0) stage_row.block[i / 16] = {lowest, highest, all_begin, all_end};
        }
      }
    }
    cp_async_commit();
  };

  FragC sums[kIsSplit ? 1 : 2][1][HEAD_DIM / 8] = {};  // dv, dk
  float dbias[2] = {};
  const float scale = static_cast<float>(in.scale) * kLog2e;
  if (kNumStages == 2) load_step(0);
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    load_step(step + kNumStages - 1);
    cp_async_wait<kNumStages - 1>();
    __syncthreads();
    const StageRows<BLOCK_N>& rows = stage_rows[step % kNumStages];
    const uint32_t smem_q = smem_stages + step % kNumStages * 2 * Traits::TILE_SIZE;
    const uint32_t smem_d_o = smem_q + Traits::TILE_SIZE;
    const int key0 = first_key + warp_key;
    int n_begin = NUM_BLOCKS, n_end = 0;  // blocks of 16 rows that see keys of this warp
#pragma unroll
    for (int n = 0; n < NUM_BLOCKS; ++n) {
      if (rows.block[n].lowest < key0 + 16 && rows.block[n].highest > key0) n_begin = min(n_begin, n), n_end = n + 1;
    }
    if (n_begin < n_end && warp_key < num_keys) {
      const int head = kv_head * group + step / num_tiles;
      float bias[2] = {};
      if (const float* const of_keys = bias_of(source, keys, head)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bias[half] = of_keys[min(key0 + half * 8 + lane_idx / 4, static_cast<int>(keys.length) - 1)] * kLog2e;
        }
      }
      FragC weights[1][2 * NUM_BLOCKS], products[1][2 * NUM_BLOCKS];
      multiply_rows<T, HEAD_DIM, 1, NUM_BLOCKS>(weights, smem_k, warp_key, smem_q, n_begin, n_end);
      multiply_rows<T, HEAD_DIM, 1, NUM_BLOCKS>(products, smem_v, warp_key, smem_d_o, n_begin, n_end);
#pragma unroll
      for (int n = 0; n < NUM_BLOCKS; ++n) {
        if (n < n_begin || n >= n_end) continue;
        const auto& block = rows.block[n];
        const bool is_masked = block.all_begin > key0 || block.all_end < key0 + 16;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = n * 16 + j / 2 * 8 + lane_idx % 4 * 2 + j % 2;
          const float lse = rows.lse[row], delta = rows.delta[row];
          const int row_begin = is_masked ? rows.begin[row] : 0, row_end = is_masked ? rows.end[row] : 0;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int e = 2 * half + j % 2, key = key0 + half * 8 + lane_idx / 4;
            float& weight = weights[0][2 * n + j / 2].r[e];
            float& x = products[0][2 * n + j / 2].r[e];
            weight = exp2_approx(fmaf(weight, scale, bias[half]) - lse);
            x = weight * (x - delta);
            if (is_masked && (key < row_begin || key >= row_end)) weight = x = 0.f;
            dbias[half] += x;
          }
        }
        const auto add = [&](FragC(&to)[1][HEAD_DIM / 8], const FragC(&from)[1][2 * NUM_BLOCKS], uint32_t tile) {
          const FragA<T> a[1] = {make_a<T>(from[0][2 * n], from[0][2 * n + 1])};
          add_product<T, HEAD_DIM, 1>(to, a, tile, n * 16, is_masked);
        };
        if constexpr (kIsSplit) {
          // one product in the code for both
          FragC(&from)[1][2 * NUM_BLOCKS] = weights;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (part == 1) from[0][2 * n].r[e] = products[0][2 * n].r[e];
            if (part == 1) from[0][2 * n + 1].r[e] = products[0][2 * n + 1].r[e];
          }
          add(sums[0], from, part == 0 ? smem_d_o : smem_q);
        } else {
          add(sums[0], weights, smem_d_o);
          add(sums[1], products, smem_q);
        }
      }
    }
    if (p.op.dbias != nullptr && p.source == 0 && (step + 1) % num_tiles == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = warp_sum<4>(dbias[half]);
        const int key = warp_key + half * 8 + lane_idx / 4;
        const int64_t head = keys.batch * in.shape.num_heads + kv_head * group + step / num_tiles;
        if (lane_idx % 4 == 0 && key < num_keys && (!kIsSplit || part == 1)) {
          static_cast<float*>(p.op.dbias)[head * source.length + keys.begin + first_key + key] = sum;
        }
        dbias[half] = 0.f;
      }
    }
    __syncthreads();
  }
  if (num_steps == 0 && p.op.dbias != nullptr && p.source == 0 && part == 0) {
    for (int i = threadIdx.x; i < num_keys * group; i += kNumThreads) {
      const int64_t head = keys.batch * in.shape.num_heads + kv_head * group + i / num_keys;
      static_cast<float*>(p.op.dbias)[head * source.length + keys.begin + first_key + i % num_keys] = 0.f;
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  const auto store = [&](FragC(&x)[HEAD_DIM / 8], void* data, float factor) {
#pragma unroll
    for (FragC& c : x) {
#pragma unroll
      for (float& y : c.r) y *= factor;
    }
    store_rows<T, HEAD_DIM>(x, smem_k, warp_key, num_keys - warp_key, dims, p.is_aligned, [&](int row) {
      const int64_t key = keys.batch * source.length + keys.begin + first_key + warp_key + row;
      return static_cast<T*>(data) + (key * in.shape.num_kv_heads + kv_head) * dims;
    });
  };
  if constexpr (kIsSplit) {
    store(sums[0][0], part == 0 ? p.op.dv[p.source] : p.op.dk[p.source],
          part == 0 ? 1.f : static_cast<float>(in.scale));
  } else {
    store(sums[0][0], p.op.dv[p.source], 1.f);
    store(sums[1][0], p.op.dk[p.source], static_cast<float>(in.scale));
  }
}

}  // namespace remora
