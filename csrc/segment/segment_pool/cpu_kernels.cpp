// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
//
// Forward, the entries of a window are taken up to eight at a time: their rows are walked side by side along the
// channels, and what is kept per channel goes through L1 once for them all.
#include <algorithm>
#include <limits>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "segment/segment_pool/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

constexpr int kEntries = 8;  // rows side by side

enum class Kind { kLinear, kMax, kSoftmax, kWeighted };

/// What is kept of a window, per channel.
template <class T>
struct Kept {
  T* sum;      // of values; of kMax the largest
  T* largest;  // logit
  T* weights;  // sum of exp(logit - largest)
  Index<T>* arg;

  explicit Kept(Arena& arena)
      : sum(arena.take<T>(kPoolChannels)),
        largest(arena.take<T>(kPoolChannels)),
        weights(arena.take<T>(kPoolChannels)),
        arg(arena.take<Index<T>>(kPoolChannels)) {}
};

template <class T>
int64_t scratch_bytes() {
  Arena arena(nullptr);
  Kept<T> kept(arena);
  return arena.used();
}

/// Rows of x, gate and slot_bias at channel 0 of the task.
template <class T, class E>
struct Entry {
  const E *x, *gate;
  const T* bias;
  int64_t token;

  REMORA_INLINE Vec<T> logit(int64_t c, int64_t lanes) const {
    Vec<T> l = gate ? load_lanes<T>(gate, c, lanes) : Vec<T>{};
    return bias ? l + load_lanes<T>(bias, c, lanes) : l;
  }
};

/// The entry of a token: `channel` counts those of x within the head.
template <class T, class E, class Params>
Entry<T, E> entry_at(const Params& p, int64_t batch, int64_t token, int64_t slot, int64_t head, int64_t channel) {
  const auto row = [&](const void* data, const PoolStrides& stride) {
    return data ? static_cast<const E*>(data) + batch * stride.batch + token * stride.token + head * stride.head +
                      channel
                : nullptr;
  };
  const T* bias = static_cast<const T*>(p.slot_bias);
  if (bias) bias += (slot * p.shape.heads + head) * p.shape.input_channels() + channel;
  return {row(p.x, p.x_stride), row(p.gate, p.gate_stride), bias, token};
}

/// Adds kCount entries to what is kept; `is_first`: nothing is.
template <class T, class E, Kind KIND, int kCount>
void add_entries(const Entry<T, E>* entries, bool is_first, int64_t channels, const Kept<T>& kept) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (int64_t c = 0; c < channels; c += kWidth<T>) {
    Vec<T> sum{}, largest = broadcast(-kInfinity), weights{};
    Vec<Index<T>> arg = broadcast<Index<T>>(-1);
    int i = 0;
    if (!is_first) {
      sum = load<T>(kept.sum + c);
      if constexpr (KIND == Kind::kMax) arg = load<Index<T>>(kept.arg + c);
      if constexpr (KIND == Kind::kSoftmax) largest = load<T>(kept.largest + c), weights = load<T>(kept.weights + c);
    } else if constexpr (KIND == Kind::kMax) {
      sum = load_lanes<T>(entries[0].x, c, channels);
      arg = broadcast(static_cast<Index<T>>(entries[0].token));
      i = 1;
    } else if constexpr (KIND == Kind::kSoftmax) {
      largest = entries[0].logit(c, channels);
      weights = (largest == -kInfinity) ? Vec<T>{} : (largest - largest) + T(1);  // NaN of infinity and NaN
      sum = weights * load_lanes<T>(entries[0].x, c, channels);
      i = 1;
    }
#pragma GCC unroll 8
    for (; i < kCount; ++i) {
      const Vec<T> x = load_lanes<T>(entries[i].x, c, channels);
      if constexpr (KIND == Kind::kLinear) {
        sum += x;
      } else if constexpr (KIND == Kind::kMax) {
        const auto is_larger = (x > sum) | ((x != x) & (sum == sum));
        sum = is_larger ? x : sum;
        arg = is_larger ? broadcast(static_cast<Index<T>>(entries[i].token)) : arg;
      } else if constexpr (KIND == Kind::kWeighted) {
        sum += entries[i].logit(c, channels) * x;
      } else {
        // One exponential: either the entry or what is kept has the larger logit.
        const Vec<T> logit = entries[i].logit(c, channels);
        const Vec<T> d = (logit == -kInfinity) ? logit : logit - largest;
        const auto is_larger = d > T(0);
        const Vec<T> e = exp_nonpositive(is_larger ? -d : d);
        const Vec<T> weight = is_larger ? broadcast(T(1)) : e, decay = is_larger ? e : broadcast(T(1));
        largest = is_larger ? logit : largest;
        weights = weights * decay + weight;
        sum = sum * decay + weight * x;
      }
    }
    store<T>(kept.sum + c, sum);
    if constexpr (KIND == Kind::kMax) store<Index<T>>(kept.arg + c, arg);
    if constexpr (KIND == Kind::kSoftmax) store<T>(kept.largest + c, largest), store<T>(kept.weights + c, weights);
  }
}

template <class T, class E, Kind KIND>
void fwd(const SegmentPoolFwdParams& p, int64_t batch, int64_t index, PoolChannels of, void* scratch) {
  const PoolShape& shape = p.shape;
  const PoolWindow window = shape.window(batch, index);
  const int64_t to = ((batch * shape.num_windows + index) * shape.heads + of.head) * shape.channels + of.first;
  E* const y = static_cast<E*>(p.y) + to;
  if (window.count == 0) {
    for (int64_t c = 0; c < of.count; ++c) store_one(y + c, T(0));
    for (int64_t c = 0; p.arg && c < of.count; ++c) p.arg[to + c] = -1;
    for (int64_t c = 0; p.lse && c < of.count; ++c) static_cast<T*>(p.lse)[to + c] = 0;
    return;
  }

  Arena arena(scratch);
  const Kept<T> kept(arena);
  const int64_t before = window.has_previous ? window.count : 0, total = before + window.count;
  Entry<T, E> entries[kEntries];
  for (int64_t i = p.mode == PoolMode::kLast ? total - 1 : 0, first = i; i < total;) {
    const int64_t count = total - i >= kEntries ? kEntries : total - i >= 4 ? 4 : 1;
    for (int64_t j = 0; j < count; ++j) {
      const bool is_previous = i + j < before;
      entries[j] = entry_at<T, E>(p, batch, window.first - before + i + j, i + j - (is_previous ? 0 : before), of.head,
                                  of.first + (shape.dual && !is_previous ? shape.channels : 0));
    }
    const auto add = count == kEntries ? add_entries<T, E, KIND, kEntries>
                     : count == 4      ? add_entries<T, E, KIND, 4>
                                       : add_entries<T, E, KIND, 1>;
    add(entries, i == first, of.count, kept);
    i += count;
  }

  const T divisor = p.mode == PoolMode::kMean ? static_cast<T>(total) : T(1);
  for (int64_t c = 0; c < of.count; c += kWidth<T>) {
    Vec<T> value = load<T>(kept.sum + c);
    if constexpr (KIND == Kind::kSoftmax) {
      const Vec<T> weights = load<T>(kept.weights + c);
      value /= weights;
      // Without a finite logit both are NaN, as those of torch.softmax.
      if (p.lse) {
        const Vec<T> lse = (weights > T(0)) ? load<T>(kept.largest + c) + log_positive(weights) : value;
        store_lanes<T>(static_cast<T*>(p.lse) + to, c, of.count, lse);
      }
    } else if constexpr (KIND == Kind::kLinear) {
      value /= divisor;
    }
    store_lanes<T>(y, c, of.count, value);
  }
  if (KIND == Kind::kMax && p.arg) {
    for (int64_t c = 0; c < of.count; ++c) p.arg[to + c] = static_cast<int32_t>(kept.arg[c]);
  }
}

/// Tokens as wide as T.
template <class T>
REMORA_INLINE Vec<Index<T>> load_tokens(const int32_t* arg, int64_t c, int64_t channels) {
  if constexpr (sizeof(T) == 4) {
    return load_lanes<int32_t>(arg, c, channels);
  } else {
    Vec<Index<T>> tokens{};
    for (int64_t lane = 0; lane < std::min<int64_t>(kWidth<T>, channels - c); ++lane) tokens[lane] = arg[c + lane];
    return tokens;
  }
}

/// The windows that a token belongs to: window - k of the rows of y with slot + k * stride, for k in [first, last].
struct TokenWindows {
  int64_t window, slot, first, last;
};

/// Token `local` of the sequence. of_previous: by the lower half of dual channels.
inline TokenWindows windows_of(const SegmentPoolBwdParams& p, const PoolSequence& sequence, int64_t local,
                               bool of_previous) {
  const PoolShape& shape = p.shape;
  if (shape.is_ragged()) {
    const int64_t segment = shape.segment_ids[sequence.batch * shape.seqlen + local];
    const bool exists = segment >= 0 && segment < shape.num_windows;
    const bool counts = exists && (p.mode != PoolMode::kLast || [&] {
                          const PoolWindow window = shape.window(sequence.batch, segment);
                          return local == window.first + window.count - 1;
                        }());
    return {segment, 0, 0, counts ? 0 : -1};
  }
  const int64_t window = local / shape.stride + of_previous, slot = local % shape.stride;
  const int64_t most = slot < shape.size ? (shape.size - 1 - slot) / shape.stride : -1;
  int64_t first = std::max<int64_t>(0, window - sequence.num_windows + 1), last = std::min(window, most);
  if (p.mode == PoolMode::kLast) {
    first = std::max(first, most);
    if ((shape.size - 1 - slot) % shape.stride != 0) last = -1;
  }
  return {sequence.first_window + window, slot, first, last};
}

template <class T, class E, Kind KIND>
void bwd(const SegmentPoolBwdParams& p, int64_t block, PoolChannels of, void*) {
  const PoolShape& shape = p.shape;
  const int64_t input_channels = shape.input_channels(), slot_size = shape.heads * input_channels;
  T* const share =
      p.dslot_bias ? static_cast<T*>(p.workspace) + block * shape.size * slot_size + of.head * input_channels + of.first
                   : nullptr;
  for (int64_t slot = 0; share && slot < shape.size; ++slot) {
    std::fill_n(share + slot * slot_size, of.count, T(0));
  }
  const int64_t index = shape.sequence_of_block(block), in_sequence = shape.block_in_sequence(block, index);
  const PoolSequence sequence = shape.sequence(index);
  if (in_sequence < 0) return;
  const bool of_previous = shape.dual && of.first < shape.channels;
  const int64_t begin = in_sequence * shape.block_tokens();
  const int64_t end = std::min(sequence.length, begin + shape.block_tokens());
  for (int64_t local = begin; local < end; ++local) {
    const int64_t token = sequence.begin + local;
    const TokenWindows at = windows_of(p, sequence, local, of_previous);
    const int64_t input = ((sequence.batch * shape.seqlen + token) * shape.heads + of.head) * input_channels + of.first;
    E* const dx = static_cast<E*>(p.dx) + input;
    E* const dgate = p.dgate ? static_cast<E*>(p.dgate) + input : nullptr;
    const Entry<T, E> entry = entry_at<T, E>(p, sequence.batch, token, at.slot, of.head, of.first);
    const int64_t row = ((sequence.batch * shape.num_windows + at.window) * shape.heads + of.head) * shape.channels +
                        of.first - (shape.dual && !of_previous ? shape.channels : 0);
    const int64_t row_stride = shape.heads * shape.channels, bias_stride = shape.stride * slot_size;
    T scale = 1;
    if (p.mode == PoolMode::kMean && at.first <= at.last) {
      const bool is_double = shape.dual && at.window > sequence.first_window;
      const int64_t size = shape.is_ragged() ? shape.window(sequence.batch, at.window).count : shape.size;
      scale = T(1) / static_cast<T>(std::max<int64_t>(1, is_double ? 2 * size : size));
    }
    const auto walk = [&](auto is_single) REMORA_ALWAYS_INLINE {
      for (int64_t c = 0; c < of.count; c += kWidth<T>) {
        Vec<T> x{}, gate{}, d_x{}, d_logit{};
        if constexpr (KIND == Kind::kSoftmax || KIND == Kind::kWeighted) {
          x = load_lanes<T>(entry.x, c, of.count);
          if (entry.gate) gate = load_lanes<T>(entry.gate, c, of.count);
        }
        int64_t k = at.first;
        do {
          const int64_t from = row - k * row_stride;
          const Vec<T> d = load_lanes<T>(static_cast<const E*>(p.dy) + from, c, of.count);
          if constexpr (KIND == Kind::kLinear) {
            d_x += d * scale;
          } else if constexpr (KIND == Kind::kMax) {
            d_x += (load_tokens<T>(p.arg + from, c, of.count) == static_cast<Index<T>>(token)) ? d : Vec<T>{};
          } else {
            Vec<T> logit = gate, of_logit;
            if (entry.bias) logit += load_lanes<T>(entry.bias + k * bias_stride, c, of.count);
            if constexpr (KIND == Kind::kSoftmax) {
              const Vec<T> lse = load_lanes<T>(static_cast<const T*>(p.lse) + from, c, of.count);
              const Vec<T> y = load_lanes<T>(static_cast<const E*>(p.y) + from, c, of.count);
              const Vec<T> weighted = exp_nonpositive(logit - lse) * d;
              d_x += weighted, of_logit = weighted * (x - y);
            } else {
              d_x += logit * d, of_logit = x * d;
            }
            d_logit += of_logit;
            if (share) {
              T* const to = share + at.slot * slot_size + k * bias_stride;
              store_lanes<T>(to, c, of.count, load_lanes<T>(to, c, of.count) + of_logit);
            }
          }
        } while (!is_single && ++k <= at.last);
        store_lanes<T>(dx, c, of.count, d_x);
        if (dgate) store_lanes<T>(dgate, c, of.count, d_logit);
      }
    };
    if (at.first > at.last) {
      std::fill_n(dx, of.count, E{});
      if (dgate) std::fill_n(dgate, of.count, E{});
    } else if (at.first == at.last) {
      walk(std::true_type{});
    } else {
      walk(std::false_type{});
    }
  }
}

template <class T>
void reduce(const SegmentPoolBwdParams& p, int64_t begin, int64_t end) {
  const int64_t entries = p.shape.size * p.shape.heads * p.shape.input_channels();
  T* const to = static_cast<T*>(p.dslot_bias);
  std::fill(to + begin, to + end, T(0));
  for (int64_t block = 0; block < p.shape.num_blocks(); ++block) {
    const T* share = static_cast<const T*>(p.workspace) + block * entries;
    for (int64_t i = begin; i < end; ++i) to[i] += share[i];
  }
}

template <class T, class E>
void fwd_of(const SegmentPoolFwdParams& p, int64_t batch, int64_t window, PoolChannels of, void* scratch) {
  const auto run = p.mode == PoolMode::kMax        ? fwd<T, E, Kind::kMax>
                   : p.mode == PoolMode::kSoftmax  ? fwd<T, E, Kind::kSoftmax>
                   : p.mode == PoolMode::kWeighted ? fwd<T, E, Kind::kWeighted>
                                                   : fwd<T, E, Kind::kLinear>;
  run(p, batch, window, of, scratch);
}

template <class T, class E>
void bwd_of(const SegmentPoolBwdParams& p, int64_t block, PoolChannels of, void* scratch) {
  const auto run = p.mode == PoolMode::kMax        ? bwd<T, E, Kind::kMax>
                   : p.mode == PoolMode::kSoftmax  ? bwd<T, E, Kind::kSoftmax>
                   : p.mode == PoolMode::kWeighted ? bwd<T, E, Kind::kWeighted>
                                                   : bwd<T, E, Kind::kLinear>;
  run(p, block, of, scratch);
}

template <class T, class E>
const SegmentPoolCpuKernels& kernels_of() {
  static const SegmentPoolCpuKernels kernels = {scratch_bytes<T>(), fwd_of<T, E>, bwd_of<T, E>, reduce<T>};
  return kernels;
}

}  // namespace

const SegmentPoolCpuKernels& segment_pool_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kernels_of<T, E>(); });
}

}  // namespace remora::REMORA_CPU_ISA
