// Kernels of the causal depthwise convolution.
//
//   x, y [B, T, D]   weight [D, W]   states [N, W - 1, D]
//
// A thread owns four neighbouring channels and walks a block of packed positions, keeping the last W inputs in
// registers: an input is read once, but for the W - 1 in front of a block. It asks for several tokens at a time, or the
// walk would wait for the memory at every token. The backward pass also keeps the gradients
// of the last W sums, since an input's gradient needs those of the W - 1 tokens behind it; it finishes input t when it
// stands at t + WIDTH - 1. WIDTH is 4 or 8; a narrower filter leaves the oldest taps out.
//
// Memory bound: forward 2 * sizeof(T) bytes an element, backward 3 * sizeof(T). Figures: README.md.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/vector.cuh"
#include "recurrence/causal_conv1d/params.h"
#include "recurrence/sequence.cuh"

namespace remora {

constexpr int kConvThreads = 128;
constexpr int kConvVector = 4;
constexpr int kConvBlockChannels = kConvThreads * kConvVector;
constexpr int kConvFwdTokens = 32;  // of a block
constexpr int kConvBwdTokens = 64;  // more: each block leaves a share of dweight
constexpr int kConvReduceChannels = 32;
constexpr int kConvReduceParts = 8;

/// Packed positions [begin, end) of a sequence.
struct PackedRange {
  int64_t begin, end;
};

/// Asked by whole warps.
__device__ __forceinline__ PackedRange packed_range(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                    int64_t seq_idx) {
  const Sequence seq = find_sequence(shape, cu_seqlens, seq_idx);
  return {seq.first_token, seq.first_token + seq.num_tokens};
}

/// Of sequence `seq_idx`, from that of the one before it.
__device__ __forceinline__ PackedRange next_range(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                  int64_t seq_idx, const PackedRange& before) {
  if (cu_seqlens == nullptr) return {before.end, before.end + shape.seqlen};
  return {before.end, max(before.end, min(int64_t{cu_seqlens[seq_idx + 1]}, shape.batch * shape.seqlen))};
}

/// The last sequence that begins at or before the position. Asked by whole warps.
__device__ __forceinline__ int64_t sequence_of(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                               int64_t position) {
  if (cu_seqlens == nullptr) return position / shape.seqlen;
  return find_owner(shape, cu_seqlens, position, [](const Sequence& seq, int64_t) { return seq.first_token; });
}

/// The token at a packed position of sequence `seq_idx`.
__device__ __forceinline__ TokenRow row_of(const RecurrenceShape& shape, const int32_t* cu_seqlens, const int32_t* rows,
                                           int64_t seq_idx, const PackedRange& range, int64_t position) {
  if (rows != nullptr) return routed_row(shape, rows[position]);
  if (cu_seqlens != nullptr) return {position, 0, position};
  return {position, seq_idx, position - range.begin};
}

/// Four channels of a row, `num_valid` of them in the tensor.
struct ConvVector {
  float v[kConvVector];
};

template <typename T>
__device__ __forceinline__ ConvVector floats_of(const FourElements<T>& x) {
  ConvVector out;
  x.to_floats(out.v);
  return out;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// What a thread keeps: its taps, newest last at WIDTH - 1, and as many inputs.
template <typename T, int WIDTH>
struct ConvThread {
  ConvVector weight[WIDTH], bias, input[WIDTH];
  bool has_input[WIDTH];
  int64_t channel;
  int num_valid;  // of the thread's channels
  int width;
  bool is_aligned;

  template <typename Params>
  __device__ __forceinline__ void load_filter(const Params& p, int64_t first_channel, bool aligned) {
    channel = first_channel;
    num_valid = static_cast<int>(min(max(p.shape.num_channels - channel, int64_t{0}), int64_t{kConvVector}));
    width = p.shape.width;
    is_aligned = aligned;
#pragma unroll
    for (int i = 0; i < kConvVector; ++i) {
      const bool valid = i < num_valid;
      bias.v[i] = valid && p.bias != nullptr ? static_cast<const float*>(p.bias)[channel + i] : 0.f;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const int tap = j - (WIDTH - width);
        weight[j].v[i] = valid && tap >= 0 ? static_cast<const float*>(p.weight)[(channel + i) * width + tap] : 0.f;
      }
    }
  }

  template <typename Params>
  __device__ __forceinline__ FourElements<T> load_input(const Params& p, const TokenRow& at) const {
    const T* src = static_cast<const T*>(p.x) + at.batch * p.x_stride.batch + at.token * p.x_stride.token + channel;
    return load_4(src, num_valid, is_aligned);
  }

  /// The W - 1 inputs in front of `position`; those before the sequence come from its initial state, if it has one.
  template <typename Params>
  __device__ __forceinline__ void load_window(const Params& p, int64_t seq_idx, int64_t begin, int64_t position) {
#pragma unroll
    for (int j = 1; j < WIDTH; ++j) {
      const int64_t source = position - WIDTH + j;
      const int64_t state_row = source - begin + width - 1;
      has_input[j] = false;
      input[j] = {};
      if (j <= WIDTH - width) continue;
      if (source >= begin) {
        input[j] = floats_of(load_input(p, row_at(p.shape.sequences, p.rows, source)));
        has_input[j] = true;
      } else if (p.initial_state != nullptr) {
        input[j] = floats_of(load_4(static_cast<const T*>(p.initial_state) +
                                        (seq_idx * (width - 1) + state_row) * p.shape.num_channels + channel,
                                    num_valid, is_aligned));
        has_input[j] = true;
      }
    }
  }

  __device__ __forceinline__ void push(const ConvVector& x) {
#pragma unroll
    for (int j = 0; j + 1 < WIDTH; ++j) input[j] = input[j + 1], has_input[j] = has_input[j + 1] && j >= WIDTH - width;
    input[WIDTH - 1] = x, has_input[WIDTH - 1] = true;
  }

  __device__ __forceinline__ ConvVector convolve() const {
    ConvVector sum = bias;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      if (!has_input[j]) continue;
#pragma unroll
      for (int i = 0; i < kConvVector; ++i) sum.v[i] = fmaf(input[j].v[i], weight[j].v[i], sum.v[i]);
    }
    return sum;
  }

  __device__ __forceinline__ ConvVector activate(ConvVector sum, bool use_silu) const {
    if (use_silu) {
#pragma unroll
      for (int i = 0; i < kConvVector; ++i) sum.v[i] *= sigmoid(sum.v[i]);
    }
    return sum;
  }
};

/// Grid: blocks of channels on x fastest, then blocks of tokens.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kConvThreads, WIDTH <= 4 ? 3 : 2)
    causal_conv1d_fwd_kernel(const __grid_constant__ CausalConv1dFwdParams p, int64_t num_channel_blocks,
                             bool is_aligned) {
  constexpr int kBatch = 8;  // tokens asked for at a time
  const RecurrenceShape& sequences = p.shape.sequences;
  const int64_t block = blockIdx.x;
  const int64_t first = block / num_channel_blocks * kConvFwdTokens;
  const int64_t last = min(first + kConvFwdTokens, sequences.batch * sequences.seqlen);
  ConvThread<T, WIDTH> thread;
  thread.load_filter(p, (block % num_channel_blocks * kConvThreads + threadIdx.x) * kConvVector, is_aligned);
  int64_t seq_idx = sequence_of(sequences, p.cu_seqlens, first);
  PackedRange range = packed_range(sequences, p.cu_seqlens, seq_idx);
  if (thread.num_valid == 0) return;

  const auto y_at = [&](int64_t row) { return static_cast<T*>(p.y) + row * p.shape.num_channels + thread.channel; };

  for (int64_t begin = first; begin < last;) {
    while (begin >= range.end && seq_idx + 1 < sequences.num_seqs) {
      range = next_range(sequences, p.cu_seqlens, ++seq_idx, range);
    }
    if (begin < range.begin || begin >= range.end) {
      store_4(y_at(row_at(sequences, p.rows, begin++).row), ConvVector{}.v, thread.num_valid, is_aligned);
      continue;
    }
    // The block's part of one sequence
    const int64_t end = min(last, range.end);
    thread.load_window(p, seq_idx, range.begin, begin);
    for (int64_t position = begin; position < end; position += kBatch) {
      int64_t row[kBatch];
      FourElements<T> x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (position + i >= end) continue;
        const TokenRow at = row_of(sequences, p.cu_seqlens, p.rows, seq_idx, range, position + i);
        row[i] = at.row;
        x[i] = thread.load_input(p, at);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (position + i >= end) continue;
        thread.push(floats_of(x[i]));
        store_4(y_at(row[i]), thread.activate(thread.convolve(), p.use_silu).v, thread.num_valid, is_aligned);
      }
    }
    begin = end;
  }
}

/// The last W - 1 inputs of each sequence. Grid: (sequence, block of channels).
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_final_state_kernel(const __grid_constant__ CausalConv1dFwdParams p, int64_t num_channel_blocks,
                                     bool is_aligned) {
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const int64_t channel = (blockIdx.x % num_channel_blocks * kConvThreads + threadIdx.x) * kConvVector;
  const PackedRange range = packed_range(p.shape.sequences, p.cu_seqlens, seq_idx);
  ConvThread<T, kConvMaxWidth> thread;
  thread.channel = channel, thread.width = p.shape.width, thread.is_aligned = is_aligned;
  thread.num_valid = static_cast<int>(min(max(p.shape.num_channels - channel, int64_t{0}), int64_t{kConvVector}));
  if (thread.num_valid == 0) return;
  thread.load_window(p, seq_idx, range.begin, range.end);
#pragma unroll
  for (int j = 1; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - tail);
    if (row < 0) continue;
    store_4(static_cast<T*>(p.final_state) + (seq_idx * tail + row) * p.shape.num_channels + channel, thread.input[j].v,
            thread.num_valid, is_aligned);
  }
}

/// Of the sum, from that of the output; the thread holds the sum's inputs.
template <typename T, int WIDTH>
__device__ __forceinline__ ConvVector sum_gradient(ConvVector gradient, const ConvThread<T, WIDTH>& thread,
                                                   bool use_silu) {
  if (use_silu) {
    const ConvVector x = thread.convolve();
#pragma unroll
    for (int i = 0; i < kConvVector; ++i) {
      const float s = sigmoid(x.v[i]);
      gradient.v[i] *= s * (1.f + x.v[i] * (1.f - s));
    }
  }
  return gradient;
}

/// Grid as the forward kernel. Leaves each block's share of dweight [W, D] and dbias [D] in the workspace.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kConvThreads, WIDTH <= 4 ? 3 : 2)
    causal_conv1d_bwd_kernel(const __grid_constant__ CausalConv1dBwdParams p, int64_t num_channel_blocks,
                             bool is_aligned) {
  constexpr int kBatch = WIDTH <= 4 ? 4 : 2;  // tokens asked for at a time
  const RecurrenceShape& sequences = p.shape.sequences;
  const int tail = p.shape.width - 1;
  const int64_t token_block = blockIdx.x / num_channel_blocks;
  const int64_t first = token_block * kConvBwdTokens;
  const int64_t last = min(first + kConvBwdTokens, sequences.batch * sequences.seqlen);
  ConvThread<T, WIDTH> thread;
  thread.load_filter(p, (blockIdx.x % num_channel_blocks * kConvThreads + threadIdx.x) * kConvVector, is_aligned);
  int64_t seq_idx = sequence_of(sequences, p.cu_seqlens, first);
  PackedRange range = packed_range(sequences, p.cu_seqlens, seq_idx);
  if (thread.num_valid == 0) return;
  ConvVector dweight[WIDTH] = {}, dbias = {};
  const auto dx_at = [&](int64_t position) {
    return static_cast<T*>(p.dx) + row_at(sequences, p.rows, position).row * p.shape.num_channels + thread.channel;
  };
  const auto d_y_at = [&](int64_t row) {
    return static_cast<const T*>(p.d_y) + row * p.shape.num_channels + thread.channel;
  };

  for (int64_t begin = first; begin < last;) {
    while (begin >= range.end && seq_idx + 1 < sequences.num_seqs) {
      range = next_range(sequences, p.cu_seqlens, ++seq_idx, range);
    }
    if (begin < range.begin || begin >= range.end) {
      store_4(dx_at(begin++), ConvVector{}.v, thread.num_valid, is_aligned);
      continue;
    }
    // The block's part of one sequence; the tokens behind it that still see its inputs come along.
    const int64_t end = min(last, range.end);
    // Tokens from `begin` on: of the block, and of the sequence as far as matters here
    const auto num_tokens = static_cast<int>(end - begin);
    const auto num_left = static_cast<int>(min(range.end - begin, int64_t{num_tokens + WIDTH}));
    ConvVector gradient[WIDTH] = {};  // of the sums at token - WIDTH + 1 ... token
    thread.load_window(p, seq_idx, range.begin, begin);
    const auto visit = [&](int token, const FourElements<T>& x, const FourElements<T>& d_y) {
#pragma unroll
      for (int j = 0; j + 1 < WIDTH; ++j) gradient[j] = gradient[j + 1];
      gradient[WIDTH - 1] = {};
      if (token < num_left) {
        thread.push(floats_of(x));
        gradient[WIDTH - 1] = sum_gradient(floats_of(d_y), thread, p.use_silu);
      }
      if (token < num_tokens) {
#pragma unroll
        for (int i = 0; i < kConvVector; ++i) dbias.v[i] += gradient[WIDTH - 1].v[i];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          if (!thread.has_input[j]) continue;
#pragma unroll
          for (int i = 0; i < kConvVector; ++i) {
            dweight[j].v[i] = fmaf(gradient[WIDTH - 1].v[i], thread.input[j].v[i], dweight[j].v[i]);
          }
        }
      }
      const int done = token - (WIDTH - 1);
      if (done < 0) return;
      ConvVector dx = {};
      if (const int kept = done - (num_left - tail); p.d_final_state != nullptr && kept >= 0) {
        dx = floats_of(load_4(
            static_cast<const T*>(p.d_final_state) + (seq_idx * tail + kept) * p.shape.num_channels + thread.channel,
            thread.num_valid, is_aligned));
      }
      // Tap WIDTH - 1 - j reached input `done` from the token j behind it.
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        if (j > tail || done + j >= num_left) continue;
#pragma unroll
        for (int i = 0; i < kConvVector; ++i) {
          dx.v[i] = fmaf(gradient[j].v[i], thread.weight[WIDTH - 1 - j].v[i], dx.v[i]);
        }
      }
      store_4(dx_at(begin + done), dx.v, thread.num_valid, is_aligned);
    };
    for (int token = 0; token < num_tokens + WIDTH - 1; token += kBatch) {
      FourElements<T> x[kBatch], d_y[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= min(num_tokens + WIDTH - 1, num_left)) continue;
        const TokenRow at = row_of(sequences, p.cu_seqlens, p.rows, seq_idx, range, begin + token + i);
        x[i] = thread.load_input(p, at);
        d_y[i] = load_4(d_y_at(at.row), thread.num_valid, is_aligned);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token + i < num_tokens + WIDTH - 1) visit(token + i, x[i], d_y[i]);
      }
    }
    begin = end;
  }
  float* partial = static_cast<float*>(p.workspace) + token_block * (p.shape.width + 1) * p.shape.num_channels;
#pragma unroll
  for (int i = 0; i < kConvVector; ++i) {
    if (i >= thread.num_valid) continue;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const int tap = j - (WIDTH - p.shape.width);
      if (tap >= 0) partial[tap * p.shape.num_channels + thread.channel + i] = dweight[j].v[i];
    }
    partial[p.shape.width * p.shape.num_channels + thread.channel + i] = dbias.v[i];
  }
}

/// Sums the shares in a fixed order. Grid: (tap or bias, block of kConvReduceChannels channels).
__global__ void __launch_bounds__(kConvReduceChannels* kConvReduceParts)
    causal_conv1d_reduce_kernel(const __grid_constant__ CausalConv1dBwdParams p, int64_t num_token_blocks) {
  __shared__ float smem_sums[kConvReduceParts][kConvReduceChannels];
  const int width = p.shape.width, lane = threadIdx.x % kConvReduceChannels, part = threadIdx.x / kConvReduceChannels;
  const int tap = static_cast<int>(blockIdx.x % (width + 1));
  const int64_t channel = blockIdx.x / (width + 1) * int64_t{kConvReduceChannels} + lane;
  float sum = 0.f;
  if (channel < p.shape.num_channels) {
    for (int64_t block = part; block < num_token_blocks; block += kConvReduceParts) {
      sum += static_cast<const float*>(p.workspace)[(block * (width + 1) + tap) * p.shape.num_channels + channel];
    }
  }
  smem_sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || channel >= p.shape.num_channels) return;
  for (int i = 1; i < kConvReduceParts; ++i) sum += smem_sums[i][lane];
  if (tap < width) static_cast<float*>(p.dweight)[channel * width + tap] = sum;
  if (tap == width && p.dbias != nullptr) static_cast<float*>(p.dbias)[channel] = sum;
}

/// Gradient of the initial states. Grid: (sequence, block of channels).
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_bwd_state_kernel(const __grid_constant__ CausalConv1dBwdParams p, int64_t num_channel_blocks,
                                   bool is_aligned) {
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const PackedRange range = packed_range(p.shape.sequences, p.cu_seqlens, seq_idx);
  const int64_t length = range.end - range.begin;
  ConvThread<T, kConvMaxWidth> thread;
  thread.load_filter(p, (blockIdx.x % num_channel_blocks * kConvThreads + threadIdx.x) * kConvVector, is_aligned);
  if (thread.num_valid == 0) return;
  thread.load_window(p, seq_idx, range.begin, range.begin);
  ConvVector gradient[kConvMaxWidth - 1] = {};  // of the first sums
#pragma unroll
  for (int t = 0; t < kConvMaxWidth - 1; ++t) {
    if (t >= tail || t >= length) continue;
    const TokenRow at = row_of(p.shape.sequences, p.cu_seqlens, p.rows, seq_idx, range, range.begin + t);
    thread.push(floats_of(thread.load_input(p, at)));
    const T* d_y = static_cast<const T*>(p.d_y) + at.row * p.shape.num_channels + thread.channel;
    gradient[t] = sum_gradient(floats_of(load_4(d_y, thread.num_valid, is_aligned)), thread, p.use_silu);
  }
#pragma unroll
  for (int j = 1; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - tail);  // seen by token t through the tap of row row - t
    if (row < 0) continue;
    ConvVector d_state = {};
    if (p.d_final_state != nullptr && row >= length) {
      d_state = floats_of(load_4(static_cast<const T*>(p.d_final_state) +
                                     (seq_idx * tail + row - length) * p.shape.num_channels + thread.channel,
                                 thread.num_valid, is_aligned));
    }
#pragma unroll
    for (int t = 0; t < j; ++t) {
      if (t > row || t >= length) continue;
#pragma unroll
      for (int i = 0; i < kConvVector; ++i) {
        d_state.v[i] = fmaf(gradient[t].v[i], thread.weight[j - 1 - t].v[i], d_state.v[i]);
      }
    }
    store_4(static_cast<T*>(p.d_initial_state) + (seq_idx * tail + row) * p.shape.num_channels + thread.channel,
            d_state.v, thread.num_valid, is_aligned);
  }
}

/// One token of each sequence, states in place. Grid: (sequence, block of channels).
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_step_kernel(const __grid_constant__ CausalConv1dStepParams p, int64_t num_channel_blocks,
                              bool is_aligned) {
  const RecurrenceShape& sequences = p.shape.sequences;
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const int64_t slot = step_slot(sequences, p.state_indices, p.memories, p.num_memories, p.num_slots, seq_idx);
  ConvThread<T, kConvMaxWidth> thread;
  thread.load_filter(p, (blockIdx.x % num_channel_blocks * kConvThreads + threadIdx.x) * kConvVector, is_aligned);
  if (thread.num_valid == 0) return;
  T* y = static_cast<T*>(p.y) + seq_idx * p.shape.num_channels + thread.channel;
  if (slot < 0) {
    store_4(y, ConvVector{}.v, thread.num_valid, is_aligned);
    return;
  }
  T* state = static_cast<T*>(p.state) + slot * tail * p.shape.num_channels + thread.channel;
  const T* x = static_cast<const T*>(p.x) + seq_idx / sequences.seqlen * p.x_stride.batch +
               seq_idx % sequences.seqlen * p.x_stride.token + thread.channel;
#pragma unroll
  for (int j = 0; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - 1 - tail);
    thread.has_input[j] = row >= 0;
    thread.input[j] = {};
    if (row < 0) continue;
    thread.input[j] =
        floats_of(load_4(row < tail ? state + row * p.shape.num_channels : x, thread.num_valid, is_aligned));
    if (row > 0) store_4(state + (row - 1) * p.shape.num_channels, thread.input[j].v, thread.num_valid, is_aligned);
  }
  store_4(y, thread.activate(thread.convolve(), p.use_silu).v, thread.num_valid, is_aligned);
}

}  // namespace remora
