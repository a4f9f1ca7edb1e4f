// Sizes, strides and sequences of a recurrence, shared by the operators of this family. Legend of shapes:
// docs/numerics.md.
//
// Sequences: without cu_seqlens, row n of the batch is sequence n and num_seqs == batch. With cu_seqlens (batch == 1)
// sequence n is tokens [cu_seqlens[n], cu_seqlens[n + 1]). Kernels clamp both ends to [0, seqlen] and an end below
// its begin to an empty sequence, whatever the tensor says. Outputs of tokens outside every sequence are zero.
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

}  // namespace remora
