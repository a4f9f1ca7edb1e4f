// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "common/cpu/element_types.h"
#include "recurrence/causal_conv1d/cpu_conv.h"

namespace remora::REMORA_CPU_ISA {
namespace {

template <class T>
int64_t fwd_scratch(const CausalConv1dShape& shape) {
  Arena arena(nullptr);
  Filter<T> filter(shape, arena);
  return arena.used();
}

template <class T, class E>
void fwd(const CausalConv1dFwdParams& p, int64_t token_block, int64_t channel_block, void* scratch) {
  const RecurrenceShape& sequences = p.shape.sequences;
  const int64_t num_channels = p.shape.num_channels;
  const int64_t channel = channel_block * kConvBlockChannels;
  const int64_t lanes = std::min(kConvBlockChannels, num_channels - channel);
  const int64_t first = token_block * kConvBlockTokens;
  const int64_t last = std::min(first + kConvBlockTokens, sequences.batch * sequences.seqlen);
  Arena arena(scratch);
  Filter<T> filter(p.shape, arena);
  filter.load(p, channel, lanes);
  SequenceWalk walk(sequences, p.cu_seqlens, p.rows, first);
  for (int64_t position = first; position < last; ++position) {
    E* y = static_cast<E*>(p.y) + row_at(sequences, p.rows, position).row * num_channels + channel;
    if (walk.advance(position)) {
      convolve_row(filter, taps_of<E>(p, walk.index(), walk.begin(), position, channel), lanes, y);
    } else {
      std::memset(y, 0, lanes * sizeof(E));
    }
  }
}

template <class E>
void final_state(const CausalConv1dFwdParams& p, int64_t seq_idx) {
  const int tail = p.shape.width - 1;
  const int64_t num_channels = p.shape.num_channels;
  const RecurrenceSequence sequence = sequence_at(p.shape.sequences, p.cu_seqlens, p.rows, seq_idx);
  const Taps<E> taps = taps_of<E>(p, seq_idx, sequence.begin, sequence.begin + sequence.length, 0);
  for (int i = 0; i < tail; ++i) {
    E* to = static_cast<E*>(p.final_state) + (seq_idx * tail + i) * num_channels;
    if (taps.row[i]) {
      std::memcpy(to, taps.row[i], num_channels * sizeof(E));
    } else {
      std::memset(to, 0, num_channels * sizeof(E));
    }
  }
}

template <class T>
struct BwdScratch {
  Filter<T> filter;
  T* gradients;  // of the sums, [kConvBlockTokens + W - 1, kConvBlockChannels]
  T* weight;     // [W + 1, kConvBlockChannels]

  BwdScratch(const CausalConv1dShape& shape, Arena& arena)
      : filter(shape, arena),
        gradients(arena.take<T>((kConvBlockTokens + shape.width - 1) * kConvBlockChannels)),
        weight(arena.take<T>((shape.width + 1) * kConvBlockChannels)) {}
};

template <class T>
int64_t bwd_scratch(const CausalConv1dShape& shape) {
  Arena arena(nullptr);
  BwdScratch<T> scratch(shape, arena);
  return arena.used();
}

/// Gradient of the sum at one position, [kConvBlockChannels].
template <class T, class E>
void sum_gradient(const CausalConv1dBwdParams& p, const Filter<T>& filter, const Taps<E>& taps, int64_t position,
                  int64_t channel, int64_t lanes, T* out) {
  const E* d_y =
      static_cast<const E*>(p.d_y) + row_at(p.shape.sequences, p.rows, position).row * p.shape.num_channels + channel;
  for (int64_t d = 0; d < lanes; d += kWidth<T>) {
    Vec<T> gradient = load_lanes<T>(d_y, d, lanes);
    if (filter.use_silu) {
      const Vec<T> x = convolve(filter, taps, d, lanes), s = sigmoid<T>(x);
      gradient *= s * (T(1) + x * (T(1) - s));
    }
    store<T>(out + d, gradient);
  }
}

/// sum over j of weight[first_tap - j] * gradients[j], j from 0 to `count` - 1, plus a row of d_final_state.
template <class T, class E>
void input_gradient(const Filter<T>& filter, int first_tap, const T* gradients, int64_t count, const E* d_final,
                    int64_t lanes, E* out) {
  for (int64_t d = 0; d < lanes; d += kWidth<T>) {
    Vec<T> sum = d_final ? load_lanes<T>(d_final, d, lanes) : Vec<T>{};
    for (int64_t j = 0; j < count; ++j) {
      sum += load<T>(gradients + j * kConvBlockChannels + d) *
             load<T>(filter.taps + (first_tap - j) * kConvBlockChannels + d);
    }
    store_lanes<T>(out, d, lanes, sum);
  }
}

template <class T, class E>
void bwd(const CausalConv1dBwdParams& p, int64_t token_block, int64_t channel_block, void* buffer) {
  const RecurrenceShape& sequences = p.shape.sequences;
  const int width = p.shape.width, tail = width - 1;
  const int64_t num_channels = p.shape.num_channels;
  const int64_t channel = channel_block * kConvBlockChannels;
  const int64_t lanes = std::min(kConvBlockChannels, num_channels - channel);
  const int64_t first = token_block * kConvBlockTokens;
  const int64_t last = std::min(first + kConvBlockTokens, sequences.batch * sequences.seqlen);
  Arena arena(buffer);
  BwdScratch<T> scratch(p.shape, arena);
  Filter<T>& filter = scratch.filter;
  filter.load(p, channel, lanes);
  std::fill_n(scratch.weight, (width + 1) * kConvBlockChannels, T(0));

  SequenceWalk walk(sequences, p.cu_seqlens, p.rows, first);
  for (int64_t position = first; position < last;) {
    if (!walk.advance(position)) {
      std::memset(static_cast<E*>(p.dx) + row_at(sequences, p.rows, position).row * num_channels + channel, 0,
                  lanes * sizeof(E));
      ++position;
      continue;
    }
    // The block's part of one sequence, and the tokens behind it that still see its inputs.
    const int64_t begin = position, end = std::min(last, walk.end()), seen = std::min(walk.end(), end + tail);
    for (int64_t t = begin; t < seen; ++t) {
      const Taps<E> taps = taps_of<E>(p, walk.index(), walk.begin(), t, channel);
      T* gradient = scratch.gradients + (t - begin) * kConvBlockChannels;
      sum_gradient(p, filter, taps, t, channel, lanes, gradient);
      if (t >= end) continue;
      for (int64_t d = 0; d < lanes; d += kWidth<T>) {
        const Vec<T> g = load<T>(gradient + d);
        for (int j = 0; j < width; ++j) {
          if (!taps.row[j]) continue;
          T* sum = scratch.weight + j * kConvBlockChannels + d;
          store<T>(sum, load<T>(sum) + g * load_lanes<T>(taps.row[j], d, lanes));
        }
        T* sum = scratch.weight + width * kConvBlockChannels + d;
        store<T>(sum, load<T>(sum) + g);
      }
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t kept = t - (walk.end() - tail);  // row of the final state that keeps this input
      const E* d_final = p.d_final_state && kept >= 0 ? static_cast<const E*>(p.d_final_state) +
                                                            (walk.index() * tail + kept) * num_channels + channel
                                                      : nullptr;
      input_gradient(filter, tail, scratch.gradients + (t - begin) * kConvBlockChannels,
                     std::min<int64_t>(width, walk.end() - t), d_final, lanes,
                     static_cast<E*>(p.dx) + row_at(sequences, p.rows, t).row * num_channels + channel);
    }
    position = end;
  }
  T* partial = static_cast<T*>(p.workspace) + token_block * (width + 1) * num_channels + channel;
  for (int j = 0; j <= width; ++j) {
    std::memcpy(partial + j * num_channels, scratch.weight + j * kConvBlockChannels, lanes * sizeof(T));
  }
}

/// An initial state is seen by the first tokens, and by the final state if the sequence is shorter than the window.
template <class T, class E>
void bwd_state(const CausalConv1dBwdParams& p, int64_t seq_idx, int64_t channel_block, void* buffer) {
  const int tail = p.shape.width - 1;
  const int64_t num_channels = p.shape.num_channels;
  const int64_t channel = channel_block * kConvBlockChannels;
  const int64_t lanes = std::min(kConvBlockChannels, num_channels - channel);
  const RecurrenceSequence sequence = sequence_at(p.shape.sequences, p.cu_seqlens, p.rows, seq_idx);
  const int64_t length = sequence.length, seen = std::min<int64_t>(length, tail);
  Arena arena(buffer);
  BwdScratch<T> scratch(p.shape, arena);
  scratch.filter.load(p, channel, lanes);
  for (int64_t t = 0; t < seen; ++t) {
    const int64_t position = sequence.begin + t;
    sum_gradient(p, scratch.filter, taps_of<E>(p, seq_idx, sequence.begin, position, channel), position, channel, lanes,
                 scratch.gradients + t * kConvBlockChannels);
  }
  for (int row = 0; row < tail; ++row) {
    const E* d_final = p.d_final_state && row >= length ? static_cast<const E*>(p.d_final_state) +
                                                              (seq_idx * tail + row - length) * num_channels + channel
                                                        : nullptr;
    input_gradient(scratch.filter, row, scratch.gradients, std::min<int64_t>(row + 1, length), d_final, lanes,
                   static_cast<E*>(p.d_initial_state) + (seq_idx * tail + row) * num_channels + channel);
  }
}

template <class T>
void reduce(const CausalConv1dBwdParams& p, int64_t channel_block) {
  const int width = p.shape.width;
  const int64_t num_channels = p.shape.num_channels;
  const int64_t num_tokens = p.shape.sequences.batch * p.shape.sequences.seqlen;
  const int64_t num_blocks = (num_tokens + kConvBlockTokens - 1) / kConvBlockTokens;
  const int64_t first = channel_block * kConvBlockChannels;
  const int64_t last = std::min(first + kConvBlockChannels, num_channels);
  for (int j = 0; j <= width; ++j) {
    T sums[kConvBlockChannels] = {};
    for (int64_t block = 0; block < num_blocks; ++block) {
      const T* partial = static_cast<const T*>(p.workspace) + (block * (width + 1) + j) * num_channels;
      for (int64_t d = first; d < last; ++d) sums[d - first] += partial[d];
    }
    for (int64_t d = first; d < last; ++d) {
      if (j < width) static_cast<T*>(p.dweight)[d * width + j] = sums[d - first];
      if (j == width && p.dbias) static_cast<T*>(p.dbias)[d] = sums[d - first];
    }
  }
}

template <class T, class E>
void step(const CausalConv1dStepParams& p, int64_t seq_idx, void* scratch) {
  const int tail = p.shape.width - 1;
  const int64_t num_channels = p.shape.num_channels;
  E* y = static_cast<E*>(p.y) + seq_idx * num_channels;
  const int64_t slot = step_slot(p.shape.sequences, p.state_indices, p.memories, p.num_memories, p.num_slots, seq_idx);
  if (slot < 0) {
    std::memset(y, 0, num_channels * sizeof(E));
    return;
  }
  const E* x = input_row<E>(p, row_at(p.shape.sequences, nullptr, seq_idx), 0);
  E* state = static_cast<E*>(p.state) + slot * tail * num_channels;
  Arena arena(scratch);
  Filter<T> filter(p.shape, arena);
  for (int64_t channel = 0; channel < num_channels; channel += kConvBlockChannels) {
    const int64_t lanes = std::min(kConvBlockChannels, num_channels - channel);
    filter.load(p, channel, lanes);
    Taps<E> taps;
    for (int j = 0; j < tail; ++j) taps.row[j] = state + j * num_channels + channel;
    taps.row[tail] = x + channel;
    convolve_row(filter, taps, lanes, y + channel);
  }
  if (tail == 0) return;
  std::memmove(state, state + num_channels, (tail - 1) * num_channels * sizeof(E));
  std::memcpy(state + (tail - 1) * num_channels, x, num_channels * sizeof(E));
}

template <class T, class E>
constexpr CausalConv1dCpuKernels kKernels = {
    fwd_scratch<T>, fwd<T, E>, final_state<E>, bwd_scratch<T>, bwd<T, E>, bwd_state<T, E>, reduce<T>, step<T, E>,
};

}  // namespace

const CausalConv1dCpuKernels& causal_conv1d_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
