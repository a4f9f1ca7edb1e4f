// Where the keys of a query lie when queries and keys are packed sequences. Keys are tokens or summaries of chunks.
#pragma once
#include <cstdint>

namespace remora {

/// Of a tensor [B, T, heads, D].
struct HeadStrides {
  int64_t batch, token, head;  // elements; channels are contiguous

  constexpr int64_t at(int64_t b, int64_t t, int64_t h) const { return b * batch + t * token + h * head; }
};

/// Queries [B, T] and keys [B, S], or N sequences packed in each (B = 1).
struct PackedShape {
  int64_t batch, seqlen, key_seqlen;  // B, T, S
  int64_t num_seqs;                   // N
  const int32_t* cu_seqlens;          // [N + 1] or null: offsets of queries
  const int32_t* cu_seqlens_k;        // [N + 1] of keys; null with cu_seqlens
};

/// A query among the others of its sequence, and the keys of that sequence.
struct PackedQuery {
  int64_t token, num_tokens;    // of the sequence
  int64_t key_begin, num_keys;  // the sequence's part of [0, S); none outside of every sequence
};

constexpr int64_t clamp_to(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/// Offsets that decrease or leave the tensors give some range within them.
constexpr PackedQuery locate_query(const PackedShape& shape, int64_t token) {
  if (shape.cu_seqlens == nullptr) return {token, shape.seqlen, 0, shape.key_seqlen};
  int64_t low = 0, high = shape.num_seqs;  // offsets [0, low) are at most `token`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (shape.cu_seqlens[middle - 1] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low == 0 || shape.cu_seqlens[low] <= token) return {0, 0, 0, 0};
  const int64_t begin = shape.cu_seqlens[low - 1],
                key_begin = clamp_to(shape.cu_seqlens_k[low - 1], 0, shape.key_seqlen);
  const int64_t key_end = clamp_to(shape.cu_seqlens_k[low], key_begin, shape.key_seqlen);
  return {token - begin, shape.cu_seqlens[low] - begin, key_begin, key_end - key_begin};
}

}  // namespace remora
