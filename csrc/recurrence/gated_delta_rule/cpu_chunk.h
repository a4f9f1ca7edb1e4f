// What the forward and the backward pass compute per chunk of tokens: the products of its tokens, the decays between
// them, and the walk of the state over it, one panel of value columns at a time.
//
// Norms, gates and the scale never touch the data; they travel as one factor per token and enter where a product
// leaves the accumulators.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/cpu/arena.h"
#include "common/cpu/microkernel.h"
#include "recurrence/cpu_sequence.h"
#include "recurrence/gated_delta_rule/params.h"

namespace remora::REMORA_CPU_ISA {

/// Gates below this act as a reset; -inf would turn differences of sums into NaN.
template <class T>
constexpr T kMinGate = sizeof(T) == 8 ? T(-700) : T(-88);

constexpr double kNormEpsilon = 1e-6;

/// Rows of the chunk in one head of a [B, T, H, D] tensor.
template <class E>
REMORA_INLINE Tile<E> head_tile(const void* data, const TokenStrides& stride, int64_t head,
                                const ChunkRows<kChunk>& rows) {
  Tile<E> tile;
  for (int i = 0; i < kChunk; ++i) {
    tile.row[i] = static_cast<const E*>(data) + head * stride.head + rows.at[i].offset(stride);
  }
  return tile;
}

/// Tokens of one chunk that all value heads of a key head share.
template <class Op>
struct KeyChunk {
  using T = typename Op::Real;
  using Word = typename Op::Word;

  const Word* q_pairs() const { return Op::kPack == 1 ? q : q_paired; }
  const Word* k_pairs() const { return Op::kPack == 1 ? k : k_paired; }

  Word *q, *k;                        // operands
  Word *q_paired, *k_paired;          // what rank_update reads if Op packs
  alignas(64) T q_norm[kChunk];       // 1 / |q_i|, or 1
  alignas(64) T k_norm[kChunk];       // 1 / |k_i|, or 1
  alignas(64) T qk[kChunk * kChunk];  // q_i . k_j, normalised
  alignas(64) T kk[kChunk * kChunk];  // k_i . k_j, normalised

  void take(Arena& arena, int64_t padded) {
    q = arena.take<Word>(words<Op>(padded) * kChunk);
    k = arena.take<Word>(words<Op>(padded) * kChunk);
    q_paired = arena.take<Word>(Op::kPack == 1 ? 0 : words<Op>(padded) * kChunk);
    k_paired = arena.take<Word>(Op::kPack == 1 ? 0 : words<Op>(padded) * kChunk);
  }
};

template <class Op, class E>
inline void make_key_chunk(KeyChunk<Op>& chunk, const Tile<E>& q, const Tile<E>& k, int64_t tokens, int64_t dims,
                           bool use_l2norm, E* copy) {
  using T = typename Op::Real;
  const int64_t n = words<Op>(pad(dims));
  load_operand<Op>(chunk.q, q, tokens, dims, copy);
  load_operand<Op>(chunk.k, k, tokens, dims, copy);
  token_pairs<Op>(chunk.q_paired, chunk.q, n);
  token_pairs<Op>(chunk.k_paired, chunk.k, n);
  multiply_tokens<Op>(chunk.qk, chunk.q, chunk.k, n);
  multiply_tokens<Op>(chunk.kk, chunk.k, chunk.k, n);
  for (int i = 0; i < kChunk; ++i) chunk.q_norm[i] = chunk.k_norm[i] = T(1);
  if (!use_l2norm) return;
  sum_squares<Op>(chunk.q_norm, chunk.q, n);
  sum_squares<Op>(chunk.k_norm, chunk.k, n);
  for (int i = 0; i < kChunk; ++i) {
    chunk.q_norm[i] = T(1) / std::sqrt(chunk.q_norm[i] + T(kNormEpsilon));
    chunk.k_norm[i] = T(1) / std::sqrt(chunk.k_norm[i] + T(kNormEpsilon));
  }
  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kChunk; j += kWidth<T>) {
      const Vec<T> column = load<T>(chunk.k_norm + j);
      store<T>(chunk.qk + i * kChunk + j, load<T>(chunk.qk + i * kChunk + j) * column * chunk.q_norm[i]);
      store<T>(chunk.kk + i * kChunk + j, load<T>(chunk.kk + i * kChunk + j) * column * chunk.k_norm[i]);
    }
  }
}

/// Gates of one chunk and one value head. Only j <= i of the matrices is ever read: what stands above may come from
/// tokens that the row must not see. G is the sum of the gates from the chunk's first token on, that token included.
template <class T>
struct ValueChunk {
  alignas(64) T decay[kChunk * kChunk];  // e^(G_i - G_j)
  alignas(64) T lower[kChunk * kChunk];  // decay * kk
  alignas(64) T attn[kChunk * kChunk];   // scale * decay * qk
  alignas(64) T from_start[kChunk];      // e^(G_i)
  alignas(64) T to_end[kChunk];          // e^(G_last - G_i)
  alignas(64) T beta[kChunk];
  alignas(64) T q_read[kChunk];   // scale * from_start * q_norm
  alignas(64) T k_read[kChunk];   // from_start * k_norm
  alignas(64) T k_write[kChunk];  // to_end * k_norm
  T total;                        // e^(G_last)
};

template <class Op, class T = typename Op::Real>
inline void make_value_chunk(ValueChunk<T>& chunk, const KeyChunk<Op>& key, const T* g, const T* beta,
                             int64_t value_heads, const ChunkRows<kChunk>& rows, int64_t tokens, T scale) {
  constexpr int w = kWidth<T>;
  // Sums as gate + rest: next to a reset, the difference of two sums is far smaller than they are.
  alignas(64) T gate[kChunk], rest[kChunk];
  double sum = 0;
  for (int i = 0; i < kChunk; ++i) {
    const int64_t at = rows.at[i].row * value_heads;
    if (g && i < tokens) sum += g[at] < kMinGate<T> ? kMinGate<T> : g[at];
    gate[i] = static_cast<T>(sum);
    rest[i] = static_cast<T>(sum - gate[i]);
    chunk.beta[i] = i < tokens ? beta[at] : T(0);
  }
  for (int j = 0; j < kChunk; j += w) {
    const Vec<T> column = load<T>(gate + j), column_rest = load<T>(rest + j);
    const Vec<T> from_start = exp_nonpositive(column);
    const Vec<T> to_end = exp_nonpositive((gate[kChunk - 1] - column) + (rest[kChunk - 1] - column_rest));
    store<T>(chunk.from_start + j, from_start);
    store<T>(chunk.to_end + j, to_end);
    store<T>(chunk.q_read + j, from_start * load<T>(key.q_norm + j) * scale);
    store<T>(chunk.k_read + j, from_start * load<T>(key.k_norm + j));
    store<T>(chunk.k_write + j, to_end * load<T>(key.k_norm + j));
    for (int i = 0; i < kChunk; ++i) {
      const int at = i * kChunk + j;
      const Vec<T> difference = (gate[i] - column) + (rest[i] - column_rest);
      const Vec<T> decay = exp_nonpositive(difference > T(0) ? Vec<T>{} : difference);
      store<T>(chunk.decay + at, decay);
      store<T>(chunk.lower + at, load<T>(key.kk + at) * decay);
      store<T>(chunk.attn + at, load<T>(key.qk + at) * decay * scale);
    }
  }
  chunk.total = chunk.from_start[kChunk - 1];
}

/// Where the outputs of one tile go; rows beyond `tokens` and columns beyond `lanes` do not exist.
template <class E>
struct OutputTile {
  E* data;
  int64_t stride;  // between rows of the tensor
  const ChunkRows<kChunk>& rows;
  int64_t tokens, lanes;

  REMORA_INLINE OutputTile columns_from(int64_t column) const { return {data + column, stride, rows, tokens, lanes}; }

  template <class T>
  REMORA_INLINE void store_row(int64_t i, Vec<T> row) const {
    E* const out = data + rows.at[i].row * stride;
    if (lanes == kWidth<T> && tokens == kChunk) {
      store<T>(out, row);
    } else if (i < tokens) {
      store_first<T>(out, row, lanes);
    }
  }
};

/// From u_i = (state entering the chunk)^T k_i of one panel to r_i = v_i - (state entering token i, decayed)^T k_i:
/// what the chunk's start explains, then the tokens before i one after the other. On return `u` holds beta_i r_i.
template <class T, class E>
REMORA_INLINE void solve_tokens(Vec<T> (&u)[kChunk], const ValueChunk<T>& value, const Tile<E>& v, T* residual,
                                int64_t residual_stride) {
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { u[i] = load<T>(v.row[i]) - u[i] * value.k_read[i]; });
  unroll<kChunk>([&](auto j) REMORA_ALWAYS_INLINE {
    if (residual) store<T>(residual + j * residual_stride, u[j]);
    u[j] *= value.beta[j];
    unroll<kChunk - 1 - j>([&](auto d) REMORA_ALWAYS_INLINE {
      constexpr int i = j + 1 + d;
      u[i] -= u[j] * value.lower[i * kChunk + j];
    });
  });
}

template <class Op, class E>
REMORA_INLINE void solve_tile(Vec<typename Op::Real> (&u)[kChunk], const KeyChunk<Op>& key,
                              const ValueChunk<typename Op::Real>& value, const Panel<Op>& state, int64_t padded,
                              const Tile<E>& v, typename Op::Real* residual, int64_t residual_stride) {
  multiply_panel<Op>(u, key.k, state, padded);
  solve_tokens(u, value, v, residual, residual_stride);
}

/// Writes the solved tokens into the panel: state = total * state + (k to_end)^T u.
template <class Op>
REMORA_INLINE void write_tile(Vec<typename Op::Real> (&u)[1][kChunk], const KeyChunk<Op>& key,
                              const ValueChunk<typename Op::Real>& value, const Panel<Op>& state, int64_t padded) {
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { u[0][i] *= value.k_write[i]; });
  rank_update<Op, 1>(state, padded, value.total, {key.k_pairs()}, u);
}

/// Copies columns [0, lanes) of a [K, V] (or [V, K]) matrix, `data` at its first column, into a zero-padded panel.
template <class Op, class E>
inline void load_panel(const Panel<Op>& panel, const E* data, int64_t dims, int64_t value_dim, int64_t lanes,
                       bool v_first) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  for (int64_t k = 0; k < pad(dims); ++k) {
    Vec<T> row{};
    if (data && k < dims) {
      if (v_first) {
        E buffer[w] = {};
        for (int64_t j = 0; j < lanes; ++j) buffer[j] = data[j * dims + k];
        row = load<T>(buffer);
      } else {
        row = lanes == w ? load<T>(data + k * value_dim) : load_first<T>(data + k * value_dim, lanes);
      }
    }
    store<T>(panel.values + k * w, row);
  }
  pack_panel<Op>(panel, pad(dims));
}

template <class Op, class E>
inline void store_panel(const Panel<Op>& panel, E* data, int64_t dims, int64_t value_dim, int64_t lanes, bool v_first) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  for (int64_t k = 0; k < dims; ++k) {
    const Vec<T> row = load<T>(panel.values + k * w);
    if (v_first) {
      E buffer[w];
      store<T>(buffer, row);
      for (int64_t j = 0; j < lanes; ++j) data[j * dims + k] = buffer[j];
    } else if (lanes == w) {
      store<T>(data + k * value_dim, row);
    } else {
      store_first<T>(data + k * value_dim, row, lanes);
    }
  }
}

/// What one value head needs to walk a state over the chunks of a sequence.
template <class Op, class E>
struct WalkScratch {
  using T = typename Op::Real;
  KeyChunk<Op>* key;
  ValueChunk<T>* value;
  T* state;  // panels
  typename Op::Word* packed;
  E* copy;

  WalkScratch(const RecurrenceShape& shape, Arena& arena) {
    const int64_t padded = pad(shape.head_dim), columns = pad(shape.value_dim);
    key = arena.take<KeyChunk<Op>>(1);
    KeyChunk<Op> counted;
    (key ? *key : counted).take(arena, padded);
    value = arena.take<ValueChunk<T>>(1);
    state = arena.take<T>(padded * columns);
    packed = arena.take<typename Op::Word>(Panel<Op>::packed_size(padded, columns));
    copy = arena.take<E>(operand_copy_size(shape.head_dim));
  }

  Panel<Op> panel(int64_t tile, int64_t padded) const { return Panel<Op>::of(state, packed, tile, padded); }
};

template <class Op, class E>
int64_t walk_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  WalkScratch<Op, E> scratch(shape, arena);
  return arena.used();
}

/// Offset of value column j in a state matrix.
constexpr int64_t column_offset(int64_t j, int64_t dims, bool v_first) { return v_first ? j * dims : j; }

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace remora::REMORA_CPU_ISA
