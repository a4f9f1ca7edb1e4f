// Arguments of attention to chosen blocks, shared by the CPU and CUDA kernels.
//
// H query heads read Hk heads of keys; there are Hs lists of blocks (H, Hk or 1). List a serves the query heads
// [a H / Hs, (a + 1) H / Hs), query head h reads keys of head h / (H / Hk). Heads that share list and keys are a unit.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "segment/packed.h"

namespace remora {

constexpr int64_t kMaxGatherBlock = 128;

struct GatherAttentionInputs {
  PackedShape packed;
  int64_t num_heads, num_key_heads, num_lists, dim;
  int64_t num_chosen, block;  // blocks of a list; tokens of a block
  DType dtype;                // of q, k, v, o and their gradients; everything else is float32, or float64 if dtype is
  bool is_causal;             // the last query of a sequence is at its last key
  double scale;
  const void *q, *k, *v;  // [B, T, H, D], [B, S, Hk, D]
  HeadStrides q_stride, k_stride, v_stride;
  const int32_t* idx;  // [B, T, Hs, n]
  const void* weight;  // [B, T, Hs, n] two levels; null: one softmax over all blocks

  constexpr bool is_two_level() const { return weight != nullptr; }
  constexpr int64_t list_heads() const { return num_heads / num_lists; }
  constexpr int64_t group() const { return num_heads / num_key_heads; }
  constexpr int64_t unit_heads() const { return list_heads() < group() ? list_heads() : group(); }
  constexpr int64_t num_units() const { return num_heads / unit_heads(); }
  constexpr int64_t num_lookups() const { return packed.batch * packed.seqlen * num_lists * num_chosen; }
  /// Softmaxes of a query head.
  constexpr int64_t num_softmaxes() const { return is_two_level() ? num_chosen : 1; }
  /// Key heads that a list serves, and lists' rows of a plan: [B, row_heads, num_block_slots].
  constexpr int64_t row_heads() const { return num_lists < num_key_heads ? num_lists : num_key_heads; }
  constexpr int64_t heads_of_row() const { return num_key_heads / row_heads(); }
  /// Sums that the gradient of a weight comes in: of 16 heads of a unit at most.
  constexpr int64_t weight_parts() const { return heads_of_row() * parts_of_unit(); }
  constexpr int64_t parts_of_unit() const { return (unit_heads() + 15) / 16; }
  constexpr int64_t num_block_slots() const {
    return packed.cu_seqlens == nullptr ? (packed.key_seqlen + block - 1) / block
                                        : packed.key_seqlen / block + packed.num_seqs + 1;
  }
};

/// The keys a query may read: of its sequence, the first num_visible from key_begin on.
struct VisibleKeys {
  int64_t key_begin, num_visible;

  /// Keys of a block that are visible: 0 if there is no such block.
  constexpr int64_t count(int64_t block_idx, int64_t block) const {
    return block_idx < 0 ? 0 : clamp_to(num_visible - block_idx * block, 0, block);
  }
};

constexpr VisibleKeys visible_keys(const GatherAttentionInputs& in, int64_t t) {
  const PackedQuery query = locate_query(in.packed, t);
  const int64_t past = query.token + 1 + query.num_keys - query.num_tokens;
  return {query.key_begin, in.is_causal ? clamp_to(past, 0, query.num_keys) : query.num_keys};
}

/// A block of keys by its row of the plan. Sequence n owns the slots from cu_seqlens_k[n] / block + n on.
struct KeyBlock {
  int64_t b, row_head, index, begin, size;  // keys [begin, begin + size) of the batch row; size 0: no block
};

constexpr KeyBlock key_block(const GatherAttentionInputs& in, int64_t row) {
  const int64_t num_slots = in.num_block_slots();
  if (row < 0 || row >= in.packed.batch * in.row_heads() * num_slots) return {};
  const int64_t slot = row % num_slots, row_head = row / num_slots % in.row_heads(),
                b = row / num_slots / in.row_heads();
  int64_t seq_begin = 0, seq_end = in.packed.key_seqlen, index = slot;
  if (in.packed.cu_seqlens != nullptr) {
    int64_t low = 0, high = in.packed.num_seqs - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (in.packed.cu_seqlens_k[middle] / in.block + middle <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    seq_begin = clamp_to(in.packed.cu_seqlens_k[low], 0, seq_end);
    seq_end = clamp_to(in.packed.cu_seqlens_k[low + 1], seq_begin, seq_end);
    index = slot - seq_begin / in.block - low;
  }
  const int64_t begin = seq_begin + index * in.block;
  if (index < 0 || begin >= seq_end) return {};
  return {b, row_head, index, begin, clamp_to(seq_end - begin, 0, in.block)};
}

struct GatherAttentionFwdParams {
  GatherAttentionInputs in;
  void* o;    // [B, T, H, D]
  void* lse;  // [B, T, H], or [B, T, H, n] of two levels
};

struct GatherAttentionBwdParams {
  GatherAttentionInputs in;
  const void* o;    // [B, T, H, D]
  const void* lse;  // as above
  const void* d_o;  // [B, T, H, D]
  HeadStrides d_o_stride;
  const void* d_lse;                     // as lse, or null: zero
  const int32_t *order, *rows, *starts;  // slot_plan of the rows of key_block()
  int64_t max_rows;

  void* dq;       // [B, T, H, D]
  void *dk, *dv;  // [B, S, Hk, D]; zero where no lookup reads
  void* dweight;  // [B, T, Hs, n, weight_parts()] or null
  void* workspace;
};

}  // namespace remora
