// What the kernels of the selective scan share: where the tokens of an interval lie, and tiles of them in shared
// memory.
//
// A CTA owns CHANNELS channels of one group. In the kernels that walk tokens one by one LANES neighbouring lanes share
// a channel and hold LANE_STATES of its states each, in registers. Tiles of tokens are converted to float on their way
// to shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/hints.cuh"
#include "common/math.cuh"
#include "recurrence/selective_scan/params.h"
#include "recurrence/sequence.cuh"

namespace remora {

constexpr int kScanThreads = 128;
constexpr int kTileTokens = 16;
constexpr int kWalkStates = 16, kStepStates = 4;  // of a lane
// Of the backward kernel: what a lane holds, the lanes that share a channel, the channels of a CTA, and the states of B
// and C that are in shared memory at a time.
constexpr int kRunTokens = 8, kRunChannels = 2;
constexpr int kRunLanes = kScanInterval / kRunTokens;
constexpr int kBwdChannels = kScanThreads / kRunLanes * kRunChannels;
constexpr int kStageStates = 8;
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
static_assert(kScanInterval % kTileTokens == 0);

template <int LANES_, int LANE_STATES_>
struct ScanTraits {
  static constexpr int LANES = LANES_, LANE_STATES = LANE_STATES_;
  static constexpr int CHANNELS = kScanThreads / LANES, STATES = LANES * LANE_STATES;
  // CTAs of a multiprocessor that leave registers enough.
  static constexpr int SUMMARY_CTAS = 5, FWD_CTAS = 4;
  static constexpr int UNROLL = LANES == 1 ? 4 : 2;  // tokens
  // One more than a power of two: a column is read and written without bank conflicts, too.
  static constexpr int LD = CHANNELS + 1;
};

/// An interval of a sequence, in scan order.
struct ScanInterval {
  int64_t slot, seq_idx, chunk_idx, batch;
  int64_t first_token;  // within its batch row
  int64_t token_step;   // 1 or -1
  int num_tokens;       // 0: no interval owns the slot
  bool is_last;

  __device__ __forceinline__ int64_t token(int i) const { return first_token + i * token_step; }
};

__device__ __forceinline__ ScanInterval find_interval(const SelectiveScanInputs& in, int64_t slot) {
  const RecurrenceShape& shape = in.shape.sequences;
  const Chunk chunk = find_chunk<kScanInterval>(shape, in.cu_seqlens, slot);
  const Sequence seq = find_sequence(shape, in.cu_seqlens, chunk.seq_idx);
  const int64_t begin = seq.first_token % shape.seqlen, offset = chunk.chunk_idx * kScanInterval;
  return {slot,
          chunk.seq_idx,
          chunk.chunk_idx,
          seq.first_token / shape.seqlen,
          in.reverse ? begin + seq.num_tokens - 1 - offset : begin + offset,
          in.reverse ? -1 : 1,
          chunk.num_tokens,
          offset + chunk.num_tokens == seq.num_tokens};
}

/// The state that a thread of the combining kernels owns; CTAs of one sequence are neighbours.
struct ScanStateThread {
  int64_t per_seq, seq_idx, offset, channel;  // offset: within [D, N]
  int64_t index;                              // within [num_seqs, D, N]
  bool is_valid;

  __host__ __device__ static int64_t ctas_per_seq(const SelectiveScanShape& shape) {
    return (shape.num_channels * shape.state_dim + kScanThreads - 1) / kScanThreads;
  }

  __device__ __forceinline__ explicit ScanStateThread(const SelectiveScanShape& shape) {
    per_seq = shape.num_channels * shape.state_dim;
    seq_idx = blockIdx.x / ctas_per_seq(shape);
    offset = blockIdx.x % ctas_per_seq(shape) * kScanThreads + threadIdx.x;
    channel = offset / shape.state_dim;
    index = seq_idx * per_seq + offset;
    is_valid = offset < per_seq;
  }
};

/// Walks the intervals of a sequence, from its first slot or, with step -1, from its last: replaces what each adds to
/// `carried` by what reaches it. What the last interval walked would add is never written.
__device__ __forceinline__ void combine_intervals(const ScanStateThread& at, const SelectiveScanShape& shape,
                                                  const float* gmem_a, int64_t first_slot, int64_t num_intervals,
                                                  int step, float* states, const float* steps, float carried) {
  // Read ahead, since a load cannot pass the stores in front of it by itself.
  constexpr int kAhead = 8;
  const float rate = gmem_a[at.offset] * kLog2e;
  int64_t slot = step > 0 ? first_slot : first_slot + num_intervals - 1;
  for (int64_t i = 0; i < num_intervals; i += kAhead) {
    float added[kAhead], sums[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool is_read = i + j < num_intervals - 1;
      added[j] = is_read ? states[(slot + j * step) * at.per_seq + at.offset] : 0.f;
      sums[j] = is_read ? steps[(slot + j * step) * shape.num_channels + at.channel] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j < num_intervals) states[(slot + j * step) * at.per_seq + at.offset] = carried;
      carried = exp2_approx(sums[j] * rate) * carried + added[j];
    }
    slot += kAhead * step;
  }
}

/// The channels of a CTA.
struct ScanChannelBlock {
  int64_t index, group, first;
  int num_channels;
};

template <int CHANNELS>
__host__ __device__ __forceinline__ int64_t scan_blocks_per_group(const SelectiveScanShape& shape) {
  return (shape.group_channels() + CHANNELS - 1) / CHANNELS;
}

template <int CHANNELS>
__device__ __forceinline__ ScanChannelBlock find_channel_block(const SelectiveScanShape& shape, int64_t index) {
  const int64_t per_group = scan_blocks_per_group<CHANNELS>(shape);
  const int64_t group = index / per_group, begin = index % per_group * CHANNELS;
  return {index, group, group * shape.group_channels() + begin,
          static_cast<int>(min(shape.group_channels() - begin, int64_t{CHANNELS}))};
}

/// What a CTA works on: in shared memory, since registers are scarce.
struct ScanPlace {
  ScanInterval interval;
  ScanChannelBlock block;

  /// By the whole CTA.
  template <int CHANNELS>
  __device__ __forceinline__ void find(const SelectiveScanInputs& in, int64_t num_channel_blocks) {
    if (threadIdx.x < 32) {
      const ScanInterval found = find_interval(in, blockIdx.x / num_channel_blocks);
      if (threadIdx.x == 0) {
        interval = found;
        block = find_channel_block<CHANNELS>(in.shape, blockIdx.x % num_channel_blocks);
      }
    }
    __syncthreads();
  }
};

/// Walks a [ROWS, COLS] matrix whose first num_rows rows and num_cols columns exist. Neighbouring threads take
/// neighbouring rows (ROWS_FIRST) or columns. Calls visit(row, col, exists, address).
template <int ROWS, int COLS, bool ROWS_FIRST, typename T, typename Visit>
__device__ __forceinline__ void for_each_element(T* gmem, int64_t stride_row, int64_t stride_col, int num_rows,
                                                 int num_cols, Visit visit) {
  constexpr int ROW_STEP = ROWS_FIRST ? 0 : kScanThreads / COLS, COL_STEP = ROWS_FIRST ? kScanThreads / ROWS : 0;
  static_assert(kScanThreads % ROWS == 0 && kScanThreads % COLS == 0);
  const uint32_t thread_idx = read_thread_idx();
  const int row = ROWS_FIRST ? thread_idx % ROWS : thread_idx / COLS;
  const int col = ROWS_FIRST ? thread_idx / ROWS : thread_idx % COLS;
  gmem = hide_origin(gmem + row * stride_row + col * stride_col);
  const int64_t step = ROWS_FIRST ? COL_STEP * stride_col : ROW_STEP * stride_row;
  const bool has_row = row < num_rows, has_col = col < num_cols;
#pragma unroll
  for (int i = 0; i < ROWS * COLS / kScanThreads; ++i) {
    const bool exists =
        ROWS_FIRST ? has_row && col + i * COL_STEP < num_cols : has_col && row + i * ROW_STEP < num_rows;
    visit(row + i * ROW_STEP, col + i * COL_STEP, exists, gmem);
    gmem = hide_origin(gmem + step);
  }
}

/// Of any strides: along whichever dimension is contiguous.
template <int ROWS, int COLS, typename T, typename Visit>
__device__ __forceinline__ void for_each_element(T* gmem, int64_t stride_row, int64_t stride_col, int num_rows,
                                                 int num_cols, Visit visit) {
  if (stride_col == 1) {
    for_each_element<ROWS, COLS, false>(gmem, stride_row, stride_col, num_rows, num_cols, visit);
  } else {
    for_each_element<ROWS, COLS, true>(gmem, stride_row, stride_col, num_rows, num_cols, visit);
  }
}

/// To rows of `ld` floats; zeros for what does not exist.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_tile(const T* src, int64_t stride_row, int64_t stride_col, int num_rows,
                                          int num_cols, float* smem_tile, int ld) {
  for_each_element<ROWS, COLS>(src, stride_row, stride_col, num_rows, num_cols,
                               [&](int row, int col, bool exists, const T* gmem) {
                                 smem_tile[row * ld + col] = static_cast<float>(exists ? *gmem : T(0.f));
                               });
}

/// Of a [ROWS, COLS] matrix whose rows are neighbours: calls visit(i, row, col) for the vectors that a thread moves.
/// Two lanes share the 32 bytes of a sector; their neighbours take the next column.
template <int ROWS, int COLS, int ELEMENTS, typename Visit>
__device__ __forceinline__ void for_each_vector(Visit visit) {
  constexpr int kVectors = ROWS / ELEMENTS * COLS;
  static_assert(ROWS % (2 * ELEMENTS) == 0);
  const int thread_idx = read_thread_idx();
#pragma unroll
  for (int i = 0; i < (kVectors + kScanThreads - 1) / kScanThreads; ++i) {
    const int index = thread_idx + i * kScanThreads;
    if (kVectors % kScanThreads != 0 && index >= kVectors) continue;
    visit(i, (index / 2 / COLS * 2 + index % 2) * ELEMENTS, index / 2 % COLS);
  }
}

template <typename T>
union ScanVector {
  static constexpr int kElements = 16 / sizeof(T);
  uint4 bits;
  T element[kElements];
  __device__ ScanVector() : bits{} {}
};

/// A tile on its way to shared memory, so that all loads come before the first store. All its rows exist, are
/// neighbours and aligned to 16 bytes in every column; zeros for columns that do not exist.
template <int ROWS, int COLS, typename T>
class FetchedTile {
 public:
  __device__ __forceinline__ FetchedTile(const T* src, int64_t stride_col, int num_cols) {
    for_each_vector<ROWS, COLS, kElements>([&](int i, int row, int col) {
      if (col < num_cols) vectors_[i].bits = *reinterpret_cast<const uint4*>(src + col * stride_col + row);
    });
  }
  /// Calls visit(row, col, value).
  template <typename Visit>
  __device__ __forceinline__ void store(Visit visit) const {
    for_each_vector<ROWS, COLS, kElements>([&](int i, int row, int col) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) visit(row + e, col, static_cast<float>(vectors_[i].element[e]));
    });
  }
  __device__ __forceinline__ void store(float* smem_tile, int ld) const {
    store([&](int row, int col, float value) { smem_tile[row * ld + col] = value; });
  }

 private:
  static constexpr int kElements = ScanVector<T>::kElements;
  ScanVector<T> vectors_[(ROWS / kElements * COLS + kScanThreads - 1) / kScanThreads];
};

template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void store_tile(const float* smem_tile, int ld, int num_rows, int num_cols, T* dst,
                                           int64_t stride_row, int64_t stride_col) {
  for_each_element<ROWS, COLS>(dst, stride_row, stride_col, num_rows, num_cols,
                               [&](int row, int col, bool exists, T* gmem) {
                                 if (exists) *gmem = static_cast<T>(smem_tile[row * ld + col]);
                               });
}

/// Of token `first` of an interval, first channel of a CTA.
template <typename Pointer>
__device__ __forceinline__ Pointer* channel_tokens(Pointer* data, const ScanStrides& stride,
                                                   const ScanInterval& interval, const ScanChannelBlock& block,
                                                   int first) {
  return data + interval.batch * stride.batch + interval.token(first) * stride.token + block.first * stride.channel;
}

/// Tokens [first, first + ROWS) of an interval, the channels of a CTA; rows of COLS + 1 floats.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_channels(const void* data, const ScanStrides& stride, const ScanInterval& interval,
                                              const ScanChannelBlock& block, int first, float* smem_tile) {
  load_tile<ROWS, COLS>(channel_tokens(static_cast<const T*>(data), stride, interval, block, first),
                        interval.token_step * stride.token, stride.channel, interval.num_tokens - first,
                        block.num_channels, smem_tile, COLS + 1);
}
/// Without data, of no channel.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ FetchedTile<ROWS, COLS, T> fetch_channels(const void* data, const ScanStrides& stride,
                                                                     const ScanInterval& interval,
                                                                     const ScanChannelBlock& block, int first) {
  return {channel_tokens(static_cast<const T*>(data), stride, interval, block, first), stride.channel,
          data != nullptr ? block.num_channels : 0};
}

/// Of the first token of an interval and state `first_state`, in B or C.
template <typename T>
__device__ __forceinline__ const T* map_tokens(const void* data, const ScanGroupStrides& stride,
                                               const ScanInterval& interval, const ScanChannelBlock& block,
                                               int first_state) {
  return static_cast<const T*>(data) + interval.batch * stride.batch + interval.token(0) * stride.token +
         block.group * stride.group + first_state * stride.state;
}

/// Whether the interval's tokens lie in vectors, in every channel or state.
template <typename T>
__device__ __forceinline__ bool has_token_vectors(const T* first_token, int64_t stride_token, int64_t stride_col) {
  return stride_token == 1 &&
         (reinterpret_cast<uintptr_t>(first_token) | static_cast<uintptr_t>(stride_col) * sizeof(T)) % 16 == 0;
}
template <typename T>
__device__ __forceinline__ bool has_token_vectors(const void* data, const ScanStrides& stride,
                                                  const ScanInterval& interval, const ScanChannelBlock& block) {
  return data == nullptr || has_token_vectors(channel_tokens(static_cast<const T*>(data), stride, interval, block, 0),
                                              interval.token_step * stride.token, stride.channel);
}
template <typename T>
__device__ __forceinline__ bool has_token_vectors(const void* data, const ScanGroupStrides& stride,
                                                  const ScanInterval& interval, const ScanChannelBlock& block) {
  return has_token_vectors(map_tokens<T>(data, stride, interval, block, 0), interval.token_step * stride.token,
                           stride.state);
}

template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void store_channels(const float* smem_tile, const ScanInterval& interval,
                                               const ScanChannelBlock& block, int first, void* data,
                                               const ScanStrides& stride) {
  T* dst = channel_tokens(static_cast<T*>(data), stride, interval, block, first);
  const int64_t step = interval.token_step * stride.token;
  if (first + ROWS > interval.num_tokens || !has_token_vectors(dst, step, stride.channel)) {
    store_tile<ROWS, COLS>(smem_tile, COLS + 1, interval.num_tokens - first, block.num_channels, dst, step,
                           stride.channel);
    return;
  }
  for_each_vector<ROWS, COLS, ScanVector<T>::kElements>([&](int, int row, int col) {
    if (col >= block.num_channels) return;
    ScanVector<T> x;
#pragma unroll
    for (int e = 0; e < x.kElements; ++e) x.element[e] = static_cast<T>(smem_tile[(row + e) * (COLS + 1) + col]);
    __stwb(reinterpret_cast<uint4*>(dst + col * stride.channel + row), x.bits);
  });
}

/// max(x, 0) + log1p(w), w = exp(-|x|), where log1p(w) = 2 atanh(w / (2 + w)), a polynomial to 4e-9.
__device__ __forceinline__ float scan_softplus(float x) {
  const float w = exp2_approx(-kLog2e * fabsf(x)), s = w * rcp_approx(2.f + w), q = s * s;
  const float series = (((0.281746745f * q + 0.279614329f) * q + 0.400248498f) * q + 0.666663170f) * q + 2.f;
  return fmaxf(x, 0.f) + s * series;
}

/// A CTA that walks tokens: the constants of a thread's channel in registers, tiles in shared memory.
template <typename T, class Traits>
struct ScanBlock {
  static constexpr int CHANNELS = Traits::CHANNELS, STATES = Traits::STATES, LD = Traits::LD;
  static constexpr int LANE_STATES = Traits::LANE_STATES;

  const SelectiveScanInputs& in;
  const ScanInterval& interval;
  const ScanChannelBlock& block;
  int channel, first_state;  // of the thread, within the block
  bool is_valid;             // whether its channel exists
  float rate[LANE_STATES];   // A log2(e)
  float bias;

  __device__ __forceinline__ ScanBlock(const SelectiveScanInputs& inputs, const ScanInterval& tokens,
                                       const ScanChannelBlock& channels)
      : in(inputs), interval(tokens), block(channels) {
    channel = threadIdx.x / Traits::LANES;
    first_state = threadIdx.x % Traits::LANES * LANE_STATES;
    is_valid = channel < block.num_channels;
    load_state(in.a, 0, rate);
#pragma unroll
    for (int j = 0; j < LANE_STATES; ++j) rate[j] *= kLog2e;
    bias = channel_value(in.delta_bias);
  }

  __device__ __forceinline__ bool has_state(int j) const { return is_valid && first_state + j < in.shape.state_dim; }
  __device__ __forceinline__ bool is_first_lane() const { return is_valid && threadIdx.x % Traits::LANES == 0; }

  /// Of the thread's first state in a [rows, D, N] tensor.
  __device__ __forceinline__ int64_t state_offset(int64_t row) const {
    return (row * in.shape.num_channels + block.first + channel) * in.shape.state_dim + first_state;
  }
  /// Whether all states of a lane exist and lie in vectors of four.
  __device__ __forceinline__ bool has_vectors(const void* states) const {
    return is_valid && in.shape.state_dim % LANE_STATES == 0 && first_state < in.shape.state_dim &&
           reinterpret_cast<uintptr_t>(states) % sizeof(float4) == 0;
  }
  __device__ __forceinline__ void load_state(const void* states, int64_t row, float* x) const {
    const float* src = static_cast<const float*>(states) + state_offset(row);
    if (states != nullptr && has_vectors(states)) {
#pragma unroll
      for (int j = 0; j < LANE_STATES; j += 4) {
        const float4 v = *reinterpret_cast<const float4*>(src + j);
        x[j] = v.x, x[j + 1] = v.y, x[j + 2] = v.z, x[j + 3] = v.w;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < LANE_STATES; ++j) x[j] = states != nullptr && has_state(j) ? src[j] : 0.f;
  }
  __device__ __forceinline__ void store_state(const float* x, void* states, int64_t row) const {
    float* dst = static_cast<float*>(states) + state_offset(row);
    if (has_vectors(states)) {
#pragma unroll
      for (int j = 0; j < LANE_STATES; j += 4) {
        *reinterpret_cast<float4*>(dst + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < LANE_STATES; ++j) {
      if (has_state(j)) dst[j] = x[j];
    }
  }
  __device__ __forceinline__ float channel_value(const void* values) const {
    return values != nullptr && is_valid ? static_cast<const float*>(values)[block.first + channel] : 0.f;
  }

  __device__ __forceinline__ void load(const void* data, const ScanStrides& stride, int first, float* smem_tile) const {
    load_channels<kTileTokens, CHANNELS, T>(data, stride, interval, block, first, smem_tile);
  }
  __device__ __forceinline__ void load_map(const void* data, const ScanGroupStrides& stride, int first,
                                           float* smem_tile) const {
    const int64_t step = interval.token_step * stride.token;
    load_tile<kTileTokens, STATES>(map_tokens<T>(data, stride, interval, block, 0) + first * step, step, stride.state,
                                   interval.num_tokens - first, static_cast<int>(in.shape.state_dim), smem_tile,
                                   STATES);
  }
  __device__ __forceinline__ FetchedTile<kTileTokens, CHANNELS, T> fetch(const void* data, const ScanStrides& stride,
                                                                         int first) const {
    return fetch_channels<kTileTokens, CHANNELS, T>(data, stride, interval, block, first);
  }
  __device__ __forceinline__ FetchedTile<kTileTokens, STATES, T> fetch_map(const void* data,
                                                                           const ScanGroupStrides& stride,
                                                                           int first) const {
    return {map_tokens<T>(data, stride, interval, block, 0) + first, stride.state,
            static_cast<int>(in.shape.state_dim)};
  }
  template <typename Strides>
  __device__ __forceinline__ bool has_token_vectors(const void* data, const Strides& stride) const {
    return remora::has_token_vectors<T>(data, stride, interval, block);
  }
  /// The thread's states of token t of a map's tile.
  __device__ __forceinline__ void read_map(const float* smem_tile, int t, float* v) const {
#pragma unroll
    for (int j = 0; j < LANE_STATES; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(smem_tile + t * STATES + first_state + j);
      v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
    }
  }
  __device__ __forceinline__ float step_of(float delta) const {
    const float logit = delta + bias;
    return in.delta_softplus ? scan_softplus(logit) : logit;
  }

  /// Applies f in place to a tile's values of the thread's channel; its lanes share the tokens.
  template <typename F>
  __device__ __forceinline__ void for_own_tokens(float* smem_tile, F f) const {
#pragma unroll
    for (int i = 0; i < (kTileTokens + Traits::LANES - 1) / Traits::LANES; ++i) {
      const int t = i * Traits::LANES + threadIdx.x % Traits::LANES;
      if (Traits::LANES <= kTileTokens || t < kTileTokens) {
        float& value = smem_tile[t * LD + channel];
        value = f(t, value);
      }
    }
  }
  /// Steps from their logits; behind the last token a step of zero keeps the state.
  __device__ __forceinline__ void make_steps(float* smem_delta, int num_tokens) const {
    if (in.delta_softplus) {
      for_own_tokens(smem_delta, [&](int t, float x) { return t < num_tokens ? scan_softplus(x + bias) : 0.f; });
    } else {
      for_own_tokens(smem_delta, [&](int t, float x) { return t < num_tokens ? x + bias : 0.f; });
    }
    __syncwarp();
  }
  __device__ __forceinline__ void make_gates(float* smem_z) const {
    for_own_tokens(smem_z, [](int, float z) { return z * sigmoid(z); });
    __syncwarp();
  }
};

}  // namespace remora
