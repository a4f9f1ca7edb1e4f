// One token of the convolution, and where its taps come from.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/cpu/arena.h"
#include "common/cpu/functions.h"
#include "recurrence/causal_conv1d/cpu.h"
#include "recurrence/cpu_sequence.h"

namespace remora::REMORA_CPU_ISA {

/// The taps of a block of channels with the channels contiguous, [W, kConvBlockChannels], and the bias behind them.
template <class T>
struct Filter {
  T* taps;
  int width;
  bool use_silu;

  Filter(const CausalConv1dShape& shape, Arena& arena)
      : taps(arena.take<T>((shape.width + 1) * kConvBlockChannels)), width(shape.width), use_silu(false) {}

  template <class Params>
  void load(const Params& p, int64_t channel, int64_t lanes) {
    use_silu = p.use_silu;
    for (int64_t d = 0; d < kConvBlockChannels; ++d) {
      for (int j = 0; j < width; ++j) {
        taps[j * kConvBlockChannels + d] =
            d < lanes ? static_cast<const T*>(p.weight)[(channel + d) * width + j] : T(0);
      }
      taps[width * kConvBlockChannels + d] = p.bias && d < lanes ? static_cast<const T*>(p.bias)[channel + d] : T(0);
    }
  }
};

/// Row pointers of the W inputs that one token sees, oldest first; null stands for zeros before a sequence.
template <class E>
struct Taps {
  const E* row[kConvMaxWidth];
};

/// Walks packed positions in order and knows the sequence of each.
class SequenceWalk {
 public:
  SequenceWalk(const RecurrenceShape& shape, const int32_t* cu_seqlens, const int32_t* rows, int64_t position)
      : shape_(shape), cu_seqlens_(cu_seqlens), rows_(rows) {
    // The last sequence that begins at or before the position; the empty ones in front of it own nothing.
    int64_t low = 0, high = shape.num_seqs - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (sequence_at(shape, cu_seqlens, rows, middle).begin <= position) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    set(low);
  }

  /// Moves on to `position`; false if no sequence covers it.
  bool advance(int64_t position) {
    while (position >= end() && index() + 1 < shape_.num_seqs) set(index() + 1);
    return position >= begin() && position < end();
  }
  int64_t index() const { return sequence_.index; }
  int64_t begin() const { return sequence_.begin; }
  int64_t end() const { return sequence_.begin + sequence_.length; }

 private:
  void set(int64_t index) { sequence_ = sequence_at(shape_, cu_seqlens_, rows_, index); }

  const RecurrenceShape& shape_;
  const int32_t* cu_seqlens_;
  const int32_t* rows_;
  RecurrenceSequence sequence_;
};

template <class E, class Params>
REMORA_INLINE const E* input_row(const Params& p, const TokenRow& at, int64_t channel) {
  return static_cast<const E*>(p.x) + at.batch * p.x_stride.batch + at.token * p.x_stride.token + channel;
}

template <class E, class Params>
REMORA_INLINE Taps<E> taps_of(const Params& p, int64_t seq_idx, int64_t begin, int64_t position, int64_t channel) {
  const int tail = p.shape.width - 1;
  const int64_t num_channels = p.shape.num_channels;
  Taps<E> taps;
  for (int j = 0; j <= tail; ++j) {
    const int64_t source = position - tail + j;
    if (source >= begin) {
      taps.row[j] = input_row<E>(p, row_at(p.shape.sequences, p.rows, source), channel);
    } else if (p.initial_state) {
      taps.row[j] =
          static_cast<const E*>(p.initial_state) + (seq_idx * tail + source - begin + tail) * num_channels + channel;
    } else {
      taps.row[j] = nullptr;
    }
  }
  return taps;
}

/// bias + sum of taps, at channels d ... of the block.
template <class T, class E>
REMORA_INLINE Vec<T> convolve(const Filter<T>& filter, const Taps<E>& taps, int64_t d, int64_t lanes) {
  Vec<T> sum = load<T>(filter.taps + filter.width * kConvBlockChannels + d);
  for (int j = 0; j < filter.width; ++j) {
    if (!taps.row[j]) continue;
    sum += load_lanes<T>(taps.row[j], d, lanes) * load<T>(filter.taps + j * kConvBlockChannels + d);
  }
  return sum;
}

template <class T, class E>
REMORA_INLINE void convolve_row(const Filter<T>& filter, const Taps<E>& taps, int64_t lanes, E* y) {
  for (int64_t d = 0; d < lanes; d += kWidth<T>) {
    Vec<T> sum = convolve(filter, taps, d, lanes);
    if (filter.use_silu) sum *= sigmoid<T>(sum);
    store_lanes<T>(y, d, lanes, sum);
  }
}

}  // namespace remora::REMORA_CPU_ISA
