// Sizes, strides and sequences of a recurrence, shared by the operators of this family. Legend of shapes:
// docs/numerics.md.
//
// Sequences: without cu_seqlens, row n of the batch is sequence n and num_seqs == batch. With cu_seqlens (batch == 1)
// sequence n is tokens [cu_seqlens[n], cu_seqlens[n + 1]). Kernels clamp an offset to [0, seqlen] and raise it to the
// largest before it, so sequences neither leave the tensor nor overlap, whatever cu_seqlens says. Outputs of tokens
// outside every sequence are zero.
//
// Routed: with rows as well, a sequence is a list of tokens instead of a range. The batch tensors are read and written
// in rows b * T + t of their [B, T]; sequence n is the rows rows[cu_seqlens[n]] ... rows[cu_seqlens[n + 1] - 1], in
// this order, and offsets run to B * T. rows is a permutation of 0 ... B * T - 1: rows[i] for i outside every sequence
// name the rows whose outputs are zero. Kernels clamp rows[i] to [0, B * T); a row named twice has an undefined output.
// A batch stride of zero shares one tensor between the B choices of a token.
#pragma once
#include <cstdint>

namespace remora {

/// Element strides of a [B, T, H, D] tensor whose last dimension is contiguous.
struct TokenStrides {
  int64_t batch, token, head;
};

/// Tokens between two saved states. Sequence n that begins at token b of the flattened [B * T] tokens (n * T without
/// cu_seqlens) owns the slots first_state_slot(b, n) + i for i in [0, ceil(length / kStateInterval)): they hold the
/// state that enters its token i * kStateInterval. Slots of different sequences never meet.
constexpr int64_t kStateInterval = 128;

constexpr int64_t first_state_slot(int64_t first_token, int64_t seq_idx) {
  return first_token / kStateInterval + seq_idx;
}

constexpr int64_t num_state_slots(int64_t total_tokens, int64_t num_seqs) {
  return total_tokens / kStateInterval + num_seqs;
}

struct RecurrenceShape {
  int64_t batch;            // B
  int64_t seqlen;           // T
  int64_t num_heads;        // H
  int64_t num_value_heads;  // HV, a multiple of H; value head h uses key head h / (HV / H)
  int64_t head_dim;         // K
  int64_t value_dim;        // V
  int64_t num_seqs;         // N
};

/// Where a token lies in the batch tensors.
struct TokenRow {
  int64_t row;  // of a [B * T, ...] view
  int64_t batch, token;

  constexpr int64_t offset(const TokenStrides& stride) const { return batch * stride.batch + token * stride.token; }
};

constexpr TokenRow routed_row(const RecurrenceShape& shape, int64_t given) {
  const int64_t last = shape.batch * shape.seqlen - 1;
  const int64_t row = given < 0 ? 0 : given > last ? last : given;
  // rows counts fewer than 2^31 tokens, and a division of 32 bits is the fast one.
  const uint32_t batch = static_cast<uint32_t>(row) / static_cast<uint32_t>(shape.seqlen);
  return {row, batch, row - batch * shape.seqlen};
}

/// The token at a packed position of the call.
constexpr TokenRow row_at(const RecurrenceShape& shape, const int32_t* rows, int64_t position) {
  if (rows) return routed_row(shape, rows[position]);
  return {position, position / shape.seqlen, position % shape.seqlen};
}

/// State that sequence `seq_idx` of a step works on, or -1 if its indices lie outside the pool, which has a multiple of
/// num_memories slots.
constexpr int64_t step_slot(const RecurrenceShape& shape, const int32_t* state_indices, const int32_t* memories,
                            int64_t num_memories, int64_t num_slots, int64_t seq_idx) {
  const int64_t token = memories ? seq_idx % shape.seqlen : seq_idx;
  const int64_t pool = state_indices ? state_indices[token] : token;
  if (!memories) return pool >= 0 && pool < num_slots ? pool : -1;
  const int64_t memory = memories[seq_idx], slot = pool * num_memories + memory;
  return pool >= 0 && slot < num_slots && memory >= 0 && memory < num_memories ? slot : -1;
}

}  // namespace remora
