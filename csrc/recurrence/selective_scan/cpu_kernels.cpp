// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
//
// A task is a block of channels of one sequence. It goes through the sequence in intervals of kScanInterval tokens,
// whose inputs are first brought into tiles with the channels contiguous, whatever their layout; a vector is then as
// many channels, and the states of a vector are walked for every token.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "recurrence/cpu_sequence.h"
#include "recurrence/selective_scan/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kTokens = kScanInterval;
constexpr int64_t kChannels = kScanChannels;
/// States of a vector of channels that stay in registers with their rates.
constexpr int kGroup = kNumRegisters / 4;

/// Where the tokens of a sequence lie, in scan order.
struct ScanSequence {
  RecurrenceSequence tokens;
  bool reverse;

  int64_t batch() const { return tokens.first.batch; }
  int64_t token(int64_t i) const { return tokens.first.token + (reverse ? tokens.length - 1 - i : i); }
  int64_t row(int64_t i) const { return tokens.first.row + (reverse ? tokens.length - 1 - i : i); }
  int64_t stride(int64_t stride_token) const { return reverse ? -stride_token : stride_token; }
};

struct ChannelBlock {
  int64_t group, first, lanes;

  ChannelBlock(const SelectiveScanShape& shape, int64_t index) {
    group = index / shape.blocks_per_group();
    const int64_t begin = index % shape.blocks_per_group() * kChannels;
    first = group * shape.group_channels() + begin;
    lanes = std::min(kChannels, shape.group_channels() - begin);
  }
};

/// A [tokens, lanes] matrix of any strides into rows of `ld` numbers, zeros behind `lanes`. ld is a multiple of the
/// vector width.
template <class T, class E>
void load_tile(const E* src, int64_t stride_token, int64_t stride_lane, int64_t tokens, int64_t lanes, T* tile,
               int64_t ld) {
  constexpr int w = kWidth<T>;
  if (stride_lane == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < ld; d += w) {
        store<T>(tile + t * ld + d, d < lanes ? load_lanes<T>(src + t * stride_token, d, lanes) : Vec<T>{});
      }
    }
    return;
  }
  for (int64_t d = 0; d < ld; d += w) {
    for (int64_t t = 0; t < tokens; t += w) {
      const int64_t rows = std::min<int64_t>(w, tokens - t);
      Vec<T> block[w];
      if (stride_token == 1 && rows == w && d + w <= lanes) {
        unroll<w>([&](auto i) REMORA_ALWAYS_INLINE { block[i] = load<T>(src + (d + i) * stride_lane + t); });
        transpose(block);
      } else if (stride_token == 1) {
        for (int i = 0; i < w; ++i) {
          block[i] = d + i < lanes ? load_lanes<T>(src + (d + i) * stride_lane, t, tokens) : Vec<T>{};
        }
        transpose(block);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int j = 0; j < w; ++j) {
            block[i][j] = d + j < lanes ? load_one<T>(src + (t + i) * stride_token + (d + j) * stride_lane) : T(0);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) store<T>(tile + (t + i) * ld + d, block[i]);
    }
  }
}

/// The first `lanes` columns of a tile of rows of kChannels numbers to a matrix of any strides.
template <class T, class E>
void store_tile(const T* tile, int64_t tokens, int64_t lanes, E* dst, int64_t stride_token, int64_t stride_lane) {
  constexpr int w = kWidth<T>;
  if (stride_lane == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < lanes; d += w) {
        store_lanes<T>(dst + t * stride_token, d, lanes, load<T>(tile + t * kChannels + d));
      }
    }
    return;
  }
  for (int64_t d = 0; d < lanes; d += w) {
    for (int64_t t = 0; t < tokens; t += w) {
      Vec<T> block[w];
      for (int i = 0; i < w; ++i) block[i] = load<T>(tile + std::min(t + i, tokens - 1) * kChannels + d);
      const int64_t columns = std::min<int64_t>(w, lanes - d);
      if (stride_token == 1) {
        transpose(block);
        for (int64_t j = 0; j < columns; ++j) store_lanes<T>(dst + (d + j) * stride_lane, t, tokens, block[j]);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(w, tokens - t); ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            store_one<T>(dst + (t + i) * stride_token + (d + j) * stride_lane, block[i][j]);
          }
        }
      }
    }
  }
}

/// What both passes know of a block of channels, and the tiles of one interval.
template <class T, class E>
struct Scan {
  const SelectiveScanInputs& in;
  int64_t num_states, ld_states;
  T *a, *skip, *bias;     // A log2(e) [N, kChannels], skip and delta_bias [kChannels]
  T *u, *delta, *dt, *z;  // [kTokens, kChannels]; delta with its bias
  T *b, *c;               // [kTokens, ld_states]

  Scan(const SelectiveScanInputs& inputs, Arena& arena)
      : in(inputs),
        num_states(inputs.shape.state_dim),
        ld_states((num_states + kWidth<T> - 1) / kWidth<T> * kWidth<T>),
        a(arena.take<T>(num_states * kChannels)),
        skip(arena.take<T>(kChannels)),
        bias(arena.take<T>(kChannels)),
        u(arena.take<T>(kTokens * kChannels)),
        delta(arena.take<T>(kTokens * kChannels)),
        dt(arena.take<T>(kTokens * kChannels)),
        z(arena.take<T>(kTokens * kChannels)),
        b(arena.take<T>(kTokens * ld_states)),
        c(arena.take<T>(kTokens * ld_states)) {}

  void load_channels(const ChannelBlock& block) {
    const auto entry = [&](const void* data, int64_t d) {
      return data && d < block.lanes ? static_cast<const T*>(data)[block.first + d] : T(0);
    };
    for (int64_t d = 0; d < kChannels; ++d) {
      skip[d] = entry(in.skip, d), bias[d] = entry(in.delta_bias, d);
      for (int64_t n = 0; n < num_states; ++n) {
        a[n * kChannels + d] =
            d < block.lanes ? static_cast<const T*>(in.a)[(block.first + d) * num_states + n] * T(1.4426950408889634)
                            : T(0);
      }
    }
  }

  void load_channel_tile(const void* data, const ScanStrides& stride, const ScanSequence& seq,
                         const ChannelBlock& block, int64_t first, int64_t tokens, T* tile) const {
    const E* src = static_cast<const E*>(data) + seq.batch() * stride.batch + seq.token(first) * stride.token +
                   block.first * stride.channel;
    load_tile<T>(src, seq.stride(stride.token), stride.channel, tokens, block.lanes, tile, kChannels);
  }

  void load_interval(const ScanSequence& seq, const ChannelBlock& block, int64_t first, int64_t tokens) {
    load_channel_tile(in.u, in.u_stride, seq, block, first, tokens, u);
    load_channel_tile(in.delta, in.delta_stride, seq, block, first, tokens, delta);
    if (in.z) load_channel_tile(in.z, in.z_stride, seq, block, first, tokens, z);
    for (const auto& [data, stride, tile] : {std::tuple(in.b, in.b_stride, b), std::tuple(in.c, in.c_stride, c)}) {
      const E* src = static_cast<const E*>(data) + seq.batch() * stride.batch + seq.token(first) * stride.token +
                     block.group * stride.group;
      load_tile<T>(src, seq.stride(stride.token), stride.state, tokens, num_states, tile, ld_states);
    }
    for (int64_t i = 0; i < tokens * kChannels; i += kWidth<T>) {
      const Vec<T> x = load<T>(delta + i) + load<T>(bias + i % kChannels);
      store<T>(delta + i, x);
      store<T>(dt + i, in.delta_softplus ? softplus(x) : x);
    }
  }

  /// States [D, N] of a block of channels from and to rows of channels [N, kChannels].
  void load_state(const void* state, int64_t row, const ChannelBlock& block, T* x) const {
    const T* from =
        state ? static_cast<const T*>(state) + (row * in.shape.num_channels + block.first) * num_states : nullptr;
    for (int64_t d = 0; d < kChannels; ++d) {
      for (int64_t n = 0; n < num_states; ++n) {
        x[n * kChannels + d] = from && d < block.lanes ? from[d * num_states + n] : T(0);
      }
    }
  }
  void store_state(const T* x, const ChannelBlock& block, void* state, int64_t row) const {
    T* to = static_cast<T*>(state) + (row * in.shape.num_channels + block.first) * num_states;
    for (int64_t d = 0; d < block.lanes; ++d) {
      for (int64_t n = 0; n < num_states; ++n) to[d * num_states + n] = x[n * kChannels + d];
    }
  }
};

template <class T, class E>
struct FwdScratch : Scan<T, E> {
  T *x, *y;  // [N, kChannels], [kTokens, kChannels]

  FwdScratch(const SelectiveScanInputs& in, Arena& arena)
      : Scan<T, E>(in, arena), x(arena.take<T>(this->num_states * kChannels)), y(arena.take<T>(kTokens * kChannels)) {}
};

/// The scratch depends on the shape alone.
template <class Scratch>
int64_t scratch_bytes(const SelectiveScanShape& shape) {
  SelectiveScanInputs in{};
  in.shape = shape;
  Arena arena(nullptr);
  Scratch scratch(in, arena);
  return arena.used();
}

/// kStates states of a vector of channels through an interval; their part of the outputs is added to y.
template <int kStates, class T, class E>
void walk(FwdScratch<T, E>& s, int64_t tokens, int64_t d, int64_t first_state) {
  Vec<T> rate[kStates], x[kStates];
  unroll<kStates>([&](auto i) REMORA_ALWAYS_INLINE {
    rate[i] = load<T>(s.a + (first_state + i) * kChannels + d);
    x[i] = load<T>(s.x + (first_state + i) * kChannels + d);
  });
  const T *b = s.b + first_state, *c = s.c + first_state;
  for (int64_t t = 0; t < tokens; ++t, b += s.ld_states, c += s.ld_states) {
    const int64_t at = t * kChannels + d;
    const Vec<T> dt = load<T>(s.dt + at), du = dt * load<T>(s.u + at);
    Vec<T> y = load<T>(s.y + at);
    unroll<kStates>([&](auto i) REMORA_ALWAYS_INLINE {
      x[i] = exp2(dt * rate[i]) * x[i] + du * b[i];
      y += x[i] * c[i];
    });
    store<T>(s.y + at, y);
  }
  unroll<kStates>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(s.x + (first_state + i) * kChannels + d, x[i]); });
}

template <class T, class E>
void fwd(const SelectiveScanFwdParams& p, int64_t seq_idx, int64_t channel_block, void* buffer) {
  const SelectiveScanShape& shape = p.in.shape;
  const ScanSequence seq{sequence_at(shape.sequences, p.in.cu_seqlens, nullptr, seq_idx), p.in.reverse};
  const ChannelBlock block(shape, channel_block);
  Arena arena(buffer);
  FwdScratch<T, E> s(p.in, arena);
  s.load_channels(block);
  s.load_state(p.initial_state, seq_idx, block, s.x);
  for (int64_t first = 0; first < seq.tokens.length; first += kTokens) {
    const int64_t tokens = std::min(kTokens, seq.tokens.length - first);
    s.load_interval(seq, block, first, tokens);
    if (p.saved_states) {
      const int64_t slot = first_scan_slot(seq.tokens.begin, seq_idx) + first / kTokens;
      s.store_state(s.x, block, p.saved_states, slot);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < block.lanes; d += kWidth<T>) {
        store<T>(s.y + t * kChannels + d, load<T>(s.skip + d) * load<T>(s.u + t * kChannels + d));
      }
    }
    for (int64_t d = 0; d < block.lanes; d += kWidth<T>) {
      int64_t n = 0;
      for (; n + kGroup <= s.num_states; n += kGroup) walk<kGroup>(s, tokens, d, n);
      for (; n < s.num_states; ++n) walk<1>(s, tokens, d, n);
    }
    for (int64_t i = 0; i < tokens * kChannels && p.in.z; i += kWidth<T>) {
      const Vec<T> z = load<T>(s.z + i);
      store<T>(s.y + i, load<T>(s.y + i) * z * sigmoid<T>(z));
    }
    E* out = static_cast<E*>(p.out) + seq.batch() * p.out_stride.batch + seq.token(first) * p.out_stride.token +
             block.first * p.out_stride.channel;
    store_tile<T>(s.y, tokens, block.lanes, out, seq.stride(p.out_stride.token), p.out_stride.channel);
  }
  if (p.final_state) s.store_state(s.x, block, p.final_state, seq_idx);
}

template <class T, class E>
struct BwdScratch : Scan<T, E> {
  T* dout;              // [kTokens, kChannels]; times the gate: the gradient of y
  T *du, *ddelta, *dz;  // [kTokens, kChannels]
  T *lambda, *da;       // [N, kChannels]; lambda: gradient of the state that enters the token to the right
  T *dskip, *dbias;     // [kChannels]
  T* x;                 // [kTokens + 1, N, kChannels], states before and behind each token
  T* decay;             // [kTokens, N, kChannels]
  T* sums;              // [ld_states, width], of one token over the vectors of channels

  BwdScratch(const SelectiveScanInputs& in, Arena& arena)
      : Scan<T, E>(in, arena),
        dout(arena.take<T>(kTokens * kChannels)),
        du(arena.take<T>(kTokens * kChannels)),
        ddelta(arena.take<T>(kTokens * kChannels)),
        dz(arena.take<T>(kTokens * kChannels)),
        lambda(arena.take<T>(this->num_states * kChannels)),
        da(arena.take<T>(this->num_states * kChannels)),
        dskip(arena.take<T>(kChannels)),
        dbias(arena.take<T>(kChannels)),
        x(arena.take<T>((kTokens + 1) * this->num_states * kChannels)),
        decay(arena.take<T>(kTokens * this->num_states * kChannels)),
        sums(arena.take<T>(this->ld_states * kWidth<T>)) {}

  /// Adds what a token's vectors of channels have left in `sums`, to the row of a share of dB or dC.
  void put_sums(T* row) const {
    constexpr int w = kWidth<T>;
    for (int64_t n = 0; n < this->num_states; n += w) {
      Vec<T> rows[w];
      unroll<w>([&](auto i) REMORA_ALWAYS_INLINE { rows[i] = load<T>(sums + (n + i) * w); });
      store_lanes<T>(row, n, this->num_states, sum_rows(rows));
    }
  }
};

/// Calls f(d, is_first) for every vector of channels, is_first known at compile time.
template <class T, class F>
void for_each_vector(int64_t lanes, const F& f) {
  f(int64_t{0}, std::true_type{});
  for (int64_t d = kWidth<T>; d < lanes; d += kWidth<T>) f(d, std::false_type{});
}

/// A token of the interval, from left to right: state behind it, decays, gradients of z and C.
template <class T, class E>
void recompute(BwdScratch<T, E>& s, int64_t t, int64_t lanes, T* dc_row) {
  constexpr int w = kWidth<T>;
  const int64_t num_states = s.num_states;
  for_each_vector<T>(lanes, [&](int64_t d, auto is_first) REMORA_ALWAYS_INLINE {
    const int64_t at = t * kChannels + d;
    const Vec<T> dt = load<T>(s.dt + at), u = load<T>(s.u + at), du = dt * u;
    Vec<T> dy = load<T>(s.dout + at), gate{}, z{}, y = load<T>(s.skip + d) * u;
    if (s.in.z) {
      z = load<T>(s.z + at), gate = sigmoid<T>(z);
      dy *= z * gate;
    }
    const T *a = s.a + d, *b = s.b + t * s.ld_states, *c = s.c + t * s.ld_states;
    T *x = s.x + t * num_states * kChannels + d, *decays = s.decay + t * num_states * kChannels + d;
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_states; ++n) {
      const int64_t i = n * kChannels;
      const Vec<T> decay = exp2(dt * load<T>(a + i)), after = decay * load<T>(x + i) + du * b[n];
      store<T>(decays + i, decay), store<T>(x + num_states * kChannels + i, after);
      store<T>(s.sums + n * w, is_first ? dy * after : load<T>(s.sums + n * w) + dy * after);
      y += after * c[n];
    }
    if (s.in.z) {
      store<T>(s.dz + at, load<T>(s.dout + at) * y * gate * (T(1) + z * (T(1) - gate)));
      store<T>(s.dout + at, dy);
    }
  });
  s.put_sums(dc_row);
}

/// A token of the interval, from right to left.
template <class T, class E>
void walk_back(BwdScratch<T, E>& s, int64_t t, int64_t lanes, T* db_row) {
  constexpr int w = kWidth<T>;
  constexpr T kLn2 = T(0.6931471805599453);
  const int64_t num_states = s.num_states;
  for_each_vector<T>(lanes, [&](int64_t d, auto is_first) REMORA_ALWAYS_INLINE {
    const int64_t at = t * kChannels + d;
    const Vec<T> dt = load<T>(s.dt + at), u = load<T>(s.u + at), dy = load<T>(s.dout + at), du = dt * u;
    Vec<T> write{}, decays{};
    const T *a = s.a + d, *b = s.b + t * s.ld_states, *c = s.c + t * s.ld_states;
    const T *x = s.x + t * num_states * kChannels + d, *decay = s.decay + t * num_states * kChannels + d;
#pragma GCC unroll 4
    for (int64_t n = 0; n < num_states; ++n) {
      const int64_t i = n * kChannels;
      const Vec<T> lambda = load<T>(s.lambda + i + d) + dy * c[n];
      const Vec<T> carried = lambda * load<T>(decay + i), d_log = carried * load<T>(x + i);
      store<T>(s.sums + n * w, is_first ? lambda * du : load<T>(s.sums + n * w) + lambda * du);
      write += lambda * b[n];
      decays += d_log * load<T>(a + i);
      store<T>(s.da + i + d, load<T>(s.da + i + d) + d_log * dt);
      store<T>(s.lambda + i + d, carried);
    }
    const Vec<T> raw = load<T>(s.delta + at);
    Vec<T> ddelta = decays * kLn2 + u * write;
    if (s.in.delta_softplus) ddelta = raw > T(20) ? ddelta : ddelta * sigmoid<T>(raw);
    store<T>(s.du + at, load<T>(s.skip + d) * dy + dt * write);
    store<T>(s.ddelta + at, ddelta);
    store<T>(s.dskip + d, load<T>(s.dskip + d) + dy * u);
    store<T>(s.dbias + d, load<T>(s.dbias + d) + ddelta);
  });
  s.put_sums(db_row);
}

template <class T, class E>
void bwd(const SelectiveScanBwdParams& p, int64_t seq_idx, int64_t channel_block, void* buffer) {
  const SelectiveScanShape& shape = p.in.shape;
  const ScanSequence seq{sequence_at(shape.sequences, p.in.cu_seqlens, nullptr, seq_idx), p.in.reverse};
  const ChannelBlock block(shape, channel_block);
  const SelectiveScanShares shares(p.in);
  Arena arena(buffer);
  BwdScratch<T, E> s(p.in, arena);
  const int64_t num_states = s.num_states;
  s.load_channels(block);
  s.load_state(p.d_final_state, seq_idx, block, s.lambda);
  std::fill_n(s.da, num_states * kChannels, T(0));
  std::fill_n(s.dskip, kChannels, T(0)), std::fill_n(s.dbias, kChannels, T(0));
  std::fill_n(s.sums, s.ld_states * kWidth<T>, T(0));
  T* const db_share = static_cast<T*>(p.workspace) + 2 * channel_block * shares.token_share();
  T* const dc_share = db_share + shares.token_share();

  for (int64_t first = (seq.tokens.length - 1) / kTokens * kTokens; first >= 0 && seq.tokens.length > 0;
       first -= kTokens) {
    const int64_t tokens = std::min(kTokens, seq.tokens.length - first);
    s.load_interval(seq, block, first, tokens);
    s.load_channel_tile(p.d_out, p.d_out_stride, seq, block, first, tokens, s.dout);
    s.load_state(p.saved_states, first_scan_slot(seq.tokens.begin, seq_idx) + first / kTokens, block, s.x);
    const auto row = [&](T* share, int64_t t) { return share + seq.row(first + t) * num_states; };
    for (int64_t t = 0; t < tokens; ++t) recompute(s, t, block.lanes, row(dc_share, t));
    for (int64_t t = tokens - 1; t >= 0; --t) walk_back(s, t, block.lanes, row(db_share, t));
    const auto put = [&](const T* tile, void* data) {
      if (!data) return;
      E* dst = static_cast<E*>(data) + seq.batch() * p.d_stride.batch + seq.token(first) * p.d_stride.token +
               block.first * p.d_stride.channel;
      store_tile<T>(tile, tokens, block.lanes, dst, seq.stride(p.d_stride.token), p.d_stride.channel);
    };
    put(s.du, p.du), put(s.ddelta, p.ddelta), put(s.dz, p.dz);
  }
  if (p.d_initial_state) s.store_state(s.lambda, block, p.d_initial_state, seq_idx);
  T* share = static_cast<T*>(p.workspace) + 2 * shape.num_channel_blocks() * shares.token_share() +
             seq_idx * shares.sequence_share();
  s.store_state(s.da, block, share, 0);
  share += shape.num_channels * num_states;
  std::copy_n(s.dskip, block.lanes, share + block.first);
  std::copy_n(s.dbias, block.lanes, share + shape.num_channels + block.first);
}

/// Sums the shares of dB and dC of the blocks of each group, in order.
template <class T, class E>
void reduce_tokens(const SelectiveScanBwdParams& p, int64_t first_token, int64_t num_tokens) {
  const SelectiveScanShape& shape = p.in.shape;
  const SelectiveScanShares shares(p.in);
  const int64_t num_states = shape.state_dim;
  for (int64_t row = first_token; row < first_token + num_tokens; ++row) {
    for (int64_t group = 0; group < shape.num_groups; ++group) {
      const T* share = static_cast<const T*>(p.workspace) +
                       2 * group * shape.blocks_per_group() * shares.token_share() + row * num_states;
      for (void* const out : {p.db, p.dc}) {
        E* to = static_cast<E*>(out) + (row * shape.num_groups + group) * num_states;
        for (int64_t n = 0; n < num_states; n += kWidth<T>) {
          Vec<T> total{};
          for (int64_t block = 0; block < shape.blocks_per_group(); ++block) {
            total += load_lanes<T>(share + 2 * block * shares.token_share(), n, num_states);
          }
          store_lanes<T>(to, n, num_states, total);
        }
        share += shares.token_share();
      }
    }
  }
}

/// Sums the shares of dA, dskip and ddelta_bias of the sequences, in order.
template <class T>
void reduce_sequences(const SelectiveScanBwdParams& p, int64_t channel_block) {
  const SelectiveScanShape& shape = p.in.shape;
  const ChannelBlock block(shape, channel_block);
  const SelectiveScanShares shares(p.in);
  const T* first = static_cast<const T*>(p.workspace) + 2 * shape.num_channel_blocks() * shares.token_share();
  const auto total = [&](void* out, int64_t offset, int64_t begin, int64_t count) {
    if (!out) return;
    T* to = static_cast<T*>(out) + begin;
    std::fill_n(to, count, T(0));
    for (int64_t n = 0; n < shares.sequences; ++n) {
      const T* share = first + n * shares.sequence_share() + offset + begin;
      for (int64_t i = 0; i < count; ++i) to[i] += share[i];
    }
  };
  const int64_t num_states = shape.state_dim, channels = shape.num_channels;
  total(p.da, 0, block.first * num_states, block.lanes * num_states);
  total(p.dskip, channels * num_states, block.first, block.lanes);
  total(p.ddelta_bias, channels * (num_states + 1), block.first, block.lanes);
}

template <class T, class E>
void step(const SelectiveScanStepParams& p, int64_t seq_idx, int64_t channel_block, void* buffer) {
  const SelectiveScanShape& shape = p.in.shape;
  const ChannelBlock block(shape, channel_block);
  E* out = static_cast<E*>(p.out) + seq_idx * shape.num_channels + block.first;
  const int64_t slot = step_slot(shape.sequences, p.state_indices, nullptr, 1, p.num_slots, seq_idx);
  if (slot < 0) {
    std::memset(out, 0, block.lanes * sizeof(E));
    return;
  }
  const ScanSequence seq{{seq_idx, seq_idx, 1, {seq_idx, seq_idx, 0}, nullptr}, false};
  Arena arena(buffer);
  FwdScratch<T, E> s(p.in, arena);
  s.load_channels(block);
  s.load_interval(seq, block, 0, 1);
  const int64_t num_states = s.num_states;
  T* state = static_cast<T*>(p.state) + (slot * shape.num_channels + block.first) * num_states;
  const T* a = static_cast<const T*>(p.in.a) + block.first * num_states;
  for (int64_t d = 0; d < block.lanes; ++d) {
    Vec<T> y{};
    for (int64_t n = 0; n < num_states; n += kWidth<T>) {
      const Vec<T> rate = load_lanes<T>(a + d * num_states, n, num_states) * T(1.4426950408889634);
      const Vec<T> x = exp2(s.dt[d] * rate) * load_lanes<T>(state + d * num_states, n, num_states) +
                       s.dt[d] * s.u[d] * load<T>(s.b + n);
      store_lanes<T>(state + d * num_states, n, num_states, x);
      y += x * load<T>(s.c + n);
    }
    s.y[d] = sum<T>(y) + s.skip[d] * s.u[d];
  }
  for (int64_t d = 0; d < kChannels && p.in.z; d += kWidth<T>) {
    const Vec<T> z = load<T>(s.z + d);
    store<T>(s.y + d, load<T>(s.y + d) * z * sigmoid<T>(z));
  }
  for (int64_t d = 0; d < block.lanes; d += kWidth<T>) store_lanes<T>(out, d, block.lanes, load<T>(s.y + d));
}

template <class T, class E>
constexpr SelectiveScanCpuKernels kKernels = {
    scratch_bytes<FwdScratch<T, E>>,
    fwd<T, E>,
    scratch_bytes<BwdScratch<T, E>>,
    bwd<T, E>,
    reduce_tokens<T, E>,
    reduce_sequences<T>,
    step<T, E>,
};

}  // namespace

const SelectiveScanCpuKernels& selective_scan_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
