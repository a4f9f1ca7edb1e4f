// Which sequence and which tokens a CTA works on, from cu_seqlens on the device.
#pragma once
#include "recurrence/shape.h"

namespace remora {

/// Tokens [first_token, first_token + num_tokens) of the flattened [B * T].
struct Sequence {
  int64_t first_token, num_tokens;
};

/// Sequence `seq_idx`; whatever cu_seqlens says, it lies within the tensor.
__device__ __forceinline__ Sequence find_sequence(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                  int64_t seq_idx) {
  if (cu_seqlens == nullptr) return {seq_idx * shape.seqlen, shape.seqlen};
  const int64_t begin = min(max(int64_t{cu_seqlens[seq_idx]}, int64_t{0}), shape.seqlen);
  const int64_t end = min(max(int64_t{cu_seqlens[seq_idx + 1]}, begin), shape.seqlen);
  return {begin, end - begin};
}

/// Chunks of a sequence own consecutive slots, as saved states do: those of different sequences never meet.
template <int BLOCK_T>
__device__ __forceinline__ int64_t first_chunk_slot(const Sequence& seq, int64_t seq_idx) {
  return seq.first_token / BLOCK_T + seq_idx;
}

struct Chunk {
  int64_t seq_idx;
  int64_t chunk_idx;    // within the sequence
  int64_t first_token;  // of the flattened [B * T]
  int num_tokens;       // 0: no chunk owns the slot
};

template <int BLOCK_T>
__device__ __forceinline__ Chunk find_chunk(const RecurrenceShape& shape, const int32_t* cu_seqlens, int64_t slot) {
  int64_t low = 0, high = shape.num_seqs - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_chunk_slot<BLOCK_T>(find_sequence(shape, cu_seqlens, middle), middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Sequence seq = find_sequence(shape, cu_seqlens, low);
  const int64_t chunk_idx = slot - first_chunk_slot<BLOCK_T>(seq, low);
  const int64_t num_left = chunk_idx < 0 ? 0 : seq.num_tokens - chunk_idx * BLOCK_T;
  return {low, chunk_idx, seq.first_token + chunk_idx * BLOCK_T,
          static_cast<int>(min(max(num_left, int64_t{0}), int64_t{BLOCK_T}))};
}

}  // namespace remora
