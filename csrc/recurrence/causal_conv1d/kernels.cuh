// Kernels of the causal depthwise convolution.
//
//   x, y [B, T, D]   weight [D, W]   states [N, W - 1, D]
//
// A thread owns VECTOR neighbouring channels (4, or 1 if rows are not aligned to four) and walks a block of packed
// positions, keeping the last W inputs in registers: an input is read once, but for the W - 1 in front of a block. It
// asks for several tokens at a time, or the walk would wait for the memory at every token; where they lie is worked out
// once for the block. The backward pass also keeps the gradients of the last W sums, since an input's gradient needs
// those of the W - 1 tokens behind it; it finishes input t when it stands at t + WIDTH - 1. WIDTH is 4 or 8; a narrower
// filter leaves the oldest taps out.
//
// Memory bound: forward 2 * sizeof(T) bytes an element, backward 3 * sizeof(T). Figures: README.md.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/math.cuh"
#include "common/vector.cuh"
#include "recurrence/causal_conv1d/params.h"
#include "recurrence/sequence.cuh"

namespace remora {

constexpr int kConvThreads = 128;
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

/// Element offset in x of a packed position.
template <typename Params>
__device__ __forceinline__ int64_t x_offset(const Params& p, int64_t position) {
  const TokenRow at = row_at(p.shape.sequences, p.rows, position);
  return at.batch * p.x_stride.batch + at.token * p.x_stride.token;
}

/// Element offsets of the tokens of a block of kTokens and of those around it that its windows reach.
template <int kTokens, int kBefore, int kBehind>
struct BlockTokens {
  static constexpr int kNum = kBefore + kTokens + kBehind;
  int64_t x[kNum];    // in x
  int64_t row[kNum];  // in contiguous tensors

  /// By the whole CTA.
  template <typename Params>
  __device__ __forceinline__ void find(const Params& p, int64_t first) {
    for (int i = threadIdx.x; i < kNum; i += kConvThreads) {
      const int64_t position = first - kBefore + i;
      if (position < 0 || position >= p.shape.sequences.batch * p.shape.sequences.seqlen) continue;
      x[i] = remora::x_offset(p, position);
      row[i] = row_at(p.shape.sequences, p.rows, position).row * p.shape.num_channels;
    }
    __syncthreads();
  }
  __device__ __forceinline__ int64_t x_offset(int token) const { return x[kBefore + token]; }
  __device__ __forceinline__ int64_t offset(int token) const { return row[kBefore + token]; }
};

/// The channels of a thread.
template <int VECTOR>
struct ConvVector {
  float v[VECTOR];
};

/// As in memory: turning them into floats waits for them.
template <typename T, int VECTOR>
using ConvElements = std::conditional_t<VECTOR == 4, FourElements<T>, T>;

/// What a thread keeps: its taps, newest last at WIDTH - 1, and as many inputs: zeros where there are none.
template <typename T, int WIDTH, int VECTOR>
struct ConvThread {
  using Vector = ConvVector<VECTOR>;
  using Elements = ConvElements<T, VECTOR>;

  Vector weight[WIDTH], bias, input[WIDTH];
  int64_t channel;
  int width;

  /// Whether the tensor has the thread's channels.
  template <typename Params>
  __device__ __forceinline__ bool load_filter(const Params& p, int64_t channel_block) {
    channel = (channel_block * kConvThreads + threadIdx.x) * VECTOR;
    width = p.shape.width;
    if (channel >= p.shape.num_channels) return false;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      bias.v[i] = p.bias != nullptr ? static_cast<const float*>(p.bias)[channel + i] : 0.f;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const int tap = j - (WIDTH - width);
        weight[j].v[i] = tap >= 0 ? static_cast<const float*>(p.weight)[(channel + i) * width + tap] : 0.f;
      }
    }
    return true;
  }

  /// The thread's channels of a row.
  __device__ __forceinline__ Elements load(const void* tensor, int64_t row) const {
    const T* src = static_cast<const T*>(tensor) + row + channel;
    if constexpr (VECTOR == 4) {
      return load_4(src, 4, true);
    } else {
      return *src;
    }
  }
  __device__ __forceinline__ void store(void* tensor, int64_t row, const Vector& value) const {
    T* dst = static_cast<T*>(tensor) + row + channel;
    if constexpr (VECTOR == 4) {
      store_4(dst, value.v, 4, true);
    } else {
      *dst = static_cast<T>(value.v[0]);
    }
  }
  static __device__ __forceinline__ Vector floats_of(const Elements& x) {
    Vector out;
    if constexpr (VECTOR == 4) {
      x.to_floats(out.v);
    } else {
      out.v[0] = static_cast<float>(x);
    }
    return out;
  }

  /// The W - 1 inputs in front of `position`; those before the sequence come from its initial state, if it has one.
  /// x_offset(n): of the input n tokens in front.
  template <typename Params, typename Offset>
  __device__ __forceinline__ void load_window(const Params& p, int64_t seq_idx, int64_t begin, int64_t position,
                                              Offset x_offset) {
    Elements x[WIDTH] = {};
#pragma unroll
    for (int j = 1; j < WIDTH; ++j) {
      const int64_t source = position - WIDTH + j;
      const int64_t state_row = source - begin + width - 1;
      if (j <= WIDTH - width) continue;
      if (source >= begin) {
        x[j] = load(p.x, x_offset(WIDTH - j));
      } else if (p.initial_state != nullptr) {
        x[j] = load(p.initial_state, (seq_idx * (width - 1) + state_row) * p.shape.num_channels);
      }
    }
#pragma unroll
    for (int j = 1; j < WIDTH; ++j) input[j] = floats_of(x[j]);
  }

  __device__ __forceinline__ bool has_tap(int j) const { return j >= WIDTH - width; }

  __device__ __forceinline__ void push(const Elements& x) {
#pragma unroll
    for (int j = 0; j + 1 < WIDTH; ++j) input[j] = input[j + 1];
    input[WIDTH - 1] = floats_of(x);
  }

  __device__ __forceinline__ Vector convolve() const {
    Vector sum = bias;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      if (!has_tap(j)) continue;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum.v[i] = fmaf(input[j].v[i], weight[j].v[i], sum.v[i]);
    }
    return sum;
  }

  __device__ __forceinline__ Vector output(bool use_silu) const {
    Vector sum = convolve();
    if (use_silu) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum.v[i] *= sigmoid(sum.v[i]);
    }
    return sum;
  }

  /// Of the sum, from that of the output; the thread holds the sum's inputs.
  __device__ __forceinline__ Vector sum_gradient(const Elements& d_y, bool use_silu) const {
    Vector gradient = floats_of(d_y);
    if (use_silu) {
      const Vector x = convolve();
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const float s = sigmoid(x.v[i]);
        gradient.v[i] *= s * (1.f + x.v[i] * (1.f - s));
      }
    }
    return gradient;
  }
};

/// Grid: blocks of channels on x fastest, then blocks of tokens.
template <typename T, int WIDTH, int VECTOR>
__global__ void __launch_bounds__(kConvThreads, WIDTH <= 4 ? 4 : 3)
    causal_conv1d_fwd_kernel(const __grid_constant__ CausalConv1dFwdParams p, int64_t num_channel_blocks) {
  constexpr int kBatch = 8;  // tokens asked for at a time
  __shared__ BlockTokens<kConvFwdTokens, WIDTH - 1, 0> tokens;
  const RecurrenceShape& sequences = p.shape.sequences;
  const int64_t block = blockIdx.x;
  const int64_t first = block / num_channel_blocks * kConvFwdTokens;
  const int64_t last = min(first + kConvFwdTokens, sequences.batch * sequences.seqlen);
  ConvThread<T, WIDTH, VECTOR> thread;
  const bool has_channels = thread.load_filter(p, block % num_channel_blocks);
  int64_t seq_idx = sequence_of(sequences, p.cu_seqlens, first);
  PackedRange range = packed_range(sequences, p.cu_seqlens, seq_idx);
  tokens.find(p, first);
  if (!has_channels) return;

  for (int64_t begin = first; begin < last;) {
    while (begin >= range.end && seq_idx + 1 < sequences.num_seqs) {
      range = next_range(sequences, p.cu_seqlens, ++seq_idx, range);
    }
    const auto first_token = static_cast<int>(begin - first);
    if (begin < range.begin || begin >= range.end) {
      thread.store(p.y, tokens.offset(first_token), {});
      ++begin;
      continue;
    }
    // The block's part of one sequence
    const auto end_token = static_cast<int>(min(last, range.end) - first);
    thread.load_window(p, seq_idx, range.begin, begin, [&](int n) { return tokens.x_offset(first_token - n); });
    for (int token = first_token; token < end_token; token += kBatch) {
      typename ConvThread<T, WIDTH, VECTOR>::Elements x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = thread.load(p.x, tokens.x_offset(min(token + i, end_token - 1)));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= end_token) break;
        thread.push(x[i]);
        thread.store(p.y, tokens.offset(token + i), thread.output(p.use_silu));
      }
    }
    begin = first + end_token;
  }
}

/// The last W - 1 inputs of each sequence. Grid: (sequence, block of channels).
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_final_state_kernel(const __grid_constant__ CausalConv1dFwdParams p, int64_t num_channel_blocks) {
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const PackedRange range = packed_range(p.shape.sequences, p.cu_seqlens, seq_idx);
  ConvThread<T, kConvMaxWidth, VECTOR> thread;
  if (!thread.load_filter(p, blockIdx.x % num_channel_blocks)) return;
  thread.load_window(p, seq_idx, range.begin, range.end, [&](int n) { return x_offset(p, range.end - n); });
#pragma unroll
  for (int j = 1; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - tail);
    if (row >= 0) thread.store(p.final_state, (seq_idx * tail + row) * p.shape.num_channels, thread.input[j]);
  }
}

/// Grid as the forward kernel. Leaves each block's share of dweight [W, D] and dbias [D] in the workspace.
template <typename T, int WIDTH, int VECTOR>
__global__ void __launch_bounds__(kConvThreads, WIDTH <= 4 ? 3 : 2)
    causal_conv1d_bwd_kernel(const __grid_constant__ CausalConv1dBwdParams p, int64_t num_channel_blocks) {
  constexpr int kBatch = WIDTH <= 4 && sizeof(T) == 2 ? 8 : 4;  // tokens asked for at a time
  __shared__ BlockTokens<kConvBwdTokens, WIDTH - 1, WIDTH - 1> tokens;
  const RecurrenceShape& sequences = p.shape.sequences;
  const int tail = p.shape.width - 1;
  const int64_t token_block = blockIdx.x / num_channel_blocks;
  const int64_t first = token_block * kConvBwdTokens;
  const int64_t last = min(first + kConvBwdTokens, sequences.batch * sequences.seqlen);
  ConvThread<T, WIDTH, VECTOR> thread;
  const bool has_channels = thread.load_filter(p, blockIdx.x % num_channel_blocks);
  int64_t seq_idx = sequence_of(sequences, p.cu_seqlens, first);
  PackedRange range = packed_range(sequences, p.cu_seqlens, seq_idx);
  tokens.find(p, first);
  if (!has_channels) return;
  using Vector = ConvVector<VECTOR>;
  using Elements = ConvElements<T, VECTOR>;
  Vector dweight[WIDTH] = {}, dbias = {};

  for (int64_t begin = first; begin < last;) {
    while (begin >= range.end && seq_idx + 1 < sequences.num_seqs) {
      range = next_range(sequences, p.cu_seqlens, ++seq_idx, range);
    }
    const auto first_token = static_cast<int>(begin - first);
    if (begin < range.begin || begin >= range.end) {
      thread.store(p.dx, tokens.offset(first_token), {});
      ++begin;
      continue;
    }
    // The block's part of one sequence
    const auto end_token = static_cast<int>(min(last, range.end) - first);
    Vector gradient[WIDTH] = {};  // of the sums at token - WIDTH + 1 ... token
    const auto shift = [&](const Vector& newest) {
#pragma unroll
      for (int j = 0; j + 1 < WIDTH; ++j) gradient[j] = gradient[j + 1];
      gradient[WIDTH - 1] = newest;
    };
    // Tap WIDTH - 1 - j reached input `done` from the token j behind it.
    const auto finish = [&](int done, Vector dx) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        if (j > tail) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) dx.v[i] = fmaf(gradient[j].v[i], thread.weight[WIDTH - 1 - j].v[i], dx.v[i]);
      }
      if (done >= first_token) thread.store(p.dx, tokens.offset(done), dx);
    };
    thread.load_window(p, seq_idx, range.begin, begin, [&](int n) { return tokens.x_offset(first_token - n); });
    for (int token = first_token; token < end_token; token += kBatch) {
      Elements x[kBatch], d_y[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = min(token + i, end_token - 1);
        x[i] = thread.load(p.x, tokens.x_offset(at));
        d_y[i] = thread.load(p.d_y, tokens.offset(at));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (token + i >= end_token) break;
        thread.push(x[i]);
        const Vector newest = thread.sum_gradient(d_y[i], p.use_silu);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) dbias.v[c] += newest.v[c];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          if (!thread.has_tap(j)) continue;
#pragma unroll
          for (int c = 0; c < VECTOR; ++c) dweight[j].v[c] = fmaf(newest.v[c], thread.input[j].v[c], dweight[j].v[c]);
        }
        shift(newest);
        finish(token + i - (WIDTH - 1), {});
      }
    }

    // The tokens behind it that still see its inputs, as far as the sequence has them
    const auto seq_end = static_cast<int>(min(range.end - first, int64_t{end_token + WIDTH}));
    Elements x[WIDTH - 1] = {}, d_y[WIDTH - 1] = {};
#pragma unroll
    for (int i = 0; i < WIDTH - 1; ++i) {
      if (end_token + i >= seq_end) continue;
      x[i] = thread.load(p.x, tokens.x_offset(end_token + i));
      d_y[i] = thread.load(p.d_y, tokens.offset(end_token + i));
    }
#pragma unroll
    for (int i = 0; i < WIDTH - 1; ++i) {
      Vector newest = {}, dx = {};
      if (end_token + i < seq_end) {
        thread.push(x[i]);
        newest = thread.sum_gradient(d_y[i], p.use_silu);
      }
      shift(newest);
      const int done = end_token + i - (WIDTH - 1), kept = done - (seq_end - tail);
      if (p.d_final_state != nullptr && kept >= 0 && done >= first_token) {
        dx = thread.floats_of(thread.load(p.d_final_state, (seq_idx * tail + kept) * p.shape.num_channels));
      }
      finish(done, dx);
    }
    begin = first + end_token;
  }
  float* partial = static_cast<float*>(p.workspace) + token_block * (p.shape.width + 1) * p.shape.num_channels;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
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
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kConvThreads, 1)
    causal_conv1d_bwd_state_kernel(const __grid_constant__ CausalConv1dBwdParams p, int64_t num_channel_blocks) {
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const PackedRange range = packed_range(p.shape.sequences, p.cu_seqlens, seq_idx);
  const int64_t length = range.end - range.begin;
  ConvThread<T, kConvMaxWidth, VECTOR> thread;
  if (!thread.load_filter(p, blockIdx.x % num_channel_blocks)) return;
  thread.load_window(p, seq_idx, range.begin, range.begin, [](int) { return int64_t{0}; });
  ConvVector<VECTOR> gradient[kConvMaxWidth - 1] = {};  // of the first sums
#pragma unroll
  for (int t = 0; t < kConvMaxWidth - 1; ++t) {
    if (t >= tail || t >= length) continue;
    thread.push(thread.load(p.x, x_offset(p, range.begin + t)));
    const int64_t row = row_at(p.shape.sequences, p.rows, range.begin + t).row * p.shape.num_channels;
    gradient[t] = thread.sum_gradient(thread.load(p.d_y, row), p.use_silu);
  }
#pragma unroll
  for (int j = 1; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - tail);  // seen by token t through the tap of row row - t
    if (row < 0) continue;
    ConvVector<VECTOR> d_state = {};
    if (p.d_final_state != nullptr && row >= length) {
      d_state = thread.floats_of(thread.load(p.d_final_state, (seq_idx * tail + row - length) * p.shape.num_channels));
    }
#pragma unroll
    for (int t = 0; t < j; ++t) {
      if (t > row || t >= length) continue;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        d_state.v[i] = fmaf(gradient[t].v[i], thread.weight[j - 1 - t].v[i], d_state.v[i]);
      }
    }
    thread.store(p.d_initial_state, (seq_idx * tail + row) * p.shape.num_channels, d_state);
  }
}

/// One token of each sequence, states in place. Grid: (sequence, block of channels).
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_step_kernel(const __grid_constant__ CausalConv1dStepParams p, int64_t num_channel_blocks) {
  const RecurrenceShape& sequences = p.shape.sequences;
  const int tail = p.shape.width - 1;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const int64_t slot = step_slot(sequences, p.state_indices, p.memories, p.num_memories, p.num_slots, seq_idx);
  ConvThread<T, kConvMaxWidth, VECTOR> thread;
  if (!thread.load_filter(p, blockIdx.x % num_channel_blocks)) return;
  const int64_t y_row = seq_idx * p.shape.num_channels;
  if (slot < 0) {
    thread.store(p.y, y_row, {});
    return;
  }
  const int64_t state_row = slot * tail * p.shape.num_channels;
  const int64_t x_row = seq_idx / sequences.seqlen * p.x_stride.batch + seq_idx % sequences.seqlen * p.x_stride.token;
#pragma unroll
  for (int j = 0; j < kConvMaxWidth; ++j) {
    const int row = j - (kConvMaxWidth - 1 - tail);
    thread.input[j] = {};
    if (row < 0) continue;
    thread.input[j] = thread.floats_of(row < tail ? thread.load(p.state, state_row + row * p.shape.num_channels)
                                                  : thread.load(p.x, x_row));
    if (row > 0) thread.store(p.state, state_row + (row - 1) * p.shape.num_channels, thread.input[j]);
  }
  thread.store(p.y, y_row, thread.output(p.use_silu));
}

}  // namespace remora
