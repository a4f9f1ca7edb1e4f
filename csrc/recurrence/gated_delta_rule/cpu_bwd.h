// Backward pass of one key head, with all its value heads, over one sequence.
//
// Intervals of kStateInterval tokens from right to left: the states entering every chunk of the interval are computed
// again from the saved one, then its chunks are walked back with dS, the gradient of the state that leaves them.
// Sums over the value heads of a key head run in the order of the heads.
//
// dS depends on no state. Where heads are too few for the threads, it is walked alone first, a quarter of the work and
// independent in every column, and kept where the sequence is cut; then the parts between the cuts are independent,
// too, and give the bits of the whole.
#pragma once
#include <algorithm>

#include "recurrence/gated_delta_rule/cpu.h"
#include "recurrence/gated_delta_rule/cpu_chunk.h"

namespace remora::REMORA_CPU_ISA {

constexpr int64_t kChunksPerInterval = kStateInterval / kChunk;

template <class Op, class E>
struct BwdScratch {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  using Row = typename Op::Row;

  KeyChunk<Op>* keys;        // [chunks of an interval]
  ValueChunk<T>* values;     // [chunks]
  T* residual;               // [chunks][kChunk][columns]
  Word* states;              // [chunks] transposed states entering the chunk
  T* state_values;           // [chunks] panels of the same, unrounded
  Word* d_state_transposed;  // dS leaving the chunk, transposed
  T *state, *d_state;        // panels; d_state of every value head of the group
  Word *state_packed, *d_state_packed;
  T *dq, *dk;             // [kStateInterval][padded]
  T *q_rows, *k_rows;     // [kChunk][padded] of the current chunk
  Row *dv_rows, *u_rows;  // [kChunk][columns]
  Word *d_o, *dv, *u;     // operands of the above and of the output's gradient, summed over the columns
  E* copy;
  Row* row_copy;

  BwdScratch(const RecurrenceShape& shape, Arena& arena) {
    const int64_t padded = pad(shape.head_dim), columns = pad(shape.value_dim);
    const int64_t group = shape.num_value_heads / shape.num_heads;
    const int64_t state_words = words<Op>(padded) * columns;
    keys = arena.take<KeyChunk<Op>>(kChunksPerInterval);
    for (int64_t c = 0; c < kChunksPerInterval; ++c) {
      KeyChunk<Op> counted;
      (keys ? keys[c] : counted).take(arena, padded);
    }
    values = arena.take<ValueChunk<T>>(kChunksPerInterval);
    residual = arena.take<T>(kStateInterval * columns);
    states = arena.take<Word>(kChunksPerInterval * state_words);
    state_values = arena.take<T>(kChunksPerInterval * padded * columns);
    d_state_transposed = arena.take<Word>(state_words);
    state = arena.take<T>(padded * columns);
    d_state = arena.take<T>(group * padded * columns);
    state_packed = arena.take<Word>(Panel<Op>::packed_size(padded, columns));
    d_state_packed = arena.take<Word>(group * Panel<Op>::packed_size(padded, columns));
    dq = arena.take<T>(kStateInterval * padded);
    dk = arena.take<T>(kStateInterval * padded);
    q_rows = arena.take<T>(kChunk * padded);
    k_rows = arena.take<T>(kChunk * padded);
    dv_rows = arena.take<Row>(kChunk * columns);
    u_rows = arena.take<Row>(kChunk * columns);
    d_o = arena.take<Word>(words<Op>(columns) * kChunk);
    dv = arena.take<Word>(words<Op>(columns) * kChunk);
    u = arena.take<Word>(words<Op>(columns) * kChunk);
    copy = arena.take<E>(max(operand_copy_size(shape.head_dim), operand_copy_size(shape.value_dim)));
    row_copy = arena.take<Row>(operand_copy_size(shape.value_dim));
  }
};

template <class Op, class E>
int64_t bwd_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  BwdScratch<Op, E> scratch(shape, arena);
  return arena.used();
}

/// Panels of key features from panels of value columns: out [padded / width][columns / kPack][width].
template <class Op>
REMORA_INLINE void transpose_state(typename Op::Word* out, const typename Op::Real* state, int64_t padded,
                                   int64_t columns) {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  constexpr int w = kWidth<T>;
  const int64_t rows = words<Op>(columns);
  for (int64_t k = 0; k < padded; k += w) {
    for (int64_t j = 0; j < rows; j += w) {
      Vec<Word> block[w];
      unroll<w>([&](auto i) REMORA_ALWAYS_INLINE {
        const int64_t tile = j * Op::kPack / w;
        const T* source = state + (tile * padded + k + i) * w;
        if constexpr (Op::kPack == 1) {
          block[i] = load<T>(source);
        } else {
          block[i] = Op::pack_neighbours(load<T>(source), rows - j < w ? Vec<T>{} : load<T>(source + padded * w));
        }
      });
      transpose(block);
      const int64_t at = k / w * rows + j;
      const auto put = [&](auto i) REMORA_ALWAYS_INLINE { store<Word>(out + (at + i) * w, block[i]); };
      if (rows - j < w) {
        unroll<w / 2>(put);
      } else {
        unroll<w>(put);
      }
    }
  }
}

/// Sum of products of two states of n elements. It is one number for all gates of a chunk: errors of rounded operands
/// would not average out over the tokens.
template <class T>
REMORA_INLINE T state_product(const T* x, const T* y, int64_t n) {
  constexpr int w = kWidth<T>;
  Vec<T> dot[4] = {};
  for (int64_t i = 0; i < n; i += 4 * w) {
    unroll<4>([&](auto d) REMORA_ALWAYS_INLINE { dot[d] += load<T>(x + i + d * w) * load<T>(y + i + d * w); });
  }
  return sum<T>((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

/// out[i] = sum of the lanes of row i.
template <class T>
REMORA_INLINE void sum_chunk_rows(T* out, const T* rows) {
  constexpr int w = kWidth<T>;
  for (int i = 0; i < kChunk; i += w) {
    Vec<T> block[w];
    unroll<w>([&](auto r) REMORA_ALWAYS_INLINE { block[r] = load<T>(rows + (i + r) * w); });
    store<T>(out + i, sum_rows(block));
  }
}

/// Walks dS of one panel back over a chunk: on entry it leaves the chunk, on return it enters it. Calls
/// solved(j, d_u, d_v) with the gradients of u_j and v_j, from the last token to the first.
template <class Op, class E, class Solved>
REMORA_INLINE void walk_back(const KeyChunk<Op>& key, const ValueChunk<typename Op::Real>& value,
                             const Panel<Op>& d_state, int64_t padded, const Tile<E>& d_o, const Solved& solved) {
  using T = typename Op::Real;
  Vec<T> x[kChunk];
  multiply_panel<Op>(x, key.k, d_state, padded);
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { x[i] *= value.k_write[i]; });
  unroll<kChunk>([&](auto j) REMORA_ALWAYS_INLINE {
    const Vec<T> row = load<T>(d_o.row[j]);
    unroll<j + 1>([&](auto i) REMORA_ALWAYS_INLINE { x[i] += row * value.attn[j * kChunk + i]; });
  });
  unroll<kChunk>([&](auto step) REMORA_ALWAYS_INLINE {
    constexpr int j = kChunk - 1 - step;
    const Vec<T> d_u = x[j];
    x[j] *= value.beta[j];
    unroll<j>([&](auto i) REMORA_ALWAYS_INLINE { x[i] -= x[j] * value.lower[j * kChunk + i]; });
    solved(std::integral_constant<int, j>{}, d_u, x[j]);
  });
  Vec<T> u[2][kChunk];
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    u[0][i] = load<T>(d_o.row[i]) * value.q_read[i];
    u[1][i] = x[i] * -value.k_read[i];
  });
  rank_update<Op, 2>(d_state, padded, value.total, {key.q_pairs(), key.k_pairs()}, u);
}

/// The same, keeping what the rest of the backward pass reads: dv, u, and the sums of dbeta.
template <class Op, class E>
REMORA_INLINE void bwd_columns(const KeyChunk<Op>& key, const ValueChunk<typename Op::Real>& value,
                               const Panel<Op>& d_state, int64_t padded, const Tile<E>& d_o,
                               const typename Op::Real* residual, int64_t stride, typename Op::Row* dv_rows,
                               typename Op::Row* u_rows, typename Op::Real* d_beta, const OutputTile<E>& dv) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  walk_back<Op>(key, value, d_state, padded, d_o, [&](auto j, Vec<T> d_u, Vec<T> d_v) REMORA_ALWAYS_INLINE {
    const Vec<T> r = load<T>(residual + j * stride);
    store<T>(d_beta + j * w, load<T>(d_beta + j * w) + d_u * r);
    dv.template store_row<T>(j, d_v);
    store<T>(dv_rows + j * stride, d_v);
    store<T>(u_rows + j * stride, r * value.beta[j]);
  });
}

/// Coefficients of the tokens' own products; only i >= j (k_by_*: i > j) is filled in and read.
template <class T>
struct PairGradients {
  alignas(64) T q_by_k[kChunk * kChunk];        // of k_j in dq_i
  alignas(64) T k_by_q[kChunk * kChunk];        // of q_i in dk_j
  alignas(64) T k_by_earlier[kChunk * kChunk];  // of k_j in dk_i
  alignas(64) T k_by_later[kChunk * kChunk];    // of k_i in dk_j
  alignas(64) T gate[kChunk * kChunk];          // d loss / d (G_i - G_j)
};

/// From the products d_o_i . u_j and dv_i . u_j.
template <class Op, class T = typename Op::Real>
REMORA_INLINE void make_pair_gradients(PairGradients<T>& pair, const KeyChunk<Op>& key, const ValueChunk<T>& value,
                                       const T* d_o_u, const T* dv_u, T scale) {
  for (int i = 0; i < kChunk; ++i) {
    for (int j = 0; j < kChunk; j += kWidth<T>) {
      const int at = i * kChunk + j;
      const Vec<T> du = load<T>(d_o_u + at), dr = load<T>(dv_u + at), decay = load<T>(value.decay + at);
      const Vec<T> norm = load<T>(key.k_norm + j);
      const Vec<T> attn = du * decay * scale, lower = -dr * decay;
      store<T>(pair.q_by_k + at, attn * norm);
      store<T>(pair.k_by_q + at, attn * key.q_norm[i]);
      store<T>(pair.k_by_earlier + at, lower * norm);
      store<T>(pair.k_by_later + at, lower * key.k_norm[i]);
      store<T>(pair.gate + at, du * load<T>(value.attn + at) - dr * load<T>(value.lower + at));
    }
  }
}

/// dg_t: pairs j < t <= i, reads of the chunk's first state at i >= t, writes at j < t into its last, and the state
/// that passes through. Every term carries exactly the decay it depends on, so nothing cancels.
template <class T>
REMORA_INLINE void gate_gradient(T* dg, int64_t value_heads, const ChunkRows<kChunk>& rows, int64_t tokens,
                                 const T* pairs, const T* reads, const T* writes, T through) {
  T column[kChunk] = {};  // sum over i >= t of pairs[i][j]
  T before[kChunk];       // sum over j < t of writes
  T sum = through;
  for (int t = 0; t < kChunk; ++t) {
    before[t] = sum;
    sum += writes[t];
  }
  T after = 0;
  for (int t = kChunk - 1; t >= 0; --t) {
    after += reads[t];
    T rectangle = 0;
    for (int j = 0; j < t; ++j) {
      column[j] += pairs[t * kChunk + j];
      rectangle += column[j];
    }
    if (t < tokens) dg[rows.at[t].row * value_heads] = rectangle + after + before[t];
  }
}

/// Adds (or assigns, if `first`) dq and dk of one panel of key features, before the gradient of the norms, and adds its
/// part of the sums that the gate's gradient needs. `state` enters the chunk, `d_state` leaves it, both transposed.
template <class Op, class T = typename Op::Real>
REMORA_INLINE void bwd_features(const ValueChunk<T>& value, const PairGradients<T>& pair, const typename Op::Word* d_o,
                                const typename Op::Word* dv, const typename Op::Word* u, const typename Op::Word* state,
                                const typename Op::Word* d_state, int64_t columns, const T* q_rows, const T* k_rows,
                                T* dq, T* dk, int64_t stride, T* reads, T* writes, T scale, bool first) {
  constexpr int w = kWidth<T>;
  alignas(64) T partial[kChunk * w];
  const int64_t n = words<Op>(columns);
  Vec<T> acc[kChunk];

  multiply<Op>(acc, d_o, state, w, n);
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    const Vec<T> read = acc[i] * load<T>(q_rows + i * stride) * value.q_read[i];
    store<T>(reads + i * w, load<T>(reads + i * w) + read);
    acc[i] *= scale * value.from_start[i];
  });
  unroll<kChunk>([&](auto j) REMORA_ALWAYS_INLINE {
    const Vec<T> k = load<T>(k_rows + j * stride);
    unroll<kChunk - j>([&](auto d) REMORA_ALWAYS_INLINE { acc[j + d] += k * pair.q_by_k[(j + d) * kChunk + j]; });
  });
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    store<T>(dq + i * stride, first ? acc[i] : load<T>(dq + i * stride) + acc[i]);
  });

  multiply<Op>(acc, dv, state, w, n);
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    const Vec<T> read = acc[i] * load<T>(k_rows + i * stride) * value.k_read[i];
    store<T>(reads + i * w, load<T>(reads + i * w) - read);
    store<T>(partial + i * w, acc[i] * -value.from_start[i]);
  });

  multiply<Op>(acc, u, d_state, w, n);
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    const Vec<T> write = acc[i] * load<T>(k_rows + i * stride) * value.k_write[i];
    store<T>(writes + i * w, load<T>(writes + i * w) + write);
    acc[i] = acc[i] * value.to_end[i] + load<T>(partial + i * w);
  });
  unroll<kChunk>([&](auto j) REMORA_ALWAYS_INLINE {
    const Vec<T> k = load<T>(k_rows + j * stride);
    unroll<j>([&](auto i) REMORA_ALWAYS_INLINE { acc[i] += k * pair.k_by_later[j * kChunk + i]; });
    unroll<kChunk - 1 - j>(
        [&](auto d) REMORA_ALWAYS_INLINE { acc[j + 1 + d] += k * pair.k_by_earlier[(j + 1 + d) * kChunk + j]; });
    const Vec<T> q = load<T>(q_rows + j * stride);
    unroll<j + 1>([&](auto i) REMORA_ALWAYS_INLINE { acc[i] += q * pair.k_by_q[j * kChunk + i]; });
  });
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    store<T>(dk + i * stride, first ? acc[i] : load<T>(dk + i * stride) + acc[i]);
  });
}

/// Strides of d_o [B, T, HV, V].
constexpr TokenStrides output_stride(const RecurrenceShape& shape) {
  const int64_t token = shape.num_value_heads * shape.value_dim;
  return {shape.seqlen * token, token, shape.value_dim};
}

/// Zero-padded rows of a chunk in T.
template <class T, class E>
REMORA_INLINE void load_rows(T* rows, const Tile<E>& data, int64_t tokens, int64_t dims) {
  constexpr int w = kWidth<T>;
  const int64_t padded = pad(dims);
  for (int64_t i = 0; i < kChunk; ++i) {
    for (int64_t d = 0; d < padded; d += w) {
      Vec<T> row{};
      if (i < tokens && d < dims) {
        const E* p = data.row[i] + d;
        row = dims - d >= w ? load<T>(p) : load_first<T>(p, dims - d);
      }
      store<T>(rows + i * padded + d, row);
    }
  }
}

/// dx = norm (dy - y <dy, y>) for y = norm x, from zero-padded rows of dy and x; dx = dy without a norm.
template <class T, class E>
REMORA_INLINE void store_gradient(E* out, const T* gradient, const T* x, T norm, int64_t dims, bool use_l2norm) {
  constexpr int w = kWidth<T>;
  T along = 0;
  if (use_l2norm) {
    Vec<T> dot{};
    for (int64_t d = 0; d < dims; d += w) dot += load<T>(x + d) * load<T>(gradient + d);
    along = sum<T>(dot) * norm * norm;
  }
  for (int64_t d = 0; d < dims; d += w) {
    Vec<T> y = load<T>(gradient + d);
    if (use_l2norm) y = (y - load<T>(x + d) * along) * norm;
    if (dims - d >= w) {
      store<T>(out + d, y);
    } else {
      store_first<T>(out + d, y, dims - d);
    }
  }
}

/// dS at every cut, for some columns of one value head.
template <class Op, class E>
void bwd_cuts(const GatedDeltaRuleBwdParams& p, const RecurrenceSequence& sequence, int64_t value_head,
              GatedDeltaRuleColumns part, int64_t parts, void* d_states, void* buffer) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, columns = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t padded = pad(dims), head = value_head / (value_heads / shape.num_heads);
  const int64_t first_tile = part.begin * kGatedDeltaRuleColumns / w;
  const int64_t end_tile = min(part.end * kGatedDeltaRuleColumns / w, (columns + w - 1) / w);

  Arena arena(buffer);
  WalkScratch<Op, E> scratch(shape, arena);
  KeyChunk<Op>& key = *scratch.key;
  ValueChunk<T>& value = *scratch.value;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t j = tile * w;
    const T* d_final = static_cast<const T*>(p.d_final_state);
    if (d_final) {
      d_final += (sequence.index * value_heads + value_head) * dims * columns + column_offset(j, dims, p.state_v_first);
    }
    load_panel(scratch.panel(tile, padded), d_final, dims, columns, min(w, columns - j), p.state_v_first);
  }

  const int64_t intervals = (sequence.length + kStateInterval - 1) / kStateInterval;
  int64_t end = sequence.length;
  for (int64_t cut = parts - 2; cut >= 0; --cut) {
    const int64_t begin = GatedDeltaRulePart{cut, parts}.end(intervals) * kStateInterval;
    for (int64_t t = begin + (end - begin - 1) / kChunk * kChunk; t >= begin; t -= kChunk) {
      const int64_t tokens = min(kChunk, end - t);
      const ChunkRows<kChunk> rows(shape, sequence, t, tokens);
      make_key_chunk<Op>(key, head_tile<E>(p.q, p.q_stride, head, rows), head_tile<E>(p.k, p.k_stride, head, rows),
                         tokens, dims, p.use_qk_l2norm, scratch.copy);
      make_value_chunk<Op>(value, key, p.g ? static_cast<const T*>(p.g) + value_head : nullptr,
                           static_cast<const T*>(p.beta) + value_head, value_heads, rows, tokens,
                           static_cast<T>(p.scale));
      const Tile<E> d_o = head_tile<E>(p.d_o, output_stride(shape), value_head, rows);
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        E copy[kChunk * w];
        const Tile<E> d_o_tile = whole_tile(d_o.columns_from(tile * w), tokens, min(w, columns - tile * w), w, copy);
        walk_back<Op>(key, value, scratch.panel(tile, padded), padded, d_o_tile,
                      [](auto, Vec<T>, Vec<T>) REMORA_ALWAYS_INLINE {});
      }
    }
    T* d_state = static_cast<T*>(d_states) + (cut * value_heads + value_head) * dims * columns;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      store_panel(scratch.panel(tile, padded), d_state + tile * w, dims, columns, min(w, columns - tile * w), false);
    }
    end = begin;
  }
}

template <class Op, class E, class Saved>
void bwd(const GatedDeltaRuleBwdParams& p, const RecurrenceSequence& sequence, int64_t head, GatedDeltaRulePart part,
         const void* d_state_behind, void* buffer) {
  using T = typename Op::Real;
  using Row = typename Op::Row;
  constexpr int w = kWidth<T>;
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, columns = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t group = value_heads / shape.num_heads;
  const int64_t padded = pad(dims), padded_columns = pad(columns), tiles = padded_columns / w;
  const int64_t state_words = words<Op>(padded) * padded_columns, state_size = padded * padded_columns;
  const T scale = static_cast<T>(p.scale);

  Arena arena(buffer);
  BwdScratch<Op, E> scratch(shape, arena);
  const auto d_state_panel = [&](int64_t r, int64_t tile) REMORA_ALWAYS_INLINE {
    return Panel<Op>::of(scratch.d_state + r * state_size,
                         scratch.d_state_packed + r * Panel<Op>::packed_size(padded, padded_columns), tile, padded);
  };

  const bool is_last = part.index + 1 == part.count;
  const bool v_first = is_last && p.state_v_first;
  for (int64_t r = 0; r < group; ++r) {
    const int64_t value_head = head * group + r;
    const T* d_state = static_cast<const T*>(is_last ? p.d_final_state : d_state_behind);
    if (d_state) d_state += ((is_last ? sequence.index * value_heads : 0) + value_head) * dims * columns;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j = tile * w, lanes = max(0, min(w, columns - j));
      load_panel(d_state_panel(r, tile), d_state && lanes > 0 ? d_state + column_offset(j, dims, v_first) : nullptr,
                 dims, columns, lanes, v_first);
    }
  }

  const int64_t intervals = (sequence.length + kStateInterval - 1) / kStateInterval;
  for (int64_t interval = part.end(intervals) - 1; interval >= part.begin(intervals); --interval) {
    const int64_t start = interval * kStateInterval;
    const int64_t interval_tokens = min(kStateInterval, sequence.length - start);
    const int64_t chunks = (interval_tokens + kChunk - 1) / kChunk;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t tokens = min(kChunk, interval_tokens - c * kChunk);
      const ChunkRows<kChunk> rows(shape, sequence, start + c * kChunk, tokens);
      make_key_chunk<Op>(scratch.keys[c], head_tile<E>(p.q, p.q_stride, head, rows),
                         head_tile<E>(p.k, p.k_stride, head, rows), tokens, dims, p.use_qk_l2norm, scratch.copy);
    }

    for (int64_t r = 0; r < group; ++r) {
      const int64_t value_head = head * group + r;

      // A sequence begins with the state itself: what rounding took away would last as long as nothing decays.
      const bool initial = interval == 0 && p.initial_state;
      const T* initial_state =
          static_cast<const T*>(p.initial_state) + (sequence.index * value_heads + value_head) * dims * columns;
      const int64_t slot = sequence.first_slot() + interval;
      const Saved* saved =
          static_cast<const Saved*>(p.saved_states) + (slot * value_heads + value_head) * dims * columns;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t j = tile * w, lanes = max(0, min(w, columns - j));
        const Panel<Op> panel = Panel<Op>::of(scratch.state, scratch.state_packed, tile, padded);
        if (initial && lanes > 0) {
          load_panel(panel, initial_state + column_offset(j, dims, p.state_v_first), dims, columns, lanes,
                     p.state_v_first);
        } else {
          load_panel(panel, lanes > 0 ? saved + j : nullptr, dims, columns, lanes, false);
        }
      }

      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t t = start + c * kChunk, tokens = min(kChunk, sequence.length - t);
        const ChunkRows<kChunk> rows(shape, sequence, t, tokens);
        const Tile<E> v_rows = head_tile<E>(p.v, p.v_stride, value_head, rows);
        const KeyChunk<Op>& key = scratch.keys[c];
        ValueChunk<T>& value = scratch.values[c];
        make_value_chunk<Op>(value, key, p.g ? static_cast<const T*>(p.g) + value_head : nullptr,
                             static_cast<const T*>(p.beta) + value_head, value_heads, rows, tokens, scale);
        transpose_state<Op>(scratch.states + c * state_words, scratch.state, padded, padded_columns);
        if (p.dg) std::copy_n(scratch.state, state_size, scratch.state_values + c * state_size);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t j = tile * w, lanes = max(0, min(w, columns - j));
          E copy[kChunk * w];
          const Tile<E> v_tile = whole_tile(v_rows.columns_from(j), tokens, lanes, w, copy);
          const Panel<Op> state = Panel<Op>::of(scratch.state, scratch.state_packed, tile, padded);
          Vec<T> u[1][kChunk];
          solve_tile<Op>(u[0], key, value, state, padded, v_tile, scratch.residual + c * kChunk * padded_columns + j,
                         padded_columns);
          if (c + 1 < chunks) write_tile<Op>(u, key, value, state, padded);
        }
      }

      for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t t = start + c * kChunk, tokens = min(kChunk, sequence.length - t);
        const ChunkRows<kChunk> rows(shape, sequence, t, tokens);
        const KeyChunk<Op>& key = scratch.keys[c];
        const ValueChunk<T>& value = scratch.values[c];
        const T* residual = scratch.residual + c * kChunk * padded_columns;
        alignas(64) T lanes_beta[kChunk * w] = {}, lanes_reads[kChunk * w] = {}, lanes_writes[kChunk * w] = {};

        // While this chunk is walked, the rows of the next one and of its counterpart in the next interval arrive.
        for (int64_t i = 0; i < kChunk; ++i) {
          const int64_t next = t - kChunk + i, later = t - kStateInterval + i;
          if (next >= 0) {
            const int64_t row = sequence.at(shape, next).row * value_heads + value_head;
            prefetch_row(static_cast<const E*>(p.d_o) + row * columns, columns);
          }
          if (later < 0) continue;
          const TokenRow row = sequence.at(shape, later);
          prefetch_row(static_cast<const E*>(p.v) + row.offset(p.v_stride) + value_head * p.v_stride.head, columns);
          if (r > 0) continue;
          prefetch_row(static_cast<const E*>(p.q) + row.offset(p.q_stride) + head * p.q_stride.head, dims);
          prefetch_row(static_cast<const E*>(p.k) + row.offset(p.k_stride) + head * p.k_stride.head, dims);
        }

        const T* d_state = scratch.d_state + r * state_size;
        transpose_state<Op>(scratch.d_state_transposed, d_state, padded, padded_columns);
        const T through =
            p.dg ? value.total * state_product<T>(scratch.state_values + c * state_size, d_state, state_size) : T(0);
        const Tile<E> d_o = head_tile<E>(p.d_o, output_stride(shape), value_head, rows);
        load_operand<Op>(scratch.d_o, d_o, tokens, columns, scratch.copy);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t j = tile * w, lanes = max(0, min(w, columns - j));
          E copy[kChunk * w];
          const Tile<E> d_o_tile = whole_tile(d_o.columns_from(j), tokens, lanes, w, copy);
          const OutputTile<E> dv_tile{static_cast<E*>(p.dv) + value_head * columns + j, value_heads * columns, rows,
                                      tokens, lanes};
          bwd_columns<Op>(key, value, d_state_panel(r, tile), padded, d_o_tile, residual + j, padded_columns,
                          scratch.dv_rows + j, scratch.u_rows + j, lanes_beta, dv_tile);
        }
        load_operand<Op>(scratch.dv, strided_tile<Row>(scratch.dv_rows, padded_columns), kChunk, padded_columns,
                         scratch.row_copy);
        load_operand<Op>(scratch.u, strided_tile<Row>(scratch.u_rows, padded_columns), kChunk, padded_columns,
                         scratch.row_copy);

        alignas(64) T d_o_u[kChunk * kChunk], dv_u[kChunk * kChunk];
        multiply_tokens<Op>(d_o_u, scratch.d_o, scratch.u, words<Op>(padded_columns));
        multiply_tokens<Op>(dv_u, scratch.dv, scratch.u, words<Op>(padded_columns));
        PairGradients<T> pair;
        make_pair_gradients<Op>(pair, key, value, d_o_u, dv_u, scale);

        load_rows(scratch.q_rows, head_tile<E>(p.q, p.q_stride, head, rows), tokens, dims);
        load_rows(scratch.k_rows, head_tile<E>(p.k, p.k_stride, head, rows), tokens, dims);
        T* dq = scratch.dq + c * kChunk * padded;
        T* dk = scratch.dk + c * kChunk * padded;
        for (int64_t d = 0; d < padded; d += w) {
          const int64_t panel = d * words<Op>(padded_columns);
          bwd_features<Op>(value, pair, scratch.d_o, scratch.dv, scratch.u, scratch.states + c * state_words + panel,
                           scratch.d_state_transposed + panel, padded_columns, scratch.q_rows + d, scratch.k_rows + d,
                           dq + d, dk + d, padded, lanes_reads, lanes_writes, scale, r == 0);
        }

        if (r + 1 == group) {
          for (int64_t i = 0; i < tokens; ++i) {
            const int64_t at = (rows.at[i].row * shape.num_heads + head) * dims;
            store_gradient(static_cast<E*>(p.dq) + at, dq + i * padded, scratch.q_rows + i * padded, key.q_norm[i],
                           dims, p.use_qk_l2norm);
            store_gradient(static_cast<E*>(p.dk) + at, dk + i * padded, scratch.k_rows + i * padded, key.k_norm[i],
                           dims, p.use_qk_l2norm);
          }
        }

        alignas(64) T d_beta[kChunk], reads[kChunk], writes[kChunk];
        sum_chunk_rows(d_beta, lanes_beta);
        T* d_beta_out = static_cast<T*>(p.dbeta) + value_head;
        for (int64_t i = 0; i < tokens; ++i) d_beta_out[rows.at[i].row * value_heads] = d_beta[i];
        if (!p.dg) continue;
        sum_chunk_rows(reads, lanes_reads);
        sum_chunk_rows(writes, lanes_writes);
        gate_gradient(static_cast<T*>(p.dg) + value_head, value_heads, rows, tokens, pair.gate, reads, writes, through);
      }
    }
  }

  if (!p.d_initial_state || part.index > 0) return;
  for (int64_t r = 0; r < group; ++r) {
    T* d_initial =
        static_cast<T*>(p.d_initial_state) + (sequence.index * value_heads + head * group + r) * dims * columns;
    for (int64_t j = 0; j < columns; j += w) {
      store_panel(d_state_panel(r, j / w), d_initial + column_offset(j, dims, p.state_v_first), dims, columns,
                  min(w, columns - j), p.state_v_first);
    }
  }
}

}  // namespace remora::REMORA_CPU_ISA
