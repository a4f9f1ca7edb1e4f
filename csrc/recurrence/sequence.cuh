// Which sequence and which tokens a CTA works on, from cu_seqlens on the device; row_at (shape.h) says in which rows
// the tokens lie. Whole warps call these functions, with the same arguments in every lane.
#pragma once
#include "common/reduce.cuh"
#include "recurrence/shape.h"

namespace remora {

/// Packed positions [first_token, first_token + num_tokens) of the call's B * T.
struct Sequence {
  int64_t first_token, num_tokens;
};

/// Where sequence `seq_idx` begins (num_seqs: where the last one ends), whatever cu_seqlens says. Without rows,
/// cu_seqlens comes with batch == 1.
__device__ __forceinline__ int64_t find_offset(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                               int64_t seq_idx) {
  int largest = 0;
  for (int64_t i = threadIdx.x % 32; i <= seq_idx; i += 32) largest = max(largest, cu_seqlens[i]);
  return min(int64_t{warp_max(largest)}, shape.batch * shape.seqlen);
}

__device__ __forceinline__ Sequence find_sequence(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                  int64_t seq_idx) {
  if (cu_seqlens == nullptr) return {seq_idx * shape.seqlen, shape.seqlen};
  const int64_t begin = find_offset(shape, cu_seqlens, seq_idx);
  const int64_t end = min(int64_t{cu_seqlens[seq_idx + 1]}, shape.batch * shape.seqlen);
  return {begin, max(end - begin, int64_t{0})};
}

/// Chunks of a sequence own consecutive slots, as saved states do: those of different sequences never meet.
template <int BLOCK_T>
__device__ __forceinline__ int64_t first_chunk_slot(const Sequence& seq, int64_t seq_idx) {
  return seq.first_token / BLOCK_T + seq_idx;
}

struct Chunk {
  int64_t seq_idx;
  int64_t chunk_idx;    // within the sequence
  int64_t first_token;  // packed position
  int num_tokens;       // 0: no chunk owns the slot
};

/// The last sequence whose first slot is at most `slot`, or 0. first_slot(sequence, index) may not fall.
template <typename FirstSlot>
__device__ __forceinline__ int64_t find_owner(const RecurrenceShape& shape, const int32_t* cu_seqlens, int64_t slot,
                                              FirstSlot first_slot) {
  int64_t low = 0, high = shape.num_seqs - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_slot(find_sequence(shape, cu_seqlens, middle), middle) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <int BLOCK_T>
__device__ __forceinline__ Chunk find_chunk(const RecurrenceShape& shape, const int32_t* cu_seqlens, int64_t slot) {
  const int64_t seq_idx = find_owner(shape, cu_seqlens, slot, first_chunk_slot<BLOCK_T>);
  const Sequence seq = find_sequence(shape, cu_seqlens, seq_idx);
  const int64_t chunk_idx = slot - first_chunk_slot<BLOCK_T>(seq, seq_idx);
  const int64_t num_left = chunk_idx < 0 ? 0 : seq.num_tokens - chunk_idx * BLOCK_T;
  return {seq_idx, chunk_idx, seq.first_token + chunk_idx * BLOCK_T,
          static_cast<int>(min(max(num_left, int64_t{0}), int64_t{BLOCK_T}))};
}

/// Element offsets of the tokens of a chunk whose rows are neighbours. next: the address of `token`, from that of the
/// token kStep before it or from that of the chunk.
struct StridedTokens {
  int64_t stride;
  __device__ __forceinline__ int64_t operator()(int token) const { return token * stride; }
  template <int kStep, typename T>
  __device__ __forceinline__ T* next(T* before, T*, int) const {
    return before + kStep * stride;
  }
};

/// Of a chunk whose rows are routed. Lane l keeps the offsets of tokens l, l + 32, ...; a whole warp asks for tokens of
/// one such group at a time.
template <int BLOCK_T>
struct RoutedTokens {
  int64_t offset[BLOCK_T / 32];

  __device__ __forceinline__ int64_t operator()(int token) const {
    static_assert(BLOCK_T <= 64);
    int64_t own = offset[0];
    // Not a choice of the two, of which the compiler makes an index into local memory.
    if constexpr (BLOCK_T == 64) own ^= (offset[0] ^ offset[1]) & -int64_t{token / 32};
    return __shfl_sync(kFullWarp, own, token % 32);
  }
  template <int kStep, typename T>
  __device__ __forceinline__ T* next(T*, T* chunk, int token) const {
    return chunk + (*this)(token);
  }
};

/// Rows of the tokens of a chunk, dealt to the lanes in the same way; 0 behind its last token.
template <int BLOCK_T>
struct ChunkRows {
  int32_t given[BLOCK_T / 32];

  __device__ __forceinline__ void load(const int32_t* rows, int64_t position, int num_tokens) {
#pragma unroll
    for (int i = 0; i < BLOCK_T / 32; ++i) {
      const int token = threadIdx.x % 32 + i * 32;
      given[i] = token < num_tokens ? rows[position + token] : 0;
    }
  }
  /// Row of token 32 group + the lane.
  __device__ __forceinline__ int64_t own_row(const RecurrenceShape& shape, int group) const {
    int32_t row = given[0];
#pragma unroll
    for (int i = 1; i < BLOCK_T / 32; ++i) row = group == i ? given[i] : row;
    return routed_row(shape, row).row;
  }
  __device__ __forceinline__ RoutedTokens<BLOCK_T> offsets(const RecurrenceShape& shape,
                                                           const TokenStrides& stride) const {
    RoutedTokens<BLOCK_T> tokens;
#pragma unroll
    for (int i = 0; i < BLOCK_T / 32; ++i) tokens.offset[i] = routed_row(shape, given[i]).offset(stride);
    return tokens;
  }
};

/// Calls clear(first_token, end_token) once for every range of packed positions that no sequence covers, given the
/// sequence of the caller: CTAs of different sequences clear different ranges.
template <typename Clear>
__device__ __forceinline__ void for_each_uncovered(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                   int64_t seq_idx, Clear clear) {
  if (cu_seqlens == nullptr) return;
  if (seq_idx == 0) clear(int64_t{0}, find_offset(shape, cu_seqlens, 0));
  if (seq_idx == shape.num_seqs - 1) {
    clear(find_offset(shape, cu_seqlens, shape.num_seqs), shape.batch * shape.seqlen);
  }
}

}  // namespace remora
