// Sequences of a call on the CPU: where they lie, what none of them covers, how their tasks are cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "recurrence/shape.h"

namespace remora {

struct RecurrenceSequence {
  int64_t index;   // n
  int64_t batch;   // row of the batch that holds it
  int64_t begin;   // its first token there
  int64_t length;  // tokens

  /// Row of the token in a [B * T, ...] view.
  int64_t row(const RecurrenceShape& shape, int64_t token) const { return batch * shape.seqlen + begin + token; }

  /// First slot of saved_states.
  int64_t first_slot(const RecurrenceShape& shape) const { return row(shape, 0) / kStateInterval + index; }
};

inline RecurrenceSequence sequence_at(const RecurrenceShape& shape, const int32_t* cu_seqlens, int64_t n) {
  if (!cu_seqlens) return {n, n, 0, shape.seqlen};
  const int64_t begin = std::clamp<int64_t>(cu_seqlens[n], 0, shape.seqlen);
  const int64_t end = std::clamp<int64_t>(cu_seqlens[n + 1], begin, shape.seqlen);
  return {n, 0, begin, end - begin};
}

/// Zeroes the rows of a [B * T, row_bytes] output that no sequence covers.
inline void zero_uncovered(void* data, int64_t row_bytes, const RecurrenceShape& shape, const int32_t* cu_seqlens) {
  if (!data || !cu_seqlens) return;
  const auto zero = [&](int64_t begin, int64_t end) {
    if (begin < end) std::memset(static_cast<char*>(data) + begin * row_bytes, 0, (end - begin) * row_bytes);
  };
  int64_t covered = 0;
  for (int64_t n = 0; n < shape.num_seqs; ++n) {
    const RecurrenceSequence sequence = sequence_at(shape, cu_seqlens, n);
    if (sequence.length == 0) continue;
    zero(covered, sequence.begin);
    covered = std::max(covered, sequence.begin + sequence.length);
  }
  zero(covered, shape.seqlen);
}

/// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 18;

inline int64_t tasks_per_thread(const RecurrenceShape& shape, int64_t tasks) {
  const int64_t tokens = shape.batch * shape.seqlen * shape.num_value_heads;
  const int64_t work =
      std::max<int64_t>(1, tokens * shape.head_dim * shape.value_dim * 4 / std::max<int64_t>(1, tasks));
  return std::max<int64_t>(1, kMinWorkPerThread / work);
}

}  // namespace remora
