// Forward pass: the state stays on chip and walks the chunks of a sequence (R form with the Y-form inverse).
//
//   P = S^T k_in K^T          r = V^T - P - (V^T - P) (Y diag(beta))^T        U = beta r
//   O^T = S^T (q_in Q)^T + U A^T         S^T = e^{G_C} S^T + (k_out U) K          (prepare.cuh names the coefficients)
//
//   q, k [B, T, H, K]   v, o [B, T, HV, V]   g, beta [B, T, HV]   states [N, HV, K, V]
//
// Grid: (span, value head, 64 columns of V), flattened on x, columns fastest: neighbours share K and Q.
//
// Warps 0..3 (state): warp w owns 16 columns of V. S^T [16, K] are its accumulators; every product is of the form
//   [16 columns of V, x] [x, y] with the left operand made of accumulators in registers and the right one read from K,
//   Q, A or Y in shared memory, so the warps never wait for each other inside a chunk.
// Warps 4, 5 (pair): coefficients, A and L of a chunk.
// Warps 6, 7 (inverse): copy K, Q, g, beta with cp.async; -Y diag(beta) from L.
// The roles form a pipeline over chunks, handed over by named barriers: a ring of stages, two copies of L. Every role
// is bound by the latency of its own instructions, so short roles side by side beat one long role of more warps.
//
// kIsSummary: instead of outputs, the affine map S_out = M S_in + S_ext of a span, M by starting columns of the
// identity with v = 0, S_ext by starting at zero. combine_kernel folds the maps; the output pass starts each span
// from its exact state.
//
// Causal to the bit: products of one 16x16 block on the diagonal contain later tokens times zero. A warp that meets a
// non-finite operand there clears it and then marks the outputs it should have reached (apply_lower).
//
// Shared memory: traits.h. Runs on sm_80 and later. Figures: README.md.
#pragma once
#include <climits>
#include <type_traits>

#include "common/copy.cuh"
#include "common/math.cuh"
#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/gated_delta_rule/prepare.cuh"
#include "recurrence/gated_delta_rule/span_maps.cuh"
#include "recurrence/gated_delta_rule/traits.h"

namespace remora {

struct FwdKernelParams {
  GatedDeltaRuleFwdParams op;
  int64_t num_v_tiles, num_transition_tiles;
  int num_stages, num_scratches;
  SpanMaps maps;
};

enum FwdBarrier : int {
  kFwdFull = 1,                            // per stage: inverse warps -> state warps
  kFwdEmpty = kFwdFull + kFwdMaxStages,    // per stage: state warps -> inverse warps
  kFwdLoaded = kFwdEmpty + kFwdMaxStages,  // chunk parity: inverse warps -> pair warps, which may write L
  kFwdPaired = kFwdLoaded + 2,             // chunk parity: pair warps -> inverse warps
  kFwdPair = kFwdPaired + 2,               // among the pair warps
  kFwdInverse,                             // among the inverse warps
};
constexpr int kFwdStageThreads = 32 * (kFwdInverseWarps + kFwdStateWarps);
constexpr int kFwdScratchThreads = 32 * (kFwdPairWarps + kFwdInverseWarps);

/// What A, rows scaled to the range of fp16, and -Y diag(beta) are stored as. Where tokens reflect the state about
/// alike keys (beta near 2), u is large and alternates: rounding A, R' or U to bfloat16 would cost four digits of a sum
/// of 64.
template <typename T>
using FwdPairs = std::conditional_t<sizeof(T) == 4, float, __half>;

/// The tokens and columns of one CTA.
struct FwdWork {
  Sequence seq;
  int64_t seq_idx, head, tile;
  int64_t begin, end;      // of the span, from the sequence's first token
  int64_t map_slot;        // of the span
  bool is_first, is_last;  // of the sequence's spans
  bool exists;
};

/// Summary pass: the spans that own a map slot. Output pass: the first span of every sequence, then those that follow a
/// map slot.
template <bool kIsSummary>
__device__ __forceinline__ FwdWork decode_work(const FwdKernelParams& params) {
  const RecurrenceShape& shape = params.op.shape;
  FwdWork work;
  int64_t index = blockIdx.x;
  const int64_t num_tiles = params.num_v_tiles + (kIsSummary ? params.num_transition_tiles : 0);
  work.tile = index % num_tiles;
  index /= num_tiles;
  work.head = index % shape.num_value_heads;
  index /= shape.num_value_heads;
  const bool has_slot = kIsSummary || index >= shape.num_seqs;
  const int64_t slot = kIsSummary ? index : index - shape.num_seqs;
  work.seq_idx = has_slot ? find_map_owner(shape, params.op.cu_seqlens, params.maps, slot) : index;
  work.seq = find_sequence(shape, params.op.cu_seqlens, work.seq_idx);
  const int64_t first_slot = first_map_slot(work.seq, params.maps.span_tokens);
  const int64_t span = has_slot ? slot - first_slot + (kIsSummary ? 0 : 1) : 0;
  work.begin = min(max(span, int64_t{0}) * params.maps.span_tokens, work.seq.num_tokens);
  work.end = work.begin + min(params.maps.span_tokens, work.seq.num_tokens - work.begin);
  work.map_slot = first_slot + span;
  work.is_first = span == 0;
  work.is_last = work.end == work.seq.num_tokens;
  work.exists = kIsSummary ? span >= 0 && !work.is_last : work.is_first || (span > 0 && work.begin < work.end);
  return work;
}

/// Where the span begins in the batch tensors; with rows, which every token looks up, where they begin.
template <bool kIsRouted>
__device__ __forceinline__ TokenRow first_row(const GatedDeltaRuleFwdParams& op, const FwdWork& work) {
  if constexpr (kIsRouted) {
    return {0, 0, 0};
  } else {
    const int64_t batch = op.cu_seqlens == nullptr ? work.seq_idx : 0;
    const int64_t row = work.seq.first_token + work.begin;
    return {row, batch, row - batch * op.shape.seqlen};
  }
}

/// Column of V, within a warp's 16, of accumulator row l / 4 (the row 8 below is kSecond columns further). For 16-bit
/// types a transposed pair of 8x8 matrices then holds four neighbouring columns a lane: 8-byte accesses.
template <typename T>
struct ColumnMap {
  static constexpr int kSecond = sizeof(T) == 2 ? 2 : 8;
  __device__ static __forceinline__ int first() {
    const int row = threadIdx.x % 32 / 4;
    return sizeof(T) == 2 ? row / 2 * 4 + row % 2 : row;
  }
};

/// V^T of a chunk on its way from global memory to accumulators, 16 columns x BLOCK_T tokens.
template <typename T, int BLOCK_T, bool kIsAligned>
struct ValueFragment {
  uint2 raw[BLOCK_T / 8];

  template <typename Tokens>
  __device__ __forceinline__ void load(const T* src, const Tokens& offset_of, int num_tokens, int num_cols) {
    const int token = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 4;
    const T* p = src + offset_of(token) + col;
#pragma unroll
    for (int i = 0; i < BLOCK_T / 8; ++i) {
      if (i > 0) p = offset_of.template next<8>(p, src + col, token + i * 8);
      if constexpr (kIsAligned) {
        raw[i] = make_uint2(0, 0);
        if (token + i * 8 < num_tokens && col < num_cols) raw[i] = *reinterpret_cast<const uint2*>(p);
      } else {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[j] = token + i * 8 < num_tokens && col + j < num_cols ? static_cast<float>(p[j]) : 0.f;
        }
        raw[i] = make_uint2(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]));
      }
    }
  }
  __device__ __forceinline__ FragC get(int i) const {
    const float2 lo = unpack<T>(transpose_8x8(raw[i].x)), hi = unpack<T>(transpose_8x8(raw[i].y));
    return {{lo.x, lo.y, hi.x, hi.y}};
  }
};

template <int BLOCK_T, bool kIsAligned>
struct ValueFragment<float, BLOCK_T, kIsAligned> {
  float raw[BLOCK_T / 8][4];

  template <typename Tokens>
  __device__ __forceinline__ void load(const float* src, const Tokens& offset_of, int num_tokens, int num_cols) {
    const int token = threadIdx.x % 4 * 2, col = ColumnMap<float>::first();
#pragma unroll
    for (int i = 0; i < BLOCK_T / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = token + i * 8 + j % 2, c = col + j / 2 * ColumnMap<float>::kSecond;
        const float* p = src + offset_of(t) + c;
        raw[i][j] = t < num_tokens && c < num_cols ? *p : 0.f;
      }
    }
  }
  __device__ __forceinline__ FragC get(int i) const { return {{raw[i][0], raw[i][1], raw[i][2], raw[i][3]}}; }
};

/// Writes the transpose of x, [16 columns, 8 kTiles rows], to a row-major matrix of Out. The accumulators are those of
/// a kernel over In.
template <typename In, typename Out, bool kIsAligned, int kTiles, typename Rows>
__device__ __forceinline__ void store_rows(Out* dst, const Rows& offset_of, int num_rows, int num_cols,
                                           const FragC (&x)[kTiles]) {
  if constexpr (sizeof(Out) == 2) {
    static_assert(sizeof(In) == 2);
    const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 4;
    Out* p = dst + offset_of(row) + col;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i > 0) p = offset_of.template next<8>(p, dst + col, row + i * 8);
      const uint2 packed =
          make_uint2(transpose_8x8(pack<Out>(x[i].r[0], x[i].r[1])), transpose_8x8(pack<Out>(x[i].r[2], x[i].r[3])));
      if constexpr (kIsAligned) {
        if (row + i * 8 < num_rows && col < num_cols) *reinterpret_cast<uint2*>(p) = packed;
      } else {
        const float2 lo = unpack<Out>(packed.x), hi = unpack<Out>(packed.y);
        const float value[4] = {lo.x, lo.y, hi.x, hi.y};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (row + i * 8 < num_rows && col + j < num_cols) p[j] = static_cast<Out>(value[j]);
        }
      }
    }
  } else {
    const int row = threadIdx.x % 4 * 2, col = ColumnMap<In>::first();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = row + i * 8 + j % 2, c = col + j / 2 * ColumnMap<In>::kSecond;
        Out* p = dst + offset_of(r) + c;
        if (r < num_rows && c < num_cols) *p = x[i].r[j];
      }
    }
  }
}

/// An fp32 state of K x num_cols columns, strides in elements, to and from accumulators.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_state(FragC (&s)[HEAD_DIM / 8], const float* src, int64_t stride_k,
                                           int64_t stride_v, int num_rows, int num_cols) {
  const int k = threadIdx.x % 4 * 2, col = ColumnMap<T>::first();
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = k + i * 8 + j % 2, c = col + j / 2 * ColumnMap<T>::kSecond;
      s[i].r[j] = row < num_rows && c < num_cols ? src[row * stride_k + c * stride_v] : 0.f;
    }
  }
}
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void store_state(float* dst, int64_t stride_k, int64_t stride_v, int num_rows, int num_cols,
                                            const FragC (&s)[HEAD_DIM / 8]) {
  const int k = threadIdx.x % 4 * 2, col = ColumnMap<T>::first();
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = k + i * 8 + j % 2, c = col + j / 2 * ColumnMap<T>::kSecond;
      if (row < num_rows && c < num_cols) dst[row * stride_k + c * stride_v] = s[i].r[j];
    }
  }
}

/// Clears what is not below `limit` of 16 tokens' operand. first_bad: the first such token of each of a lane's two
/// rows.
template <typename T>
__device__ __forceinline__ void clear_from(FragA<T>& x, float limit, int (&first_bad)[2]) {
  first_bad[0] = first_bad[1] = INT_MAX / 2;
#pragma unroll
  for (int pair = 3; pair >= 0; --pair) {
    float2 value = pair_of(x, pair);
    const int token = threadIdx.x % 4 * 2 + pair / 2 * 8;
    if (!(fabsf(value.y) < limit)) {
      first_bad[pair % 2] = token + 1;
      value.y = 0.f;
    }
    if (!(fabsf(value.x) < limit)) {
      first_bad[pair % 2] = token;
      value.x = 0.f;
    }
    set_pair(x, pair, value);
  }
  first_bad[0] = warp_min<4>(first_bad[0]);
  first_bad[1] = warp_min<4>(first_bad[1]);
}

/// NaN from token `first` of each row on; the accumulators hold tokens token0 to token0 + 7.
__device__ __forceinline__ void mark_from(FragC& acc, int token0, int first_0, int first_1) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int token = token0 + threadIdx.x % 4 * 2 + r % 2;
    if (token >= (r / 2 ? first_1 : first_0)) acc.r[r] = __int_as_float(0x7fffffff);
  }
}

/// acc[16, tokens] += x tile^T for a lower triangular CausalTile, with kIsStrict without diagonal, of float or of half
/// that is multiplied as tf32: the 11 bits of half with the range of float for x. acc may be x of a strict one: blocks
/// of tokens go from last to first, so what a block adds to is no longer needed.
template <bool kIsStrict, typename TY, int BLOCK_T>
__device__ __forceinline__ void apply_lower(FragC (&acc)[BLOCK_T / 8], const FragC (&x)[BLOCK_T / 8], uint32_t tile) {
  constexpr int NUM_BLOCKS = BLOCK_T / 16;
  constexpr bool kIsFloat = sizeof(TY) == 4;
  const float limit = kIsFloat ? INFINITY : 0x1p127f;  // rounding to tf32 may not overflow
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < BLOCK_T / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j % 2] = fmaf(fabsf(x[i].r[j]), 0x1p-6f, sum[j % 2]);
  }
  const bool all_finite = __all_sync(kFullWarp, sum[0] + sum[1] < limit * 0x1p-6f);
  const auto multiply = [&](int i, int j, const FragA<float>& a) {
    const uint32_t block = tile + CausalTile<TY, BLOCK_T>::block(i, j);
    FragB<TY> b[2];
    SmemBlock<TY>::load_b(b, block);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kIsFloat) {
        mma(acc[2 * i + half], a, b[half]);
      } else {
        const float2 lo = unpack<TY>(b[half].r[0]), hi = unpack<TY>(b[half].r[1]);
        mma_tf32(acc[2 * i + half], a, {{lo.x, lo.y, hi.x, hi.y}});
      }
    }
  };
  const auto round = [](FragA<float>& a) {
    if constexpr (!kIsFloat) {
#pragma unroll
      for (int i = 0; i < 8; ++i) a.r[i] = tf32_nearest(a.r[i]);
    }
  };
  if (all_finite) {
#pragma unroll
    for (int j = NUM_BLOCKS - 1; j >= 0; --j) {
      FragA<float> a = make_a<float>(x[2 * j], x[2 * j + 1]);
      round(a);
#pragma unroll
      for (int i = NUM_BLOCKS - 1; i >= j; --i) multiply(i, j, a);
    }
    return;
  }
#pragma unroll
  for (int j = NUM_BLOCKS - 1; j >= 0; --j) {
    FragA<float> a = make_a<float>(x[2 * j], x[2 * j + 1]);
    int first_bad[2];
    clear_from(a, limit, first_bad);
    round(a);
    const int first[2] = {first_bad[0] + kIsStrict, first_bad[1] + kIsStrict};
#pragma unroll
    for (int i = NUM_BLOCKS - 1; i >= j; --i) {
      multiply(i, j, a);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mark_from(acc[2 * i + half], (i - j) * 16 + half * 8, first[0], first[1]);
      }
    }
  }
}

/// 2^-n of x = 2^n, a normal number as x is.
__device__ __forceinline__ float inverse_of_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

/// Zeros o of packed positions [begin, end), for the head and 16 columns of this warp.
template <typename T>
__device__ __forceinline__ void clear_tokens(const FwdKernelParams& params, const FwdWork& work, int64_t col0,
                                             int64_t begin, int64_t end) {
  const RecurrenceShape& shape = params.op.shape;
  const int lane_idx = threadIdx.x % 32;
  const int64_t col = col0 + lane_idx % 16;
  if (col >= shape.value_dim) return;
  for (int64_t position = begin + lane_idx / 16; position < end; position += 2) {
    const int64_t row = row_at(shape, params.op.rows, position).row;
    static_cast<T*>(params.op.o)[(row * shape.num_value_heads + work.head) * shape.value_dim + col] = T(0.f);
  }
}

template <typename T, int HEAD_DIM, bool kIsSummary, bool kIsAligned, bool kIsRouted>
__device__ __forceinline__ void state_subroutine(const FwdKernelParams& params, const FwdWork& work, uint32_t smem,
                                                 const char* smem_ptr, int warp_idx) {
  constexpr FwdTile kTile{sizeof(T), HEAD_DIM};
  constexpr int BLOCK_T = kTile.block_t();
  constexpr int NUM_BLOCKS = BLOCK_T / 16;
  using KeyTile = SmemTile<T, HEAD_DIM>;
  using Coefficients = ChunkCoefficients<BLOCK_T>;
  const GatedDeltaRuleFwdParams& op = params.op;
  const RecurrenceShape& shape = op.shape;
  const int num_rows = static_cast<int>(shape.head_dim);
  const int lane_col = threadIdx.x % 4 * 2;

  // Columns of this warp
  const bool is_transition = kIsSummary && work.tile >= params.num_v_tiles;
  const int64_t col0 = (is_transition ? work.tile - params.num_v_tiles : work.tile) * kSpanBlockV + warp_idx * 16;
  const int64_t width = is_transition ? shape.head_dim : shape.value_dim;
  const int num_cols = static_cast<int>(min(max(width - col0, int64_t{0}), int64_t{16}));
  const int64_t stride_k = op.state_v_first ? 1 : shape.value_dim;
  const int64_t stride_v = op.state_v_first ? shape.head_dim : 1;
  const int64_t state_idx = work.seq_idx * shape.num_value_heads + work.head;
  const int64_t state_offset = state_idx * shape.head_dim * shape.value_dim + col0 * stride_v;

  // State entering the span
  FragC s[HEAD_DIM / 8] = {};
  if (is_transition) {
    const int k = threadIdx.x % 4 * 2, col = static_cast<int>(col0) + ColumnMap<T>::first();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i].r[j] = k + i * 8 + j % 2 == col + j / 2 * ColumnMap<T>::kSecond ? 1.f : 0.f;
      }
    }
  } else if (work.is_first) {
    if (op.initial_state != nullptr) {
      load_state<T, HEAD_DIM>(s, static_cast<const float*>(op.initial_state) + state_offset, stride_k, stride_v,
                              num_rows, num_cols);
    }
  } else if (!kIsSummary) {
    load_state<T, HEAD_DIM>(s, span_map(shape, params.maps, work.map_slot - 1, work.head) + col0, shape.value_dim, 1,
                            num_rows, num_cols);
  }

  // Pointers at the span's first token, or with rows at the first row: every token adds its own offset.
  const TokenRow first = first_row<kIsRouted>(op, work);
  const T* gmem_v = static_cast<const T*>(op.v) + first.offset(op.v_stride) + work.head * op.v_stride.head + col0;
  const int64_t o_stride = shape.num_value_heads * shape.value_dim;
  T* gmem_o = static_cast<T*>(op.o) + first.row * o_stride + work.head * shape.value_dim + col0;
  using Saved = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;
  const int64_t saved_slot = first_state_slot(work.seq.first_token, work.seq_idx) + work.begin / kStateInterval;
  Saved* gmem_saved = static_cast<Saved*>(op.saved_states) +
                      (saved_slot * shape.num_value_heads + work.head) * shape.head_dim * shape.value_dim + col0;

  int remaining = static_cast<int>(work.end - work.begin);
  // Where the tokens of the chunk that begins `left` tokens before the span's end lie in a tensor
  const auto tokens_of = [&](int left, const TokenStrides& stride) {
    if constexpr (kIsRouted) {
      ChunkRows<BLOCK_T> rows;
      rows.load(op.rows, work.seq.first_token + work.end - left, left);
      return rows.offsets(shape, stride);
    } else {
      return StridedTokens{stride.token};
    }
  };
  ValueFragment<T, BLOCK_T, kIsAligned> v;
  const int v_cols = is_transition ? 0 : num_cols;
  if constexpr (kIsAligned) v.load(gmem_v, tokens_of(remaining, op.v_stride), is_transition ? 0 : remaining, v_cols);

  const uint32_t smem_stages = smem + params.num_scratches * kTile.scratch_size();
  int stage_idx = 0;
  for (int chunk_idx = 0; remaining > 0; ++chunk_idx, remaining -= BLOCK_T) {
    if constexpr (!kIsSummary) {
      if (op.saved_states != nullptr && chunk_idx % (kStateInterval / BLOCK_T) == 0) {
        store_rows<T, Saved, kIsAligned>(gmem_saved, StridedTokens{shape.value_dim}, num_rows, num_cols, s);
        gmem_saved += shape.num_value_heads * shape.head_dim * shape.value_dim;
      }
    }

    // Stage
    const uint32_t stage = smem_stages + stage_idx * kTile.stage_size();
    const uint32_t tile_k = stage, tile_q = tile_k + kTile.key_tile_size(), tile_a = tile_q + kTile.key_tile_size();
    const uint32_t tile_y = tile_a + kTile.causal_tile_size();
    const Coefficients& coef =
        *reinterpret_cast<const Coefficients*>(smem_ptr + (tile_y + kTile.causal_tile_size() - smem));
    named_barrier_sync(kFwdFull + stage_idx, kFwdStageThreads);

    // S^T K^T and S^T Q^T
    FragC r[BLOCK_T / 8] = {}, o[BLOCK_T / 8] = {};
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
      const FragA<T> a = make_a<T>(s[2 * k], s[2 * k + 1]);
#pragma unroll
      for (int j = 0; j < NUM_BLOCKS; ++j) {
        FragB<T> b[2];
        KeyTile::load_b(b, tile_k, j * 16, k * 16);
        mma(r[2 * j], a, b[0]);
        mma(r[2 * j + 1], a, b[1]);
        if constexpr (!kIsSummary) {
          KeyTile::load_b(b, tile_q, j * 16, k * 16);
          mma(o[2 * j], a, b[0]);
          mma(o[2 * j + 1], a, b[1]);
        }
      }
    }

    // R' and r
    if constexpr (!kIsAligned) {
      v.load(gmem_v, tokens_of(remaining, op.v_stride), is_transition ? 0 : remaining, v_cols);
    }
    const auto column_pair = [&](const float* values, int i) {
      return *reinterpret_cast<const float2*>(values + i * 8 + lane_col);
    };
#pragma unroll
    for (int i = 0; i < BLOCK_T / 8; ++i) {
      const FragC value = v.get(i);
      const float2 k_in = column_pair(coef.k_in, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) r[i].r[j] = fmaf(-(j % 2 ? k_in.y : k_in.x), r[i].r[j], value.r[j]);
    }
    if constexpr (!kIsRouted) gmem_v += BLOCK_T * op.v_stride.token;
    if constexpr (kIsAligned) {
      v.load(gmem_v, tokens_of(remaining - BLOCK_T, op.v_stride), is_transition ? 0 : remaining - BLOCK_T, v_cols);
    }
    apply_lower<true, FwdPairs<T>, BLOCK_T>(r, r, tile_y);

    // U, state, outputs
    constexpr bool kScalesA = sizeof(T) == 2;
    bool reflects = false;
#pragma unroll
    for (int i = 0; i < BLOCK_T / 8; ++i) {
      const float2 beta = column_pair(coef.beta, i);
      float2 q_in = column_pair(coef.q_in, i);
      if constexpr (kScalesA && !kIsSummary) {
        const float2 up = column_pair(coef.a_up, i);
        q_in.x *= inverse_of_power(up.x);
        q_in.y *= inverse_of_power(up.y);
      }
      reflects |= fmaxf(beta.x, beta.y) > 1.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r[i].r[j] *= j % 2 ? beta.y : beta.x;
        if constexpr (!kIsSummary) o[i].r[j] *= j % 2 ? q_in.y : q_in.x;
      }
    }
    const float decay = exp2_approx(coef.cumsum[BLOCK_T - 1]);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i].r[j] *= decay;
    }
    if constexpr (!kIsSummary) {
      apply_lower<false, FwdPairs<T>, BLOCK_T>(o, r, tile_a);
      if constexpr (kScalesA) {
#pragma unroll
        for (int i = 0; i < BLOCK_T / 8; ++i) {
          const float2 up = column_pair(coef.a_up, i);
#pragma unroll
          for (int j = 0; j < 4; ++j) o[i].r[j] *= j % 2 ? up.y : up.x;
        }
      }
    }
    // The rounding error of a token's bfloat16 operand is handed to the next one of the same lane: where keys are
    // alike, the errors of a chunk cancel in the state instead of adding up. Where a token may reflect the state, which
    // keeps errors for good, a second bfloat16 term follows.
    FragA<T> x[NUM_BLOCKS];
    float error[2] = {};
#pragma unroll
    for (int j = 0; j < NUM_BLOCKS; ++j) {
      FragC y[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 k_out = column_pair(coef.k_out, 2 * j + half);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& value = y[half].r[i];
          value = fmaf(r[2 * j + half].r[i], i % 2 ? k_out.y : k_out.x, error[i / 2]);
          if constexpr (std::is_same_v<T, __nv_bfloat16>)
            error[i / 2] = value - __bfloat162float(__float2bfloat16(value));
        }
      }
      x[j] = make_a<T>(y[0], y[1]);
    }
    const auto add_to_state = [&] {
#pragma unroll
      for (int j = 0; j < NUM_BLOCKS; ++j) {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
          FragB<T> b[2];
          KeyTile::load_b_trans(b, tile_k, j * 16, k * 16);
          mma(s[2 * k], x[j], b[0]);
          mma(s[2 * k + 1], x[j], b[1]);
        }
      }
    };
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll 1
      for (int num_left = __any_sync(kFullWarp, reflects); num_left >= 0; --num_left) {
        add_to_state();
        if (num_left == 0) break;
#pragma unroll
        for (int j = 0; j < NUM_BLOCKS; ++j) {
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const FragC& u = r[2 * j + pair / 2];
            const float2 k_out = column_pair(coef.k_out, 2 * j + pair / 2), head = pair_of(x[j], pair);
            const auto tail = [](float whole, float part) { return fabsf(part) < INFINITY ? whole - part : 0.f; };
            set_pair(
                x[j], pair,
                make_float2(tail(u.r[pair % 2 * 2] * k_out.x, head.x), tail(u.r[pair % 2 * 2 + 1] * k_out.y, head.y)));
          }
        }
      }
    } else {
      add_to_state();
    }
    if (remaining > params.num_stages * BLOCK_T) named_barrier_arrive(kFwdEmpty + stage_idx, kFwdStageThreads);
    stage_idx = next_in_ring(stage_idx, params.num_stages);
    if constexpr (!kIsSummary) {
      const TokenStrides stride{shape.seqlen * o_stride, o_stride, 0};
      store_rows<T, T, kIsAligned>(gmem_o, tokens_of(remaining, stride), remaining, num_cols, o);
      if constexpr (!kIsRouted) gmem_o += BLOCK_T * o_stride;
    }
  }

  // State leaving the span
  if constexpr (kIsSummary) {
    float* dst =
        span_map(shape, params.maps, work.map_slot, work.head) + (is_transition ? shape.head_dim * shape.value_dim : 0);
    store_state<T, HEAD_DIM>(dst + col0, width, 1, num_rows, num_cols, s);
  } else {
    if (work.is_last && op.final_state != nullptr) {
      store_state<T, HEAD_DIM>(static_cast<float*>(op.final_state) + state_offset, stride_k, stride_v, num_rows,
                               num_cols, s);
    }
    if (work.is_first) {
      for_each_uncovered(shape, op.cu_seqlens, work.seq_idx,
                         [&](int64_t begin, int64_t end) { clear_tokens<T>(params, work, col0, begin, end); });
    }
  }
}

/// Where a chunk's data lie.
template <typename T, int HEAD_DIM, int BLOCK_T>
__device__ __forceinline__ ChunkTiles<BLOCK_T> chunk_tiles(const FwdKernelParams& params, uint32_t smem, char* smem_ptr,
                                                           int stage_idx, int scratch_idx) {
  constexpr FwdTile kTile{sizeof(T), HEAD_DIM};
  static_assert(sizeof(ChunkCoefficients<BLOCK_T>) == kTile.coefficients_size());
  static_assert(CausalTile<T, BLOCK_T>::SIZE == kTile.causal_tile_size());
  static_assert(CausalTile<FwdPairs<T>, BLOCK_T>::SIZE == kTile.causal_tile_size());
  ChunkTiles<BLOCK_T> tiles;
  tiles.scratch = smem + scratch_idx * kTile.scratch_size();
  tiles.k = smem + params.num_scratches * kTile.scratch_size() + stage_idx * kTile.stage_size();
  tiles.q = tiles.k + kTile.key_tile_size();
  tiles.a = tiles.q + kTile.key_tile_size();
  tiles.y = tiles.a + kTile.causal_tile_size();
  tiles.coef = reinterpret_cast<ChunkCoefficients<BLOCK_T>*>(smem_ptr + (tiles.y + kTile.causal_tile_size() - smem));
  return tiles;
}

template <typename T, int HEAD_DIM, bool kHasQ>
__device__ __forceinline__ void pair_subroutine(const FwdKernelParams& params, const FwdWork& work, uint32_t smem,
                                                char* smem_ptr, int warp_idx) {
  constexpr int BLOCK_T = FwdTile{sizeof(T), HEAD_DIM}.block_t();
  const float scale = static_cast<float>(params.op.scale);
  const bool use_qk_l2norm = params.op.use_qk_l2norm;
  int stage_idx = 0, scratch_idx = 0, parity = 0;
  for (int remaining = static_cast<int>(work.end - work.begin); remaining > 0; remaining -= BLOCK_T) {
    named_barrier_sync(kFwdLoaded + parity, kFwdScratchThreads);
    const ChunkTiles<BLOCK_T> tiles = chunk_tiles<T, HEAD_DIM, BLOCK_T>(params, smem, smem_ptr, stage_idx, scratch_idx);
    prepare_coefficients<T, HEAD_DIM, BLOCK_T, kFwdPairWarps, kHasQ>(tiles, scale, use_qk_l2norm, warp_idx, kFwdPair);
    prepare_pairs<T, HEAD_DIM, BLOCK_T, kFwdPairWarps, kHasQ, FwdPairs<T>, sizeof(T) == 2>(tiles, scale, warp_idx);
    named_barrier_arrive(kFwdPaired + parity, kFwdScratchThreads);
    parity ^= 1;
    stage_idx = next_in_ring(stage_idx, params.num_stages);
    scratch_idx = next_in_ring(scratch_idx, params.num_scratches);
  }
}

template <typename T, int HEAD_DIM, bool kHasQ, bool kIsAligned, bool kIsRouted>
__device__ __forceinline__ void inverse_subroutine(const FwdKernelParams& params, const FwdWork& work, uint32_t smem,
                                                   char* smem_ptr, int warp_idx) {
  constexpr int BLOCK_T = FwdTile{sizeof(T), HEAD_DIM}.block_t();
  constexpr int kNumRoleThreads = 32 * kFwdInverseWarps;
  static_assert(BLOCK_T <= kNumRoleThreads, "one gate a thread");
  const GatedDeltaRuleFwdParams& op = params.op;
  const RecurrenceShape& shape = op.shape;
  const int thread_idx = warp_idx * 32 + threadIdx.x % 32;
  const int64_t key_head = work.head / (shape.num_value_heads / shape.num_heads);
  const int num_tokens = static_cast<int>(work.end - work.begin);
  const int num_chunks = (num_tokens + BLOCK_T - 1) / BLOCK_T;
  const int head_dim = static_cast<int>(shape.head_dim);

  // Sources of the next copy
  const TokenRow first = first_row<kIsRouted>(op, work);
  const T* gmem_k = static_cast<const T*>(op.k) + first.offset(op.k_stride) + key_head * op.k_stride.head;
  const T* gmem_q = static_cast<const T*>(op.q) + first.offset(op.q_stride) + key_head * op.q_stride.head;
  const bool has_g = op.g != nullptr;
  int64_t gate_offset = (first.row + thread_idx) * shape.num_value_heads + work.head;
  ChunkRows<BLOCK_T> rows;
  const auto load_rows = [&](int chunk_idx) {
    rows.load(op.rows, work.seq.first_token + work.begin + chunk_idx * BLOCK_T, num_tokens - chunk_idx * BLOCK_T);
  };
  if constexpr (kIsRouted) load_rows(0);

  const auto copy_chunk = [&](int chunk_idx, int stage_idx) {
    const int valid = num_tokens - chunk_idx * BLOCK_T;
    if (valid > 0) {
      const ChunkTiles<BLOCK_T> tiles = chunk_tiles<T, HEAD_DIM, BLOCK_T>(params, smem, smem_ptr, stage_idx, 0);
      const auto copy_keys = [&](uint32_t tile, const T*& src, const TokenStrides& stride) {
        if constexpr (kIsRouted) {
          gather_tile_async<T, BLOCK_T, HEAD_DIM, kNumRoleThreads>(tile, src, rows.offsets(shape, stride), valid,
                                                                   head_dim, kIsAligned, thread_idx);
        } else {
          copy_tile_async<T, BLOCK_T, HEAD_DIM, kNumRoleThreads>(tile, src, stride.token, valid, head_dim, kIsAligned,
                                                                 thread_idx);
          src += BLOCK_T * stride.token;
        }
      };
      copy_keys(tiles.k, gmem_k, op.k_stride);
      if constexpr (kHasQ) copy_keys(tiles.q, gmem_q, op.q_stride);
      if constexpr (kIsRouted) {
        gate_offset = rows.own_row(shape, warp_idx) * shape.num_value_heads + work.head;
      }
      if (thread_idx < BLOCK_T) {
        const bool is_valid = thread_idx < valid;
        const float* gmem_beta = static_cast<const float*>(op.beta) + gate_offset;
        const float* gmem_g = static_cast<const float*>(op.g) + gate_offset;
        cp_async_4(smem_address(&tiles.coef->beta[thread_idx]), is_valid ? gmem_beta : op.beta, is_valid);
        cp_async_4(smem_address(&tiles.coef->g[thread_idx]), is_valid && has_g ? gmem_g : op.beta, is_valid && has_g);
      }
      if constexpr (kIsRouted) {
        load_rows(chunk_idx + 1);
      } else {
        gate_offset += BLOCK_T * shape.num_value_heads;
      }
    }
    cp_async_commit();
  };
  const bool is_deep = is_deep_pipeline(params.num_stages, params.num_scratches);
  const bool may_leave_pending = params.num_stages == kFwdMaxStages;
  // Hands a chunk to the pair warps. Its copy is the newest but one with kFwdMaxStages stages, else the newest.
  const auto release_chunk = [&](int chunk_idx) {
    if (chunk_idx >= num_chunks) return;
    if (may_leave_pending) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    named_barrier_arrive(kFwdLoaded + chunk_idx % 2, kFwdScratchThreads);
  };

  // Copies run num_ahead chunks ahead of the inverse, one less than there are stages (but one at least): the stage of
  // the chunk that the state warps are at is not waited for.
  const int num_ahead = max(params.num_stages - 1, 1);
  for (int i = 0; i < num_ahead; ++i) copy_chunk(i, i);
  release_chunk(0);
  int stage_idx = 0, scratch_idx = 0;
  int copy_stage = params.num_stages == 1 ? 0 : num_ahead;
  for (int chunk_idx = 0; chunk_idx < num_chunks; ++chunk_idx) {
    if (is_deep) release_chunk(chunk_idx + 1);
    named_barrier_sync(kFwdPaired + chunk_idx % 2, kFwdScratchThreads);
    prepare_inverse<FwdPairs<T>, BLOCK_T, kFwdInverseWarps, true>(
        chunk_tiles<T, HEAD_DIM, BLOCK_T>(params, smem, smem_ptr, stage_idx, scratch_idx), warp_idx, kFwdInverse);
    named_barrier_arrive(kFwdFull + stage_idx, kFwdStageThreads);

    const int copied = chunk_idx + num_ahead;
    if (copied < num_chunks && copied >= params.num_stages) {
      named_barrier_sync(kFwdEmpty + copy_stage, kFwdStageThreads);
    }
    copy_chunk(copied, copy_stage);
    copy_stage = next_in_ring(copy_stage, params.num_stages);
    if (!is_deep) release_chunk(chunk_idx + 1);
    stage_idx = next_in_ring(stage_idx, params.num_stages);
    scratch_idx = next_in_ring(scratch_idx, params.num_scratches);
  }
}

template <typename T, int HEAD_DIM, bool kIsSummary, bool kIsAligned, bool kIsRouted>
__global__ void __launch_bounds__(kFwdThreads, 1)
    gated_delta_rule_fwd_kernel(const __grid_constant__ FwdKernelParams params) {
  extern __shared__ __align__(1024) char smem_ptr[];
  const uint32_t smem = smem_address(smem_ptr);
  const int warp_idx = threadIdx.x / 32;
  const FwdWork work = decode_work<kIsSummary>(params);
  // Nobody asks for the M of a first span: it starts from the known initial state.
  if (!work.exists || (kIsSummary && work.is_first && work.tile >= params.num_v_tiles)) return;
  if (warp_idx < kFwdStateWarps) {
    state_subroutine<T, HEAD_DIM, kIsSummary, kIsAligned, kIsRouted>(params, work, smem, smem_ptr, warp_idx);
  } else if (warp_idx < kFwdStateWarps + kFwdPairWarps) {
    pair_subroutine<T, HEAD_DIM, !kIsSummary>(params, work, smem, smem_ptr, warp_idx - kFwdStateWarps);
  } else {
    inverse_subroutine<T, HEAD_DIM, !kIsSummary, kIsAligned, kIsRouted>(params, work, smem, smem_ptr,
                                                                        warp_idx - kFwdStateWarps - kFwdPairWarps);
  }
}

}  // namespace remora
