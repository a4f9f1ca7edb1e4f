// Sequences of a call on the CPU: where their tokens lie, what none of them covers, how their tasks are cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "recurrence/shape.h"

namespace remora {

/// The params of a call with its offsets raised to the largest before them, as shape.h says; they stay in `storage`.
template <class Params>
Params with_rising_offsets(Params params, const RecurrenceShape& shape, std::vector<int32_t>& storage) {
  if (!params.cu_seqlens) return params;
  storage.assign(params.cu_seqlens, params.cu_seqlens + shape.num_seqs + 1);
  std::inclusive_scan(storage.begin(), storage.end(), storage.begin(),
                      [](int32_t a, int32_t b) { return std::max(a, b); });
  params.cu_seqlens = storage.data();
  return params;
}

struct RecurrenceSequence {
  int64_t index;        // n
  int64_t begin;        // packed position of its first token
  int64_t length;       // tokens
  TokenRow first;       // its first token, without rows
  const int32_t* rows;  // or null

  constexpr TokenRow at(const RecurrenceShape& shape, int64_t token) const {
    if (!rows) return {first.row + token, first.batch, first.token + token};
    return routed_row(shape, rows[begin + token]);
  }

  /// First slot of saved_states.
  constexpr int64_t first_slot() const { return first_state_slot(begin, index); }
};

/// The rows of one chunk of at most kTokens tokens. Behind its last token stand copies of it: every entry can be read.
template <int kTokens>
struct ChunkRows {
  TokenRow at[kTokens];

  constexpr ChunkRows(const RecurrenceShape& shape, const RecurrenceSequence& sequence, int64_t first, int64_t tokens) {
    for (int64_t i = 0; i < kTokens; ++i) at[i] = i < tokens ? sequence.at(shape, first + i) : at[tokens - 1];
  }
};

inline RecurrenceSequence sequence_at(const RecurrenceShape& shape, const int32_t* cu_seqlens, const int32_t* rows,
                                      int64_t n) {
  if (!cu_seqlens) return {n, n * shape.seqlen, shape.seqlen, {n * shape.seqlen, n, 0}, nullptr};
  const int64_t positions = rows ? shape.batch * shape.seqlen : shape.seqlen;
  const int64_t begin = std::clamp<int64_t>(cu_seqlens[n], 0, positions);
  const int64_t end = std::clamp<int64_t>(cu_seqlens[n + 1], begin, positions);
  return {n, begin, end - begin, {begin, 0, begin}, rows};
}

/// Zeroes the rows of a [B * T, row_bytes] output that no sequence covers.
inline void zero_uncovered(void* data, int64_t row_bytes, const RecurrenceShape& shape, const int32_t* cu_seqlens,
                           const int32_t* rows) {
  if (!data || !cu_seqlens) return;
  const int64_t positions = rows ? shape.batch * shape.seqlen : shape.seqlen;
  const auto zero = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (!rows) {
      std::memset(static_cast<char*>(data) + begin * row_bytes, 0, (end - begin) * row_bytes);
      return;
    }
    const RecurrenceSequence uncovered{0, begin, end - begin, {}, rows};
    for (int64_t i = 0; i < end - begin; ++i) {
      std::memset(static_cast<char*>(data) + uncovered.at(shape, i).row * row_bytes, 0, row_bytes);
    }
  };
  int64_t covered = 0;
  for (int64_t n = 0; n < shape.num_seqs; ++n) {
    const RecurrenceSequence sequence = sequence_at(shape, cu_seqlens, rows, n);
    if (sequence.length == 0) continue;
    zero(covered, sequence.begin);
    covered = std::max(covered, sequence.begin + sequence.length);
  }
  zero(covered, positions);
}

/// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 18;

inline int64_t tasks_per_thread(const RecurrenceShape& shape, int64_t tasks) {
  const int64_t tokens = shape.batch * shape.seqlen * shape.num_value_heads;
  const int64_t work =
      std::max<int64_t>(1, tokens * shape.head_dim * shape.value_dim * 4 / std::max<int64_t>(1, tasks));
  return std::max<int64_t>(1, kMinWorkPerThread / work);
}

inline int64_t hardware_threads() {
  static const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return threads;
}

/// One head of one sequence, or part `part` of `parts` of it.
struct SequenceTask {
  RecurrenceSequence sequence;
  int64_t head, part, parts;
};

/// The tasks of a call, those of the longest sequences first. A head whose tokens are more than one thread's share of
/// the call is cut into up to max_parts, of part_tokens at least.
class SequenceTasks {
 public:
  SequenceTasks(const RecurrenceShape& shape, const int32_t* cu_seqlens, const int32_t* rows, int64_t heads,
                int64_t max_parts, int64_t part_tokens = 1)
      : shape_(shape), cu_seqlens_(cu_seqlens), rows_(rows), order_(shape.num_seqs), first_task_(shape.num_seqs + 1) {
    const auto length = [&](int64_t n) { return sequence_at(shape, cu_seqlens, rows, n).length; };
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (cu_seqlens) {
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    }
    int64_t tokens = 0;
    for (int64_t n = 0; n < shape.num_seqs; ++n) tokens += length(n);
    tokens = std::max<int64_t>(1, tokens * heads);
    for (int64_t i = 0; i < shape.num_seqs; ++i) {
      const int64_t shares = (length(order_[i]) * hardware_threads() + tokens - 1) / tokens;
      const int64_t most = std::clamp<int64_t>(length(order_[i]) / part_tokens, 1, max_parts);
      first_task_[i + 1] = first_task_[i] + heads * std::clamp<int64_t>(shares, 1, most);
    }
    heads_ = heads;
  }

  int64_t count() const { return first_task_.back(); }
  /// Cuts of the sequences, each through all heads.
  int64_t cuts() const { return heads_ == 0 ? 0 : count() / heads_ - std::ssize(order_); }

  /// Of these, the one behind the part of a task; the last part of a head has none.
  int64_t cut_behind(int64_t task) const {
    const int64_t i = sequence_of(task), parts = (first_task_[i + 1] - first_task_[i]) / heads_;
    return first_task_[i] / heads_ - i + (task - first_task_[i]) % parts;
  }

  SequenceTask operator[](int64_t task) const {
    const int64_t i = sequence_of(task);
    const int64_t parts = (first_task_[i + 1] - first_task_[i]) / heads_, local = task - first_task_[i];
    return {sequence_at(shape_, cu_seqlens_, rows_, order_[i]), local / parts, local % parts, parts};
  }

 private:
  int64_t sequence_of(int64_t task) const {
    return std::upper_bound(first_task_.begin(), first_task_.end(), task) - first_task_.begin() - 1;
  }

  const RecurrenceShape& shape_;
  const int32_t *cu_seqlens_, *rows_;
  int64_t heads_;
  std::vector<int64_t> order_, first_task_;
};

}  // namespace remora
