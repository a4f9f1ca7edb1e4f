// What the kernels of the selective scan share: where the tokens of an interval lie, and tiles of them in shared
// memory.
//
// A CTA owns CHANNELS channels of one group; LANES neighbouring lanes share a channel and hold kStatesPerLane of its
// states each, in registers. Tokens come in tiles of kTileTokens, converted to float on their way to shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/reduce.cuh"
#include "recurrence/selective_scan/params.h"
#include "recurrence/sequence.cuh"

namespace remora {

constexpr int kScanThreads = 128;
constexpr int kTileTokens = 16;
constexpr int kStatesPerLane = 4;
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
static_assert(kScanInterval % kTileTokens == 0);

template <int LANES>
struct ScanTraits {
  static constexpr int CHANNELS = kScanThreads / LANES;
  static constexpr int STATES = LANES * kStatesPerLane;
  // One more than a power of two: a column is read and written without bank conflicts, too.
  static constexpr int LD = CHANNELS + 1;
  static constexpr int LD_STATES = STATES + 4;  // keeps rows 16-byte aligned
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

/// The channels of a CTA.
struct ScanChannelBlock {
  int64_t index, group, first;
  int num_channels;
};

template <int LANES>
__host__ __device__ __forceinline__ int64_t scan_blocks_per_group(const SelectiveScanShape& shape) {
  constexpr int CHANNELS = ScanTraits<LANES>::CHANNELS;
  return (shape.num_channels / shape.num_groups + CHANNELS - 1) / CHANNELS;
}

template <int LANES>
__device__ __forceinline__ ScanChannelBlock find_channel_block(const SelectiveScanShape& shape, int64_t index) {
  constexpr int CHANNELS = ScanTraits<LANES>::CHANNELS;
  const int64_t per_group = scan_blocks_per_group<LANES>(shape), group_channels = shape.num_channels / shape.num_groups;
  const int64_t begin = index % per_group * CHANNELS;
  return {index, index / per_group, index / per_group * group_channels + begin,
          static_cast<int>(min(group_channels - begin, int64_t{CHANNELS}))};
}

/// A [kTileTokens, COLS] matrix of any strides to rows of `ld` floats; zeros beyond num_rows and num_cols. Neighbouring
/// threads take neighbouring elements of whichever dimension is contiguous.
template <typename T, int COLS>
__device__ __forceinline__ void load_tile(const T* src, int64_t stride_row, int64_t stride_col, int num_rows,
                                          int num_cols, float* smem_tile, int ld) {
  const bool rows_first = stride_col != 1;
  for (int i = threadIdx.x; i < kTileTokens * COLS; i += kScanThreads) {
    const int row = rows_first ? i % kTileTokens : i / COLS, col = rows_first ? i / kTileTokens : i % COLS;
    smem_tile[row * ld + col] =
        row < num_rows && col < num_cols ? static_cast<float>(src[row * stride_row + col * stride_col]) : 0.f;
  }
}

template <typename T, int COLS>
__device__ __forceinline__ void store_tile(const float* smem_tile, int ld, int num_rows, int num_cols, T* dst,
                                           int64_t stride_row, int64_t stride_col) {
  const bool rows_first = stride_col != 1;
  for (int i = threadIdx.x; i < kTileTokens * COLS; i += kScanThreads) {
    const int row = rows_first ? i % kTileTokens : i / COLS, col = rows_first ? i / kTileTokens : i % COLS;
    if (row < num_rows && col < num_cols) {
      dst[row * stride_row + col * stride_col] = static_cast<T>(smem_tile[row * ld + col]);
    }
  }
}

__device__ __forceinline__ float scan_softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float scan_sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// A CTA's view of its inputs: the channels' constants in registers, tiles in shared memory.
template <typename T, int LANES>
struct ScanBlock {
  using Traits = ScanTraits<LANES>;
  static constexpr int CHANNELS = Traits::CHANNELS, STATES = Traits::STATES, LD = Traits::LD;

  const SelectiveScanInputs& in;
  const ScanInterval& interval;
  const ScanChannelBlock& block;
  int channel, first_state;    // of the thread, within the block
  bool is_valid;               // whether its channel exists
  float rate[kStatesPerLane];  // A log2(e)

  __device__ __forceinline__ ScanBlock(const SelectiveScanInputs& inputs, const ScanInterval& tokens,
                                       const ScanChannelBlock& channels)
      : in(inputs), interval(tokens), block(channels) {
    channel = threadIdx.x / LANES;
    first_state = threadIdx.x % LANES * kStatesPerLane;
    is_valid = channel < block.num_channels;
#pragma unroll
    for (int j = 0; j < kStatesPerLane; ++j) {
      const float a = has_state(j) ? static_cast<const float*>(in.a)[state_offset(0) + j] : 0.f;
      rate[j] = a * kLog2e;
    }
  }

  __device__ __forceinline__ bool has_state(int j) const { return is_valid && first_state + j < in.shape.state_dim; }

  /// Of the thread's first state in a [rows, D, N] tensor.
  __device__ __forceinline__ int64_t state_offset(int64_t row) const {
    return (row * in.shape.num_channels + block.first + channel) * in.shape.state_dim + first_state;
  }
  __device__ __forceinline__ void load_state(const void* states, int64_t row, float* x) const {
#pragma unroll
    for (int j = 0; j < kStatesPerLane; ++j) {
      x[j] = states != nullptr && has_state(j) ? static_cast<const float*>(states)[state_offset(row) + j] : 0.f;
    }
  }
  __device__ __forceinline__ void store_state(const float* x, void* states, int64_t row) const {
#pragma unroll
    for (int j = 0; j < kStatesPerLane; ++j) {
      if (has_state(j)) static_cast<float*>(states)[state_offset(row) + j] = x[j];
    }
  }
  __device__ __forceinline__ float channel_value(const void* values) const {
    return values != nullptr && is_valid ? static_cast<const float*>(values)[block.first + channel] : 0.f;
  }

  template <typename Pointer>
  __device__ __forceinline__ Pointer* channel_rows(Pointer* data, const ScanStrides& stride, int first) const {
    return data + interval.batch * stride.batch + interval.token(first) * stride.token + block.first * stride.channel;
  }

  __device__ __forceinline__ int num_rows(int first) const { return min(interval.num_tokens - first, kTileTokens); }

  __device__ __forceinline__ void load_channels(const void* data, const ScanStrides& stride, int first,
                                                float* smem_tile) const {
    load_tile<T, CHANNELS>(channel_rows(static_cast<const T*>(data), stride, first), interval.token_step * stride.token,
                           stride.channel, num_rows(first), block.num_channels, smem_tile, LD);
  }
  __device__ __forceinline__ void store_channels(const float* smem_tile, int first, void* data,
                                                 const ScanStrides& stride) const {
    store_tile<T, CHANNELS>(smem_tile, LD, num_rows(first), block.num_channels,
                            channel_rows(static_cast<T*>(data), stride, first), interval.token_step * stride.token,
                            stride.channel);
  }
  __device__ __forceinline__ void load_map(const void* data, const ScanGroupStrides& stride, int first,
                                           float* smem_tile) const {
    const T* src = static_cast<const T*>(data) + interval.batch * stride.batch + interval.token(first) * stride.token +
                   block.group * stride.group;
    load_tile<T, STATES>(src, interval.token_step * stride.token, stride.state, num_rows(first),
                         static_cast<int>(in.shape.state_dim), smem_tile, Traits::LD_STATES);
  }

  /// The step of each token of a tile, from its logits in `smem_delta`, which get their bias; zero beyond num_rows.
  __device__ __forceinline__ void make_steps(int first, float* smem_delta, float* smem_dt) const {
    for (int i = threadIdx.x; i < kTileTokens * CHANNELS; i += kScanThreads) {
      const int row = i / CHANNELS, col = i % CHANNELS;
      const float bias = in.delta_bias != nullptr && col < block.num_channels
                             ? static_cast<const float*>(in.delta_bias)[block.first + col]
                             : 0.f;
      const float x = smem_delta[row * LD + col] + bias;
      smem_delta[row * LD + col] = x;
      smem_dt[row * LD + col] = row < num_rows(first) ? (in.delta_softplus ? scan_softplus(x) : x) : 0.f;
    }
  }
};

}  // namespace remora
