// Arguments of segment pooling, shared by the CPU and CUDA kernels, and where windows and sequences lie.
//
// A row of the batch has T tokens of H heads; y has D channels a head, x and gate have C = D, or 2 D if dual. One of
//   plain   window s is tokens [s * stride, s * stride + size)
//   packed  (seq_offsets) the same in every sequence: sequence n is tokens [seq_offsets[n], seq_offsets[n + 1]) and
//   owns
//           the windows window_offsets[n] ... window_offsets[n + 1] - 1 of y; B = 1
//   ragged  (segment_starts) window s is tokens [segment_starts[b, s], segment_starts[b, s + 1])
// dual (size == stride): window s also covers the window before it in its sequence, of which it takes the lower half of
// the channels, and of its own tokens the upper half. Its entries are in the order of the tokens.
//
// Offsets are clamped to the tensors, whatever they are; windows without tokens give zero.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

enum class PoolMode : int32_t { kSum, kMean, kLast, kMax, kSoftmax, kWeighted };
constexpr int64_t kNumPoolModes = 6;

constexpr bool has_logits(PoolMode mode) { return mode == PoolMode::kSoftmax || mode == PoolMode::kWeighted; }

/// Periods of `stride` tokens that a task or a thread of the backward pass walks. Gradients of slot_bias are sums over
/// such blocks, then over the blocks in order.
constexpr int64_t kPoolPeriods = 16;

/// Element strides of a [B, T, H, C] tensor whose last dimension is contiguous.
struct PoolStrides {
  int64_t batch, token, head;
};

struct PoolWindow {
  int64_t first, count;  // its own tokens, in the row of the batch
  bool has_previous;     // as many tokens before them belong to it as well
};

/// What the backward pass walks: tokens [begin, begin + length) of a row of the batch.
struct PoolSequence {
  int64_t batch, begin, length;
  int64_t first_window, num_windows;  // rows of y
};

struct PoolShape {
  int64_t batch, seqlen, heads, channels;  // B, T, H, D
  int64_t num_windows;                     // S
  int64_t size, stride;                    // of ragged windows 1, 1
  int64_t num_seqs;                        // N, packed
  bool dual;
  const int32_t* segment_starts;  // [B, S + 1] or null
  const int32_t* segment_ids;     // [B, T], ascending: the segment of a token; outside [0, S): none
  const int32_t* seq_offsets;     // [N + 1] or null, ascending
  const int32_t* window_offsets;  // [N + 1]

  constexpr int64_t input_channels() const { return dual ? 2 * channels : channels; }
  constexpr bool is_ragged() const { return segment_starts != nullptr; }

  static constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

  constexpr PoolWindow window(int64_t b, int64_t s) const {
    if (segment_starts) {
      const int32_t* starts = segment_starts + b * (num_windows + 1) + s;
      const int64_t first = clamp(starts[0], 0, seqlen);
      return {first, clamp(starts[1], first, seqlen) - first, false};
    }
    if (!seq_offsets) return {s * stride, size, dual && s > 0};
    int64_t low = 0, high = num_seqs;  // the sequence that owns s is the last of [low, high) not behind it
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (window_offsets[middle] <= s ? low : high) = middle;
    }
    const int64_t local = s - window_offsets[low];
    const int64_t first = seq_offsets[low] + local * stride;
    const bool exists = local >= 0 && s < window_offsets[low + 1] && first >= 0 && first + size <= seqlen;
    return {exists ? first : 0, exists ? size : 0, exists && dual && local > 0 && first >= size};
  }

  /// Packed, the tokens before the first sequence and behind the last are sequences without windows.
  constexpr int64_t num_sequences() const { return seq_offsets ? num_seqs + 2 : batch; }
  constexpr int64_t sequence_begin(int64_t n) const { return n == 0 ? 0 : clamp(seq_offsets[n - 1], 0, seqlen); }
  constexpr PoolSequence sequence(int64_t n) const {
    if (!seq_offsets) return {n, 0, seqlen, 0, num_windows};
    const int64_t begin = sequence_begin(n), end = n == num_seqs + 1 ? seqlen : clamp(seq_offsets[n], begin, seqlen);
    if (n == 0 || n == num_seqs + 1) return {0, begin, end - begin, 0, 0};
    const int64_t first = clamp(window_offsets[n - 1], 0, num_windows);
    return {0, begin, end - begin, first, clamp(window_offsets[n], first, num_windows) - first};
  }

  /// Blocks of kPoolPeriods periods: a sequence owns consecutive ones, those of different sequences never meet, and
  /// some may have no tokens.
  constexpr int64_t block_tokens() const { return kPoolPeriods * stride; }
  constexpr int64_t blocks_per_row() const { return (seqlen + block_tokens() - 1) / block_tokens(); }
  constexpr int64_t num_blocks() const {
    return seq_offsets ? seqlen / block_tokens() + num_sequences() : batch * blocks_per_row();
  }
  constexpr int64_t first_block(int64_t n) const { return sequence_begin(n) / block_tokens() + n; }
  constexpr int64_t sequence_of_block(int64_t block) const {
    if (!seq_offsets) return block / blocks_per_row();
    int64_t low = 0, high = num_sequences();
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_block(middle) <= block ? low : high) = middle;
    }
    return low;
  }
  constexpr int64_t block_in_sequence(int64_t block, int64_t n) const {
    return seq_offsets ? block - first_block(n) : block % blocks_per_row();
  }
};

struct SegmentPoolFwdParams {
  PoolShape shape;
  DType dtype;  // of x, gate, y; slot_bias and lse are float32, or float64 if dtype is
  PoolMode mode;
  const void* x;          // [B, T, H, C]
  const void* gate;       // [B, T, H, C] or null: zero
  const void* slot_bias;  // [size, H, C] or null: zero
  PoolStrides x_stride, gate_stride;

  void* y;       // [B, S, H, D]
  int32_t* arg;  // [B, S, H, D] or null; of kMax: the token of the largest entry, -1 without one
  void* lse;     // [B, S, H, D] or null; of kSoftmax: log of the sum of exp(logits)
};

struct SegmentPoolBwdParams {
  PoolShape shape;
  DType dtype;
  PoolMode mode;
  const void* x;          // read with logits only
  const void* gate;       // or null
  const void* slot_bias;  // or null
  PoolStrides x_stride, gate_stride;
  const void* y;  // of kSoftmax
  const int32_t* arg;
  const void* lse;
  const void* dy;  // [B, S, H, D]

  void* dx;          // [B, T, H, C]
  void* dgate;       // [B, T, H, C] or null
  void* dslot_bias;  // [size, H, C] or null
  void* workspace;   // segment_pool_bwd_workspace() bytes: dslot_bias of every block [num_blocks, size, H, C]
};

/// Bytes of the workspace.
constexpr int64_t segment_pool_bwd_workspace(const SegmentPoolBwdParams& p) {
  if (!p.dslot_bias) return 0;
  const PoolShape& s = p.shape;
  return s.num_blocks() * s.size * s.heads * s.input_channels() * (p.dtype == DType::kFloat64 ? 8 : 4);
}

}  // namespace remora
