// Arguments of prefix attention, shared by the CPU and CUDA kernels.
//
// A row is one query head of one token. All rows of a sequence that share a key head lie one after the other: row r is
// token r / G, head r % G of the group, with G = H / Hk.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

constexpr int64_t kMaxHeadDim = 256;

/// Element strides of a [B, T, heads, D] tensor whose last dimension is contiguous.
struct AttentionStrides {
  int64_t batch, token, head;

  constexpr int64_t offset(int64_t b, int64_t t, int64_t h) const { return b * batch + t * token + h * head; }
};

struct AttentionShape {
  int64_t batch;         // B
  int64_t seqlen;        // T
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // Hk, divides H: query head h reads head h / (H / Hk) of the keys
  int64_t head_dim;      // D
  int64_t num_seqs;      // N: B, or the number of sequences in cu_seqlens

  constexpr int64_t group() const { return num_heads / num_kv_heads; }
};

/// Items [begin, begin + length) of batch row `batch`. Of what no sequence covers, is_covered is false.
struct AttentionSpan {
  int64_t batch, begin, length;
  bool is_covered;
};

/// Sequence `seq_idx` of items [0, size): tokens, or rows of keys. With offsets [num_seqs + 1], which must not fall,
/// -1 and num_seqs name what lies before the first and behind the last of them.
constexpr AttentionSpan attention_span(const int32_t* offsets, int64_t num_seqs, int64_t size, int64_t seq_idx) {
  if (!offsets) return {seq_idx, 0, size, true};
  const auto border = [&](int64_t i) {
    const int64_t at = i < 0 ? 0 : i > num_seqs ? size : offsets[i];
    return at < 0 ? int64_t{0} : at > size ? size : at;
  };
  const int64_t begin = border(seq_idx), end = border(seq_idx + 1);
  return {0, begin, end > begin ? end - begin : 0, seq_idx >= 0 && seq_idx < num_seqs};
}

/// Which blocks of `block` rows belong to which sequence, for `group` rows an item: sequence n owns the slots from
/// first_slot(n) on, as many as it has blocks or more; slots of different sequences never meet.
struct AttentionSlots {
  const int32_t* offsets;
  int64_t num_seqs, size, group, block;

  constexpr int64_t per_seq() const { return (size * group + block - 1) / block; }
  /// Slots of all sequences, and of what lies before and behind them.
  constexpr int64_t count() const { return offsets ? size * group / block + num_seqs + 2 : num_seqs * per_seq(); }
  constexpr int64_t first_slot(int64_t seq_idx) const {
    if (!offsets) return seq_idx * per_seq();
    return attention_span(offsets, num_seqs, size, seq_idx).begin * group / block + seq_idx + 1;
  }
  /// The last sequence whose first slot is at most `slot`.
  constexpr int64_t owner(int64_t slot) const {
    if (!offsets) return slot / per_seq();
    int64_t low = -1, high = num_seqs;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      first_slot(middle) <= slot ? low = middle : high = middle - 1;
    }
    return low;
  }
};

struct KeyRange {
  int32_t begin, end;
};

/// A token sees the last `width` of the keys [0, floor((token + shift) / stride)].
struct VisibleRule {
  int32_t stride, shift, width;

  constexpr KeyRange keys(int64_t token, int64_t num_keys) const {
    const int32_t position = static_cast<int32_t>(token) + shift;
    const int32_t end = position < 0 ? 0 : position / stride + 1;
    const int32_t begin = end > width ? end - width : 0, limit = static_cast<int32_t>(num_keys);
    return {begin < limit ? begin : limit, end < limit ? end : limit};
  }
  /// The first token that sees key `key`, and the first behind it that does not.
  constexpr int64_t first_token(int64_t key) const { return key * stride - shift; }
  constexpr int64_t end_token(int64_t key) const { return (key + width) * stride - shift; }
};

/// Keys and values that a softmax runs over: the summaries, or the band of raw tokens.
struct AttentionKeys {
  const void* k;  // [B, L, Hk, D]
  const void* v;  // [B, L, Hk, D]
  AttentionStrides k_stride, v_stride;
  int64_t length;            // L; zero if there are none
  const int32_t* offsets;    // [num_seqs + 1] rows of each sequence, or null
  const int32_t* n_visible;  // [B, T] keys that a token sees, or null: `rule`
  VisibleRule rule;
  const void* bias;  // [B, H, L] state_dtype, added to the scaled scores, or null
  int64_t bias_batch, bias_head;

  constexpr AttentionSpan span(const AttentionShape& shape, int64_t seq_idx) const {
    return attention_span(offsets, shape.num_seqs, length, seq_idx);
  }
  /// What token `token` of a sequence sees of its keys; `row` is its row of the [B * T] tokens.
  constexpr KeyRange visible(const AttentionSpan& keys, int64_t token, int64_t row) const {
    if (!keys.is_covered) return {0, 0};
    if (!n_visible) return rule.keys(token, keys.length);
    const int64_t n = n_visible[row];
    return {0, static_cast<int32_t>(n < 0 ? 0 : n > keys.length ? keys.length : n)};
  }
};

constexpr int kNumKeySources = 2;

/// What every pass reads.
struct PrefixAttentionInputs {
  AttentionShape shape;
  DType dtype;        // of q, k, v, o
  DType state_dtype;  // of lse, bias and sink: float32, or float64 if dtype is
  double scale;

  const void* q;  // [B, T, H, D]
  AttentionStrides q_stride;
  const void* k_self;  // [B, T, Hk, D] or null
  const void* v_self;  // [B, T, Hk, D] or null
  AttentionStrides k_self_stride, v_self_stride;
  const void* sink;                       // [H] or null
  const int32_t* cu_seqlens;              // [num_seqs + 1] or null
  AttentionKeys sources[kNumKeySources];  // summaries, band

  constexpr AttentionSpan tokens(int64_t seq_idx) const {
    return attention_span(cu_seqlens, shape.num_seqs, shape.seqlen, seq_idx);
  }
  /// Blocks of `block` rows of a key head; of keys of a source.
  constexpr AttentionSlots row_slots(int64_t block) const {
    return {cu_seqlens, shape.num_seqs, shape.seqlen, shape.group(), block};
  }
  constexpr AttentionSlots key_slots(int source, int64_t block) const {
    return {sources[source].offsets, shape.num_seqs, sources[source].length, 1, block};
  }
};

struct PrefixAttentionFwdParams {
  PrefixAttentionInputs in;
  void* o;          // [B, T, H, D] contiguous
  void* lse;        // [B, T, H] state_dtype
  void* workspace;  // prefix_attention_fwd_workspace() bytes, uninitialised
};

struct PrefixAttentionBwdParams {
  PrefixAttentionInputs in;
  const void* o;      // [B, T, H, D] contiguous
  const void* lse;    // [B, T, H]
  const void* d_o;    // [B, T, H, D], d_o_stride
  const void* d_lse;  // [B, T, H] or null: zero
  AttentionStrides d_o_stride;

  void* dq;                                       // [B, T, H, D] contiguous
  void *dk[kNumKeySources], *dv[kNumKeySources];  // [B, L, Hk, D] contiguous
  void *dk_self, *dv_self;                        // [B, T, Hk, D] contiguous, or null
  void* dbias;                                    // [B, H, L] contiguous, or null; of the summaries
  void* dsink;                                    // [H] or null
  void* workspace;                                // prefix_attention_bwd_workspace() bytes, uninitialised
};

}  // namespace remora
