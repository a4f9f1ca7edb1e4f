// The walks over features of K: dq in forward direction with x = k, dk in reverse with x = q, and the gate's gradient.
//
// Intervals of kStateInterval tokens from right to left. In each, a panel of S is walked forward from the saved state,
// which gives dq and leaves the states between the chunks; then a panel of dS is walked back, which gives dk. Sums over
// the value heads of a key head run in the order of the heads, those over features in units of K.
#pragma once
#include "recurrence/simple_gla/cpu_values.h"

namespace remora::REMORA_CPU_ISA::simple_gla {

template <class T>
struct KeysScratch {
  T* d_state;                   // [group][panels][panel_rows(V)][2 width]
  T* states;                    // [kChunks] panels that enter the chunks
  T *q, *k, *v, *d_o;           // rows of an interval
  T *dq, *dk;                   // sums of a group over rows of the part's features
  Gates<T>* gates;              // [kChunks]
  T *pairs, *gate_pairs;        // [kChunks][kTokens][kTokens]
  T *lanes_read, *lanes_write;  // [kStateInterval][width] of a unit of K

  KeysScratch(const RecurrenceShape& shape, Arena& arena) {
    const int64_t group = shape.num_value_heads / shape.num_heads, panel_size = panel_rows(shape.value_dim) * kPanel<T>;
    d_state = arena.take<T>(group * panel_rows(shape.value_dim) * padded_columns(shape.head_dim));
    states = arena.take<T>(kChunks * panel_size);
    for (T** rows : {&q, &k, &dq, &dk}) *rows = arena.take<T>(kStateInterval * row_stride(shape.head_dim));
    for (T** rows : {&v, &d_o}) *rows = arena.take<T>(kStateInterval * row_stride(shape.value_dim));
    gates = arena.take<Gates<T>>(kChunks);
    pairs = arena.take<T>(kChunks * kTokens * kTokens);
    gate_pairs = arena.take<T>(kChunks * kTokens * kTokens);
    lanes_read = arena.take<T>(kStateInterval * kWidth<T>);
    lanes_write = arena.take<T>(kStateInterval * kWidth<T>);
  }
};

template <class T>
int64_t keys_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  KeysScratch<T> scratch(shape, arena);
  return arena.used();
}

/// Writes rows of gradients to the tokens of an interval.
template <class T, class E>
inline void store_rows(E* out, int64_t out_stride, const Rows<T>& rows, const TokenRow* tokens, int64_t num_tokens,
                       int64_t columns) {
  for (int64_t i = 0; i < num_tokens; ++i) {
    for (int64_t d = 0; d < columns; d += kPanel<T>) {
      const Vec<T> both[2] = {load<T>(rows[i] + d), load<T>(rows[i] + d + kWidth<T>)};
      store_lanes<T>(out + tokens[i].row * out_stride + d, both, columns - d);
    }
  }
}

template <class T, class E, class Saved>
void bwd_keys(const SimpleGlaBwdParams& p, const RecurrenceSequence& sequence, int64_t head, SimpleGlaUnits part,
              void* buffer) {
  constexpr int w = kWidth<T>;
  constexpr int64_t panels_per_unit = kSimpleGlaUnit / kPanel<T>;
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, value_dim = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t group = value_heads / shape.num_heads, state_size = dims * value_dim;
  const int64_t panel_size = panel_rows(value_dim) * kPanel<T>;
  const Columns features(part, dims);
  const int64_t panels = (features.count + kPanel<T> - 1) / kPanel<T>;
  const int64_t stride_d = p.state_v_first ? dims : 1, stride_x = p.state_v_first ? 1 : value_dim;
  const TokenStrides o_stride{shape.seqlen * value_heads * value_dim, value_heads * value_dim, value_dim};
  const int64_t out_stride = shape.num_heads * dims;
  const T scale = static_cast<T>(p.scale);
  const auto lanes_of = [&](int64_t panel) { return features.count - panel * kPanel<T>; };
  const auto feature_of = [&](int64_t panel) { return features.first + panel * kPanel<T>; };

  Arena arena(buffer);
  KeysScratch<T> scratch(shape, arena);
  const Rows<T> dq{scratch.dq, row_stride(dims)}, dk{scratch.dk, row_stride(dims)};

  const auto d_state_of = [&](int64_t r, int64_t panel) { return scratch.d_state + (r * panels + panel) * panel_size; };
  for (int64_t r = 0; r < group; ++r) {
    const int64_t state = (sequence.index * value_heads + head * group + r) * state_size;
    for (int64_t n = 0; n < panels; ++n) {
      load_panel(d_state_of(r, n), offset_or_null<T>(p.d_final_state, state + feature_of(n) * stride_x), value_dim,
                 lanes_of(n), stride_d, stride_x);
    }
  }

  const HeadTensor<E> q_tensor(p.q, p.q_stride, head, 0, dims), k_tensor(p.k, p.k_stride, head, 0, dims);
  const int64_t intervals = (sequence.length + kStateInterval - 1) / kStateInterval;
  for (int64_t interval = intervals - 1; interval >= 0; --interval) {
    const int64_t start = interval * kStateInterval, tokens = min(kStateInterval, sequence.length - start);
    const int64_t chunks = (tokens + kTokens - 1) / kTokens;
    const auto tokens_of = [&](int64_t c) { return min(kTokens, tokens - c * kTokens); };
    const ChunkRows<kStateInterval> rows(shape, sequence, start, tokens);
    const Rows<T> q = load_rows(scratch.q, q_tensor, rows.at, tokens);
    const Rows<T> k = load_rows(scratch.k, k_tensor, rows.at, tokens);

    for (int64_t r = 0; r < group; ++r) {
      const int64_t value_head = head * group + r;
      const HeadTensor<E> v_tensor(p.v, p.v_stride, value_head, 0, value_dim);
      const HeadTensor<E> d_o_tensor(p.d_o, o_stride, value_head, 0, value_dim);
      const Rows<T> v = load_rows(scratch.v, v_tensor, rows.at, tokens);
      const Rows<T> d_o = load_rows(scratch.d_o, d_o_tensor, rows.at, tokens);
      const bool has_pairs = p.dg && part.begin == 0;  // the first unit's share of dg has those of all features
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t t = c * kTokens, at = t * kTokens;
        make_chunk_decay(scratch.gates[c], offset_or_null<T>(p.g, value_head), value_heads, rows.at + t, tokens_of(c));
        make_pairs(scratch.pairs + at, scratch.gates[c], d_o.from(t, 0), v.from(t, 0), padded_columns(value_dim),
                   tokens_of(c), scale);
        if (!has_pairs) continue;
        for (int i = 0; i < kTokens * kTokens; ++i) scratch.gate_pairs[at + i] = T(0);
        multiply_tokens(scratch.gate_pairs + at, q.from(t, 0), k.from(t, 0), padded_columns(dims), tokens_of(c));
        for (int64_t i = at; i < at + kTokens * kTokens; i += w) {
          store<T>(scratch.gate_pairs + i, load<T>(scratch.gate_pairs + i) * load<T>(scratch.pairs + i));
        }
      }

      T through[kChunks];
      for (int64_t n = 0; n < panels; ++n) {
        // The rows that come next are asked for late: with them, those of this interval would not stay in L2.
        const int64_t late_panels = max(1, panels / 4), late = n - (panels - late_panels);
        const int64_t next = start - kStateInterval;
        for (const HeadTensor<E>* tensor : {&v_tensor, &d_o_tensor, &q_tensor, &k_tensor}) {
          if (late < 0) break;
          prefetch_rows(*tensor, shape, sequence, next + kStateInterval * late / late_panels,
                        next + kStateInterval * (late + 1) / late_panels);
        }
        if (n % panels_per_unit == 0) {
          for (int64_t i = 0; i < kStateInterval * w; ++i) scratch.lanes_read[i] = scratch.lanes_write[i] = T(0);
          for (T& product : through) product = T(0);
        }

        // A sequence begins with the state itself: what rounding took away would last as long as nothing decays.
        if (interval == 0 && p.initial_state) {
          const int64_t state = (sequence.index * value_heads + value_head) * state_size;
          load_panel(scratch.states, static_cast<const T*>(p.initial_state) + state + feature_of(n) * stride_x,
                     value_dim, lanes_of(n), stride_d, stride_x);
        } else {
          const int64_t slot = (sequence.first_slot() + interval) * value_heads + value_head;
          load_panel(scratch.states,
                     static_cast<const Saved*>(p.saved_states) + slot * state_size + feature_of(n) * value_dim,
                     value_dim, lanes_of(n), 1, value_dim);
        }
        const int64_t column = n * kPanel<T>;
        const auto put = [&](void* out, const Rows<T>& sums, int64_t t, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE {
          if (group == 1) {
            E* row = static_cast<E*>(out) + rows.at[t].row * out_stride + head * dims + feature_of(n);
            if (t < tokens) store_lanes<T>(row, acc, lanes_of(n));
            return;
          }
          T* row = const_cast<T*>(sums[t]) + column;
          store<T>(row, r == 0 ? acc[0] : load<T>(row) + acc[0]);
          store<T>(row + w, r == 0 ? acc[1] : load<T>(row + w) + acc[1]);
        };
        const auto dot = [&](T* lanes, const T* row, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE {
          store<T>(lanes, load<T>(lanes) + (load<T>(row) * acc[0] + load<T>(row + w) * acc[1]));
        };
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t t = c * kTokens;
          T* state = scratch.states + c * panel_size;
          walk_chunk<false>(
              c + 1 < chunks ? state + panel_size : nullptr, state, value_dim, v.from(t, 0), d_o.from(t, 0),
              k.from(t, feature_of(n)), scratch.gates[c], scratch.pairs + t * kTokens, scale, tokens_of(c),
              [&](int64_t i, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE {
                if (p.dg) dot(scratch.lanes_read + (t + i) * w, q[t + i] + feature_of(n), acc);
              },
              [&](int64_t i, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE { put(p.dq, dq, t + i, acc); });
        }
        T* d_state = d_state_of(r, n);
        for (int64_t c = chunks - 1; c >= 0; --c) {
          const int64_t t = c * kTokens;
          if (p.dg) through[c] += state_product(scratch.states + c * panel_size, d_state, panel_size);
          walk_chunk<true>(
              d_state, d_state, value_dim, d_o.from(t, 0), v.from(t, 0), q.from(t, feature_of(n)), scratch.gates[c],
              scratch.pairs + t * kTokens, scale, tokens_of(c),
              [&](int64_t i, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE {
                if (p.dg) dot(scratch.lanes_write + (t + i) * w, k[t + i] + feature_of(n), acc);
              },
              [&](int64_t i, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE { put(p.dk, dk, t + i, acc); });
        }

        if (!p.dg || ((n + 1) % panels_per_unit != 0 && n + 1 < panels)) continue;
        const int64_t unit = part.begin + n / panels_per_unit;
        T* dg = static_cast<T*>(p.workspace) + unit * shape.batch * shape.seqlen * value_heads + value_head;
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t t = c * kTokens;
          alignas(64) T reads[kTokens], writes[kTokens];
          sum_chunk_rows<kTokens>(reads, scratch.lanes_read + t * w);
          sum_chunk_rows<kTokens>(writes, scratch.lanes_write + t * w);
          gate_gradient<kTokens>(dg, value_heads, rows.at + t, tokens_of(c),
                                 unit == 0 ? scratch.gate_pairs + t * kTokens : nullptr, reads, writes,
                                 scratch.gates[c].total * through[c]);
        }
      }
    }

    if (group == 1) continue;
    const int64_t first = head * dims + features.first;
    store_rows(static_cast<E*>(p.dq) + first, out_stride, dq, rows.at, tokens, features.count);
    store_rows(static_cast<E*>(p.dk) + first, out_stride, dk, rows.at, tokens, features.count);
  }
}

}  // namespace remora::REMORA_CPU_ISA::simple_gla
