// One walk over the chunks of a sequence: a linear recurrence with scalar decay, read at every token.
//
//   forward   Z_t = e^{g_t} Z_{t-1} + x_t w_t^T          out_t = scale Z_t r_t
//   reverse   Z_t = e^{g_{t+1}} Z_{t+1} + scale x_t w_t^T  out_t = Z_t r_t
//
// x, out have the channels of one side of the state, w and r those of the other. The operator is four of these walks:
//   o   forward   x = v    w = k    r = q          dv  reverse   x = d_o  w = q    r = k
//   dq  forward   x = k    w = v    r = d_o        dk  reverse   x = q    w = d_o  r = v
//
// Per chunk, with G the cumulative log decay in it, D_ij = e^{G_i - G_j} for i >= j and Z the state at its near end:
//   forward   out_i = scale e^{G_i} Z r_i + sum_j P_ij x_j     Z <- e^{G_C} Z + sum_j e^{G_C - G_j} x_j w_j^T
//   reverse   out_j = e^{G_C - G_j} Z r_j + sum_i P_ij x_i     Z <- e^{G_C} Z + sum_i scale e^{G_i} x_i w_i^T
//   P_ij = scale D_ij (later_i . earlier_j), later and earlier being r and w or w and r
//
// kHasDots adds what the gate's gradient needs, in the rectangle form where nothing cancels:
//   dg_t = sum_{j < t <= i} M_ij + sum_{i >= t} later_i + sum_{j < t} earlier_j + e^{G_C} <S, dS>
//   forward (dq): M_ij = P_ij (q_i . k_j) and later_i = q_i . (inter-chunk part of dq_i)
//   reverse (dk): earlier_j = k_j . (inter-chunk part of dk_j) and the states' product
// each over the 64 channels of x of the CTA; gate_kernel sums the tiles.
//
// Grid: (sequence, span, value head, 64 channels of x), flattened on x, tiles fastest. Warp w owns 16 channels of x: Z
// is its accumulators, every product has its left operand in registers and its right one in shared memory.
// A stage holds w, r, x (and y) of a chunk; with two of them the next chunk is copied while this one is worked on.
#pragma once
#include <type_traits>

#include "common/copy.cuh"
#include "common/hints.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "recurrence/sequence.cuh"
#include "recurrence/simple_gla/walk.h"

namespace remora {

/// What the copies of a tensor need to know. It lies in shared memory: a chunk spends neither registers nor divisions
/// on it.
struct WalkSource {
  const void* origin;  // head and first channel, of the first token or, where rows are routed, of row 0
  TokenStrides stride;
  int num_cols;

  template <typename T>
  __device__ __forceinline__ void set(const WalkTensor& tensor, const RecurrenceShape& shape, const int32_t* rows,
                                      int64_t first_position, int64_t head, int col0) {
    const auto* data = static_cast<const T*>(tensor.data) + head / tensor.group_size * tensor.stride.head + col0;
    origin = rows == nullptr ? data + row_at(shape, nullptr, first_position).offset(tensor.stride) : data;
    stride = tensor.stride;
    num_cols = tensor.num_channels - col0;
  }

  /// Tokens [first_token, first_token + num_tokens) of the span.
  template <typename T, int ROWS, int COLS>
  __device__ __forceinline__ void copy(uint32_t dst, const RecurrenceShape& shape, const ChunkRows<ROWS>& rows,
                                       bool is_routed, int first_token, int num_tokens, bool is_aligned) const {
    const T* src = hide_origin(static_cast<const T*>(origin));
    const int cols = min(num_cols, COLS);
    if (is_routed) {
      gather_tile_async<T, ROWS, COLS, kWalkThreads>(dst, src, rows.offsets(shape, stride), num_tokens, cols,
                                                     is_aligned, read_thread_idx());
    } else {
      copy_tile_async<T, ROWS, COLS, kWalkThreads>(dst, src + first_token * stride.token, stride.token, num_tokens,
                                                   cols, is_aligned, read_thread_idx());
    }
  }
};

/// Where the span of a CTA lies; in shared memory, as registers are scarce in the loop.
struct alignas(16) WalkPlaces {
  WalkSource sources[4];  // write, read, x, y
  const int32_t* rows;    // of the first token
  // Of the head, and of the first token or, where rows are routed, of row 0:
  const float* g;
  void* out;  // and of the tile
  float* dots;
  void* states;       // saved_states or chunk_states, the first of the span
  float* exit;        // where the state at the far end goes, or null
  float* exit_decay;  // of a summary
};

/// A thread's part of a state in memory: element (i, r) belongs to register r of accumulator i. The warp has num_x rows
/// of it, the first of which is first_x.
template <typename Element>
struct StatePart {
  Element* origin;   // of the state
  Element* rows[2];  // outside of it, where the thread has no such row
  bool has_row[2];
  int num_cols, stride;  // a stride within one state is at most 256, so products of 32 bits hold its offsets

  __device__ __forceinline__ StatePart(Element* state, int first_x, int num_x, int num_d, int64_t stride_x,
                                       int64_t stride_d) {
    const int x = read_thread_idx() % 32 / 4, d = read_thread_idx() % 4 * 2;
    origin = state;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      has_row[half] = x + half * 8 < num_x;
      rows[half] = state + (first_x + x + half * 8) * stride_x + d * stride_d;
    }
    num_cols = num_d - d;
    stride = static_cast<int>(stride_d);
  }
  __device__ __forceinline__ bool has(int i, int r) const { return has_row[r / 2] && i * 8 + r % 2 < num_cols; }

  /// 0 outside of the matrix. No branch: a load behind one waits for the load before.
  __device__ __forceinline__ float load(int i, int r) const {
    const Element* const from = has(i, r) ? rows[r / 2] + (i * 8 + r % 2) * stride : origin;
    const float value = static_cast<float>(*from);
    return has(i, r) ? value : 0.f;
  }
};

template <int TILES, typename Element>
__device__ __forceinline__ void load_state(FragC (&z)[TILES], const StatePart<Element>& state) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) z[i].r[r] = state.load(i, r);
  }
}

template <int TILES, typename Element>
__device__ __forceinline__ void store_state(const FragC (&z)[TILES], StatePart<Element> state) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (state.has(i, r)) state.rows[r / 2][r % 2 * state.stride] = static_cast<Element>(z[i].r[r]);
    }
    // Offsets of all tiles, kept for the next chunk, would cost registers.
#pragma unroll
    for (int half = 0; half < 2; ++half) state.rows[half] = hide_origin(state.rows[half] + 8 * state.stride);
  }
}

/// The same where neighbours of x lie beside each other, by pairs of 16-bit elements where they are aligned.
template <int TILES, typename Element>
__device__ __forceinline__ void store_state_pairs(const FragC (&z)[TILES], Element* state, int first_x, int num_x,
                                                  int num_d, int64_t stride_d, bool has_pairs) {
  const int lane_idx = read_thread_idx() % 32;
  const int num_left = num_x - lane_idx % 4 * 2;
  Element* dst = state + first_x + lane_idx % 4 * 2 + lane_idx / 4 * stride_d;
  const auto for_each_pair = [&](auto store) {
    int d = lane_idx / 4;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const uint32_t lo = transpose_8x8(pack<Element>(z[i].r[0], z[i].r[1]));
      const uint32_t hi = transpose_8x8(pack<Element>(z[i].r[2], z[i].r[3]));
      store(dst, d < num_d ? num_left : 0, lo);
      store(dst + 8, d < num_d ? num_left - 8 : 0, hi);
      d += 8;
      dst = hide_origin(dst + 8 * stride_d);
    }
  };
  if (has_pairs) {
    for_each_pair([](Element* to, int num_valid, uint32_t pair) {
      if (num_valid > 0) *reinterpret_cast<uint32_t*>(to) = pair;
    });
  } else {
    for_each_pair([](Element* to, int num_valid, uint32_t pair) {
      const float2 x = unpack<Element>(pair);
      if (num_valid > 0) to[0] = static_cast<Element>(x.x);
      if (num_valid > 1) to[1] = static_cast<Element>(x.y);
    });
  }
}

/// A state of the workspace, in the order of the registers that hold it: 16 bytes of a thread beside those of the next.
template <typename Element, int TILES>
struct RegisterState {
  static constexpr int kTiles = 4 / sizeof(Element);  // in 16 bytes
  static constexpr int kSize = TILES * 4 * kWalkThreads;

  static __device__ __forceinline__ void store(Element* state, const FragC (&z)[TILES]) {
    auto* dst = reinterpret_cast<uint4*>(state) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < TILES / kTiles; ++i) {
      uint4 bits;
      if constexpr (kTiles == 2) {
        const FragA<Element> pairs = make_a<Element>(z[2 * i], z[2 * i + 1]);
        bits = make_uint4(pairs.r[0], pairs.r[1], pairs.r[2], pairs.r[3]);
      } else {
        const float (&r)[4] = z[i].r;
        bits = make_uint4(__float_as_uint(r[0]), __float_as_uint(r[1]), __float_as_uint(r[2]), __float_as_uint(r[3]));
      }
      // Not an assignment: the compiler makes four stores of it.
      __stwb(dst + i * kWalkThreads, bits);
    }
  }

  uint4 bits[TILES / kTiles];

  __device__ __forceinline__ void load(const Element* state) {
    const auto* src = reinterpret_cast<const uint4*>(state) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < TILES / kTiles; ++i) bits[i] = src[i * kWalkThreads];
  }

  /// <z, state> over the thread's part.
  __device__ __forceinline__ float product(const FragC (&z)[TILES]) const {
    float products[4] = {};
#pragma unroll
    for (int i = 0; i < TILES / kTiles; ++i) {
      const uint32_t words[4] = {bits[i].x, bits[i].y, bits[i].z, bits[i].w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        if constexpr (kTiles == 2) {
          const float2 pair = unpack<Element>(words[word]);
          const float (&r)[4] = z[2 * i + word / 2].r;
          products[word] = fmaf(r[word % 2 * 2 + 1], pair.y, fmaf(r[word % 2 * 2], pair.x, products[word]));
        } else {
          products[word] = fmaf(z[i].r[word], __uint_as_float(words[word]), products[word]);
        }
      }
    }
    return (products[0] + products[1]) + (products[2] + products[3]);
  }

  /// Asks for it, a chunk ahead.
  static __device__ __forceinline__ void prefetch(const Element* state) {
    constexpr int kLine = 128 / sizeof(Element);
#pragma unroll
    for (int i = 0; i < kSize / kLine; i += kWalkThreads) {
      const int line = i + threadIdx.x;
      if (kSize / kLine % kWalkThreads == 0 || line < kSize / kLine) {
        prefetch_l2(state + line * kLine);
      }
    }
  }
};

/// Finite part of x and the first (kReverse: last) token, within the 16, that was not finite, per row of the lane.
template <typename T, bool kReverse>
__device__ __forceinline__ void clear_non_finite(FragA<T>& x, int (&bad)[2]) {
  const int col = threadIdx.x % 4 * 2;
  bad[0] = bad[1] = kReverse ? -1 : 16;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float2 value = pair_of(x, pair);
    const auto mark = [&](int token) {
      bad[pair % 2] = kReverse ? max(bad[pair % 2], token) : min(bad[pair % 2], token);
    };
    if (!isfinite(value.x)) mark(col + pair / 2 * 8), value.x = 0.f;
    if (!isfinite(value.y)) mark(col + pair / 2 * 8 + 1), value.y = 0.f;
    set_pair(x, pair, value);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) bad[i] = kReverse ? warp_max<4>(bad[i]) : warp_min<4>(bad[i]);
}

__device__ __forceinline__ float sum_over_rows(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}
__device__ __forceinline__ float sum_over_quad(float x) { return warp_sum<4>(x); }

/// A cumulative log decay and what its sum is rounded by: next to a reset, the difference of two sums is far smaller
/// than they are, and float outputs would show it.
struct LogDecay {
  float sum, rest;
  __device__ __forceinline__ float since(const LogDecay& other) const {
    return (sum - other.sum) + (rest - other.rest);
  }
};
__device__ __forceinline__ LogDecay inclusive_log_decay(float x) {
  LogDecay g{x, 0.f};
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const float other = __shfl_up_sync(kFullWarp, g.sum, delta), other_rest = __shfl_up_sync(kFullWarp, g.rest, delta);
    const bool has_other = threadIdx.x % 32 >= delta;
    const float total = g.sum + other, part = total - g.sum;
    g.rest += has_other ? other_rest + ((g.sum - (total - part)) + (other - part)) : 0.f;
    g.sum = has_other ? total : g.sum;
  }
  return g;
}

/// Sum over this lane and those above it, within groups of kLanes.
template <int kLanes>
__device__ __forceinline__ float suffix_sum(float x) {
#pragma unroll
  for (int delta = 1; delta < kLanes; delta *= 2) {
    const float above = __shfl_down_sync(kFullWarp, x, delta, kLanes);
    if (threadIdx.x % kLanes + delta < kLanes) x += above;
  }
  return x;
}
/// Sum over the lanes below this one, within groups of kLanes.
template <int kLanes>
__device__ __forceinline__ float exclusive_sum(float x) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int delta = 1; delta < kLanes; delta *= 2) {
    const float below = __shfl_up_sync(kFullWarp, x, delta, kLanes);
    if (lane >= delta) x += below;
  }
  const float before = __shfl_up_sync(kFullWarp, x, 1, kLanes);
  return lane == 0 ? 0.f : before;
}

template <typename T, int DIM, bool kReverse, bool kHasDots>
__global__ void __launch_bounds__(kWalkThreads, 1) simple_gla_walk_kernel(const __grid_constant__ WalkParams params) {
  constexpr int BLOCK_T = walk_block_t(sizeof(T)), NUM_BLOCKS = BLOCK_T / 16;
  constexpr int NUM_CAUSAL = NUM_BLOCKS * (NUM_BLOCKS + 1) / 2;
  constexpr int kPerLane = BLOCK_T / 32;
  constexpr bool kForwardDots = kHasDots && !kReverse, kReverseDots = kHasDots && kReverse;
  using Tile = SmemTile<T, DIM>;
  using TileX = SmemTile<T, kWalkBlockX>;
  using Block = SmemBlock<T>;
  using Saved = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;
  constexpr float kLog2e = 1.4426950408889634f;

  extern __shared__ __align__(128) char smem[];
  const uint32_t smem_stages = smem_address(smem);
  constexpr int kStageSize = walk_stage_size(sizeof(T), DIM, kHasDots);
  constexpr int kTileSize = BLOCK_T * DIM * sizeof(T), kTileXSize = BLOCK_T * kWalkBlockX * sizeof(T);
  char* smem_after = smem + params.num_stages * kStageSize;
  WalkPlaces& places = *reinterpret_cast<WalkPlaces*>(smem_after);
  static_assert(sizeof(WalkPlaces) == kWalkPlacesSize);
  smem_after += kWalkPlacesSize;
  const uint32_t smem_p = smem_address(smem_after);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int lane_row = lane_idx / 4, lane_col = lane_idx % 4 * 2;
  float* floats = reinterpret_cast<float*>(smem_after + NUM_CAUSAL * Block::SIZE);
  float* in_coef = floats + warp_idx * 4 * BLOCK_T;  // e^{G_i}
  float* out_coef = in_coef + BLOCK_T;               // e^{G_C - G_i}
  float* cumsum = out_coef + BLOCK_T;                // G_i, in units of log 2
  float* rests = cumsum + BLOCK_T;                   // of float: what G_i is rounded by
  float* const read_coef = kReverse ? out_coef : in_coef;
  float* const write_coef = kReverse ? in_coef : out_coef;
  float* smem_g = floats + 4 * 4 * BLOCK_T;                        // [2][BLOCK_T], as given
  int* token_rows = reinterpret_cast<int*>(smem_g + 2 * BLOCK_T);  // [2][BLOCK_T], in what `places` says
  float* smem_products = smem_g + 4 * BLOCK_T;                     // [4]; of a summary, the decay of the span so far
  float* smem_dots = smem_products + 4;                            // [4][BLOCK_T]
  float* smem_rect = smem_dots + 4 * BLOCK_T;                      // [BLOCK_T] rectangles of the diagonal blocks
  float* smem_rows = smem_rect + BLOCK_T;                          // [NUM_CAUSAL][16] sums of M over a block's columns
  float* smem_cols = smem_rows + NUM_CAUSAL * 16;                  // over its rows
  float* smem_totals = smem_cols + NUM_CAUSAL * 16;                // [NUM_CAUSAL]

  // Work of the CTA
  const RecurrenceShape& shape = params.shape;
  const int64_t num_heads = shape.num_value_heads;
  // The grid has fewer than 2^31 CTAs.
  uint32_t index = blockIdx.x;
  const auto take = [&](int64_t count) {
    const auto divisor = static_cast<uint32_t>(count);
    const uint32_t rest = index % divisor;
    index /= divisor;
    return static_cast<int>(rest);
  };
  const int tile = take(params.num_x_tiles), head = take(num_heads), span = take(params.num_spans);
  const auto seq_idx = static_cast<int>(index);
  const Sequence seq = find_sequence(shape, params.cu_seqlens, seq_idx);
  const int64_t begin = int64_t{span} * params.span_tokens, end = min(begin + params.span_tokens, seq.num_tokens);
  if (span > 0 && begin >= end) return;
  const int num_tokens = static_cast<int>(end - begin), num_chunks = (num_tokens + BLOCK_T - 1) / BLOCK_T;
  const bool is_first = kReverse ? end == seq.num_tokens : span == 0;  // walked first
  const bool is_last = kReverse ? span == 0 : end == seq.num_tokens;
  const bool is_summary = params.out == nullptr;
  const int64_t first_position = seq.first_token + begin;

  const int x_dim = params.x.num_channels, d_dim = params.write.num_channels;
  const int x0 = tile * kWalkBlockX, warp_x = warp_idx * 16;
  const int num_x = min(max(x_dim - x0 - warp_x, 0), 16);
  const int64_t state_size = int64_t{x_dim} * d_dim;
  const auto state_offset = [&] { return (seq_idx * num_heads + head) * state_size; };
  const auto inner_offset = [&] { return head * state_size; };
  const int64_t slot_stride = num_heads * state_size;
  const auto entry_part = [&]<typename Element>(Element* state) {
    return StatePart<Element>(state, x0 + warp_x, num_x, d_dim, params.entry_stride_x, params.entry_stride_d);
  };
  const auto saved_part = [&]<typename Element>(Element* state) {
    return StatePart<Element>(state, x0 + warp_x, num_x, d_dim, params.saved_stride_x, params.saved_stride_d);
  };
  // Slots of states fit into 32 bits: one per kStateInterval tokens and sequence, or fewer, with KiB each.
  const int span_slot = static_cast<int>(seq.first_token / params.span_tokens + seq_idx + span);
  const int saved_slot = static_cast<int>(first_state_slot(seq.first_token, seq_idx) + begin / kStateInterval);
  using ChunkState = RegisterState<Saved, DIM / 8>;
  const auto chunk_state = [&](int chunk) {
    return hide_origin(static_cast<Saved*>(places.states)) +
           chunk * (num_heads * params.num_x_tiles * ChunkState::kSize);
  };

  // State at the near end of the span
  FragC z[DIM / 8] = {};
  if (!kReverse && params.saved_use == WalkParams::kStartFrom && (span > 0 || params.entry == nullptr)) {
    if (num_tokens > 0) {
      const Saved* src = static_cast<const Saved*>(params.saved_states) + saved_slot * slot_stride + inner_offset();
      load_state(z, saved_part(src));
    }
  } else if (is_first) {
    if (params.entry != nullptr) {
      load_state(z, entry_part(params.entry + state_offset()));
    }
  } else if (!is_summary) {
    const float* src = params.span_states + span_slot * slot_stride + inner_offset();
    load_state(z, saved_part(src));
  }

  const auto chunk_at = [&](int step) { return kReverse ? num_chunks - 1 - step : step; };
  const bool is_routed = params.rows != nullptr;
  // A span without tokens is never copied, and where T = 0 its row could not be told.
  if (num_chunks > 0 && threadIdx.x < (kHasDots ? 4 : 3)) {
    const WalkTensor& tensor = threadIdx.x == 0   ? params.write
                               : threadIdx.x == 1 ? params.read
                               : threadIdx.x == 2 ? params.x
                                                  : params.y;
    places.sources[threadIdx.x].set<T>(tensor, shape, params.rows, first_position, head, threadIdx.x < 2 ? 0 : x0);
  }
  if (threadIdx.x == 0) {
    const int64_t first_row = is_routed ? 0 : first_position;
    const int64_t chunk_slot = seq.first_token / BLOCK_T + seq_idx + begin / BLOCK_T;
    const int out_size = params.is_out_float ? sizeof(float) : sizeof(T);
    places.rows = params.rows + first_position;
    places.g = params.g + first_row * num_heads + head;
    places.out = static_cast<char*>(params.out) + ((first_row * num_heads + head) * x_dim + x0) * out_size;
    places.dots = params.dots + (tile * (shape.batch * shape.seqlen) + first_row) * num_heads + head;
    places.states = kHasDots ? static_cast<Saved*>(params.chunk_states) +
                                   ((chunk_slot * num_heads + head) * params.num_x_tiles + tile) * ChunkState::kSize
                             : static_cast<Saved*>(params.saved_states) + saved_slot * slot_stride + inner_offset();
    places.exit = is_summary                          ? params.span_states + span_slot * slot_stride + inner_offset()
                  : is_last && params.exit != nullptr ? params.exit + state_offset()
                                                      : nullptr;
    places.exit_decay = params.span_decays + span_slot * num_heads + head;
  }
  __syncthreads();

  const auto copy_chunk = [&](int step, int stage_idx) {
    if (step < num_chunks) {
      const int chunk = chunk_at(step), valid = min(num_tokens - chunk * BLOCK_T, BLOCK_T);
      ChunkRows<BLOCK_T> rows;
      if (is_routed) rows.load(hide_origin(places.rows), chunk * BLOCK_T, valid);
      if (threadIdx.x < BLOCK_T) {
        const int row = is_routed ? static_cast<int>(rows.own_row(shape, warp_idx)) : chunk * BLOCK_T + threadIdx.x;
        token_rows[stage_idx * BLOCK_T + threadIdx.x] = row;
        const bool is_valid = params.g != nullptr && threadIdx.x < valid;
        const float* g = is_valid ? places.g + row * num_heads : nullptr;
        cp_async_4(smem_address(smem_g + stage_idx * BLOCK_T + threadIdx.x), g, is_valid);
      }
      if constexpr (kReverseDots) ChunkState::prefetch(chunk_state(chunk));
      uint32_t dst = smem_stages + stage_idx * kStageSize;
#pragma unroll 1
      for (int i = 0; i < (is_summary ? 1 : 2); ++i) {
        places.sources[i].copy<T, BLOCK_T, DIM>(dst + i * kTileSize, shape, rows, is_routed, chunk * BLOCK_T, valid,
                                                params.is_aligned);
      }
      dst += 2 * kTileSize;
#pragma unroll 1
      for (int i = 0; i < (kHasDots ? 2 : 1); ++i) {
        places.sources[2 + i].copy<T, BLOCK_T, kWalkBlockX>(dst + i * kTileXSize, shape, rows, is_routed,
                                                            chunk * BLOCK_T, valid, params.is_aligned);
      }
    }
    cp_async_commit();
  };

  copy_chunk(0, 0);
#pragma unroll 1
  for (int step = 0; step < num_chunks; ++step) {
    const int chunk = chunk_at(step), valid = min(num_tokens - chunk * BLOCK_T, BLOCK_T);
    const int stage_idx = params.num_stages == 2 ? step % 2 : 0;
    const uint32_t tile_w = smem_stages + stage_idx * kStageSize, tile_r = tile_w + kTileSize;
    const uint32_t tile_x = tile_r + kTileSize, tile_y = tile_x + kTileXSize;

    cp_async_wait<0>();
    __syncthreads();
    if (params.num_stages == 2) copy_chunk(step + 1, stage_idx ^ 1);

    // Gates; each warp has its own copy
    const int* out_rows = token_rows + stage_idx * BLOCK_T;
    float g[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float given = smem_g[stage_idx * BLOCK_T + lane_idx + i * 32];
      g[i] = (given < -88.f ? -88.f : given) * kLog2e;
    }
    float decay;
    if constexpr (BLOCK_T == 32) {
      const LogDecay sum = inclusive_log_decay(g[0]);
      const LogDecay all{__shfl_sync(kFullWarp, sum.sum, 31), __shfl_sync(kFullWarp, sum.rest, 31)};
      decay = exp2_approx(all.sum);
      cumsum[lane_idx] = sum.sum, rests[lane_idx] = sum.rest;
      in_coef[lane_idx] = params.scale * exp2_approx(sum.sum);
      out_coef[lane_idx] = exp2_approx(all.since(sum));
    } else {
      float g_sum[kPerLane], g_before = 0.f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        g_sum[i] = g_before + warp_inclusive_sum(g[i]);
        g_before = __shfl_sync(kFullWarp, g_sum[i], 31);
      }
      decay = exp2_approx(g_before);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int token = lane_idx + i * 32;
        cumsum[token] = g_sum[i];
        in_coef[token] = params.scale * exp2_approx(g_sum[i]);
        out_coef[token] = exp2_approx(g_before - g_sum[i]);
      }
    }
    if (is_summary && threadIdx.x == 0) smem_products[0] = step == 0 ? decay : smem_products[0] * decay;
    __syncwarp();

    // States between the chunks, for the backward pass or within it
    if constexpr (kForwardDots) {
      ChunkState::store(chunk_state(chunk), z);
    } else if constexpr (!kReverse) {
      constexpr int kChunks = kStateInterval / BLOCK_T;
      if (params.saved_use == WalkParams::kWrite && !is_summary && chunk % kChunks == 0) {
        Saved* dst = hide_origin(static_cast<Saved*>(places.states)) + chunk / kChunks * slot_stride;
        if constexpr (sizeof(Saved) == 2) {
          store_state_pairs(z, dst, x0 + warp_x, num_x, d_dim, params.saved_stride_d, params.has_saved_pairs);
        } else {
          store_state(z, saved_part(dst));
        }
      }
    }
    ChunkState state;
    if constexpr (kReverseDots) state.load(chunk_state(chunk));

    if (!is_summary) {
      // P, its blocks dealt to the warps
      for (int block = warp_idx; block < NUM_CAUSAL; block += 4) {
        int i = 0;
#pragma unroll
        for (int n = 1; n < NUM_BLOCKS; ++n) i += block >= n * (n + 1) / 2;
        const int j = block - i * (i + 1) / 2;
        const uint32_t later = kReverse ? tile_w : tile_r, earlier = kReverse ? tile_r : tile_w;
        FragC sums[2][2] = {};  // two, or every product waits for the one before
#pragma unroll
        for (int d = 0; d < DIM; d += 16) {
          const FragA<T> a = Tile::load_a(later, i * 16, d);
          FragB<T> b[2];
          Tile::load_b(b, earlier, j * 16, d);
          mma(sums[d / 16 % 2][0], a, b[0]);
          mma(sums[d / 16 % 2][1], a, b[1]);
        }
        FragC p[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < 4; ++r) p[half].r[r] = sums[0][half].r[r] + sums[1][half].r[r];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = i * 16 + lane_row + r / 2 * 8, col = j * 16 + half * 8 + lane_col + r % 2;
            float log_decay = cumsum[row] - cumsum[col];
            if constexpr (BLOCK_T == 32) log_decay += rests[row] - rests[col];
            const float weight = params.scale * exp2_approx(log_decay);
            p[half].r[r] = row >= col ? p[half].r[r] * weight : 0.f;
          }
        }
        Block::store_c(smem_p + block * Block::SIZE, p);
        if constexpr (kForwardDots) {
          // M = P (y_i . x_j) off the diagonal, its sums over rows, columns and rectangles
          FragC m[2] = {};
#pragma unroll
          for (int d = 0; d < kWalkBlockX; d += 16) {
            const FragA<T> a = TileX::load_a(tile_y, i * 16, d);
            FragB<T> b[2];
            TileX::load_b(b, tile_x, j * 16, d);
            mma(m[0], a, b[0]);
            mma(m[1], a, b[1]);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int row = lane_row + r / 2 * 8, col = half * 8 + lane_col + r % 2;
              m[half].r[r] = i > j || row > col ? m[half].r[r] * p[half].r[r] : 0.f;
            }
          }
          if (i > j) {
            float total = 0.f;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float sum =
                  sum_over_quad((m[0].r[2 * r] + m[0].r[2 * r + 1]) + (m[1].r[2 * r] + m[1].r[2 * r + 1]));
              if (lane_idx % 4 == 0) smem_rows[block * 16 + lane_row + r * 8] = sum;
              total += sum;
            }
            total = sum_over_rows(total);
            if (lane_idx == 0) smem_totals[block] = total;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const float sum = sum_over_rows(m[half].r[c] + m[half].r[c + 2]);
                if (lane_idx < 4) smem_cols[block * 16 + half * 8 + lane_col + c] = sum;
              }
            }
          } else {
            // Sums over j < t of a row, then over the rows i >= t
            float rect[4] = {};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float before_half = 0.f;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const float first = m[half].r[2 * r], both = first + m[half].r[2 * r + 1];
                const float before = before_half + exclusive_sum<4>(both);
                const int row = lane_row + r * 8, col = half * 8 + lane_col;
                rect[half * 2] += row >= col ? before : 0.f;
                rect[half * 2 + 1] += row >= col + 1 ? before + first : 0.f;
                before_half = sum_over_quad(both);
              }
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float sum = sum_over_rows(rect[c]);
              if (lane_idx < 4) smem_rect[i * 16 + c / 2 * 8 + lane_col + c % 2] = sum;
            }
          }
        }
      }

      if constexpr (kReverseDots) {
        const float product = warp_sum(state.product(z));
        if (lane_idx == 0) smem_products[warp_idx] = product * decay;
      }

      // Z r
      FragC out[BLOCK_T / 8] = {};
#pragma unroll
      for (int d = 0; d < DIM / 16; ++d) {
        const FragA<T> a = make_a<T>(z[2 * d], z[2 * d + 1]);
#pragma unroll
        for (int n = 0; n < NUM_BLOCKS; ++n) {
          FragB<T> b[2];
          Tile::load_b(b, tile_r, n * 16, d * 16);
          mma(out[2 * n], a, b[0]);
          mma(out[2 * n + 1], a, b[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < BLOCK_T / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) out[n].r[r] *= read_coef[n * 8 + lane_col + r % 2];
      }
      if constexpr (kHasDots) {
#pragma unroll
        for (int n = 0; n < NUM_BLOCKS; ++n) {
          const FragA<T> y = TileX::load_a_trans(tile_y, n * 16, warp_x);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 top = pair_of(y, 2 * half), bottom = pair_of(y, 2 * half + 1);
            const float (&o)[4] = out[2 * n + half].r;
            const float first = sum_over_rows(o[0] * top.x + o[2] * bottom.x);
            const float second = sum_over_rows(o[1] * top.y + o[3] * bottom.y);
            if (lane_idx < 4) {
              smem_dots[warp_idx * BLOCK_T + n * 16 + half * 8 + lane_col] = first;
              smem_dots[warp_idx * BLOCK_T + n * 16 + half * 8 + lane_col + 1] = second;
            }
          }
        }
      }
      __syncthreads();

      // P x
#pragma unroll
      for (int from = 0; from < NUM_BLOCKS; ++from) {
        const FragA<T> x = TileX::load_a_trans(tile_x, from * 16, warp_x);
        FragA<T> finite = x;
        int bad[2];
        clear_non_finite<T, kReverse>(finite, bad);
#pragma unroll
        for (int to = 0; to < NUM_BLOCKS; ++to) {
          if (kReverse ? to > from : to < from) continue;
          const int later = kReverse ? from : to, earlier = kReverse ? to : from;
          const uint32_t block = smem_p + (later * (later + 1) / 2 + earlier) * Block::SIZE;
          FragB<T> b[2];
          if constexpr (kReverse) {
            Block::load_b_trans(b, block);
          } else {
            Block::load_b(b, block);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            FragC& acc = out[2 * to + half];
            mma(acc, to == from ? finite : x, b[half]);
            if (to == from) {
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const int token = half * 8 + lane_col + r % 2;
                if (kReverse ? token <= bad[r / 2] : token >= bad[r / 2]) acc.r[r] = __int_as_float(0x7fffffff);
              }
            }
          }
        }
      }

      // Outputs
      const int row_size = static_cast<int>(num_heads) * x_dim;
      if (params.is_out_float || sizeof(T) == 4) {
#pragma unroll
        for (int n = 0; n < BLOCK_T / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = n * 8 + lane_col + e;
            float* dst =
                hide_origin(static_cast<float*>(places.out)) + int64_t{out_rows[token]} * row_size + warp_x + lane_row;
            if (token < valid && lane_row < num_x) dst[0] = out[n].r[e];
            if (token < valid && lane_row + 8 < num_x) dst[8] = out[n].r[e + 2];
          }
        }
      } else if constexpr (sizeof(T) == 2) {
        const auto for_each_token = [&](auto store) {
#pragma unroll
          for (int n = 0; n < BLOCK_T / 8; ++n) {
            const uint32_t lo = transpose_8x8(pack<T>(out[n].r[0], out[n].r[1]));
            const uint32_t hi = transpose_8x8(pack<T>(out[n].r[2], out[n].r[3]));
            T* dst = hide_origin(static_cast<T*>(places.out)) + int64_t{out_rows[n * 8 + lane_row]} * row_size +
                     warp_x + lane_col;
            if (n * 8 + lane_row < valid) store(dst, lo, hi);
          }
        };
        if (params.is_aligned) {
          for_each_token([&](T* dst, uint32_t lo, uint32_t hi) {
            if (lane_col < num_x) *reinterpret_cast<uint32_t*>(dst) = lo;
            if (lane_col + 8 < num_x) *reinterpret_cast<uint32_t*>(dst + 8) = hi;
          });
        } else {
          for_each_token([&](T* dst, uint32_t lo, uint32_t hi) {
            const float2 first = unpack<T>(lo), second = unpack<T>(hi);
            if (lane_col < num_x) dst[0] = static_cast<T>(first.x);
            if (lane_col + 1 < num_x) dst[1] = static_cast<T>(first.y);
            if (lane_col + 8 < num_x) dst[8] = static_cast<T>(second.x);
            if (lane_col + 9 < num_x) dst[9] = static_cast<T>(second.y);
          });
        }
      }

      // The chunk's share of dg
      if (kHasDots && threadIdx.x < BLOCK_T) {
        const int token = threadIdx.x;
        const auto dots_of = [&](int t) {
          return (smem_dots[t] + smem_dots[BLOCK_T + t]) + (smem_dots[2 * BLOCK_T + t] + smem_dots[3 * BLOCK_T + t]);
        };
        float dg;
        if constexpr (kReverse) {
          dg = exclusive_sum<32>(dots_of(token));
          if (BLOCK_T == 64) {
            const float below = warp_sum(dots_of(lane_idx));
            if (token >= 32) dg += below;
          }
          dg += (smem_products[0] + smem_products[1]) + (smem_products[2] + smem_products[3]);
        } else {
          dg = suffix_sum<32>(dots_of(token));
          if (BLOCK_T == 64) {
            const float above = warp_sum(dots_of(BLOCK_T - 32 + lane_idx));
            if (token < 32) dg += above;
          }
          const int block = token / 16;
          float as_row = 0.f, as_col = 0.f, over = 0.f;
          for (int j = 0; j < block; ++j) as_row += smem_rows[(block * (block + 1) / 2 + j) * 16 + token % 16];
          for (int i = block + 1; i < NUM_BLOCKS; ++i) {
            as_col += smem_cols[(i * (i + 1) / 2 + block) * 16 + token % 16];
            for (int j = 0; j < block; ++j) over += smem_totals[i * (i + 1) / 2 + j];
          }
          dg += ((suffix_sum<16>(as_row) + exclusive_sum<16>(as_col)) + over) + smem_rect[token];
        }
        if (token < valid) {
          hide_origin(places.dots)[out_rows[token] * num_heads] = dg;
        }
      }
    }

    // The state leaving the chunk. In reverse all coefficients may be too small for half: a power of two lifts them.
    constexpr bool kIsLifted = kReverse && std::is_same_v<T, __half>;
    const int lift = kIsLifted ? static_cast<int>(fminf(-cumsum[0], 60.f)) : 0;
    const float raise = __int_as_float((127 + lift) << 23), lower = __int_as_float((127 - lift) << 23);
    const auto scale_state = [&](float factor) {
#pragma unroll
      for (int i = 0; i < DIM / 8; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) z[i].r[r] *= factor;
      }
    };
    scale_state(kIsLifted ? decay * raise : decay);
#pragma unroll
    for (int n = 0; n < NUM_BLOCKS; ++n) {
      FragA<T> x = TileX::load_a_trans(tile_x, n * 16, warp_x);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int token = n * 16 + lane_col + pair / 2 * 8;
        const float2 value = pair_of(x, pair);
        float2 coef{write_coef[token], write_coef[token + 1]};
        if constexpr (kIsLifted) coef = {coef.x * raise, coef.y * raise};
        set_pair(x, pair, {value.x * coef.x, value.y * coef.y});
      }
#pragma unroll
      for (int d = 0; d < DIM / 16; ++d) {
        FragB<T> b[2];
        Tile::load_b_trans(b, tile_w, n * 16, d * 16);
        mma(z[2 * d], x, b[0]);
        mma(z[2 * d + 1], x, b[1]);
      }
    }
    if constexpr (kIsLifted) scale_state(lower);
    if (params.num_stages == 1 && step + 1 < num_chunks) {
      __syncthreads();
      copy_chunk(step + 1, 0);
    }
  }

  // State at the far end
  float* const exit = places.exit;
  if (is_summary) {
    store_state(z, saved_part(hide_origin(exit)));
    if (tile == 0 && threadIdx.x == 0) *hide_origin(places.exit_decay) = num_chunks > 0 ? smem_products[0] : 1.f;
  } else if (exit != nullptr) {
    store_state(z, entry_part(hide_origin(exit)));
  }
}

template <typename T>
cudaError_t launch_walk(const WalkParams& params, int dim, bool is_reverse, bool has_dots, int arch,
                        cudaStream_t stream) {
  const int max_smem = arch == 80 || arch == 87 ? 163 * 1024 : arch >= 90 && arch < 120 ? 227 * 1024 : 99 * 1024;
  WalkParams walk = params;
  walk.num_stages = walk_smem_size(sizeof(T), dim, has_dots, 2) <= max_smem ? 2 : 1;
  const int smem_size = walk_smem_size(sizeof(T), dim, has_dots, walk.num_stages);
  const int64_t num_ctas = walk.shape.num_seqs * walk.num_spans * walk.shape.num_value_heads * walk.num_x_tiles;
  const auto launch = [&](auto kernel) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_size);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(num_ctas), kWalkThreads, smem_size, stream>>>(walk);
    return cudaGetLastError();
  };
  const auto launch_dim = [&]<int DIM>(std::integral_constant<int, DIM>) {
    if (is_reverse) {
      return launch(has_dots ? simple_gla_walk_kernel<T, DIM, true, true>
                             : simple_gla_walk_kernel<T, DIM, true, false>);
    }
    return launch(has_dots ? simple_gla_walk_kernel<T, DIM, false, true>
                           : simple_gla_walk_kernel<T, DIM, false, false>);
  };
  return dim == 64 ? launch_dim(std::integral_constant<int, 64>{}) : launch_dim(std::integral_constant<int, 128>{});
}

}  // namespace remora
