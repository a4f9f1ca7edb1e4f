// The walks over columns of V: o in forward direction with x = v, dv in reverse with x = d_o.
#pragma once
#include "recurrence/simple_gla/cpu_walk.h"

namespace remora::REMORA_CPU_ISA::simple_gla {

template <class T>
struct ValuesScratch {
  T* state;             // [panels][panel_rows(K)][2 width]
  T *write, *read, *x;  // rows of an interval
  Gates<T>* gates;      // [kChunks]
  T* pairs;             // [kChunks][kTokens][kTokens]

  ValuesScratch(const RecurrenceShape& shape, Arena& arena) {
    state = arena.take<T>(panel_rows(shape.head_dim) * padded_columns(shape.value_dim));
    write = arena.take<T>(kStateInterval * row_stride(shape.head_dim));
    read = arena.take<T>(kStateInterval * row_stride(shape.head_dim));
    x = arena.take<T>(kStateInterval * row_stride(shape.value_dim));
    gates = arena.take<Gates<T>>(kChunks);
    pairs = arena.take<T>(kChunks * kTokens * kTokens);
  }
};

template <class T>
int64_t values_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  ValuesScratch<T> scratch(shape, arena);
  return arena.used();
}

/// One walk of one head, restricted to columns [first, first + columns) of V.
template <class T, class E, class Saved>
struct ValuesWalk {
  HeadTensor<E> x, write, read;
  const T* g;      // of the head, or null
  E* out;          // of the head
  const T* entry;  // states of the head: [K, V], or [V, K] if v_first; or null
  T* exit;
  Saved* saved;  // slot 0 of the head, or null
  int64_t first, columns;
  bool v_first;
  T scale;
};

template <bool kReverse, class T, class E, class Saved>
void walk_values(const ValuesWalk<T, E, Saved>& walk, const RecurrenceShape& shape, const RecurrenceSequence& sequence,
                 void* buffer) {
  const int64_t dims = shape.head_dim, value_dim = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t panel_size = panel_rows(dims) * kPanel<T>, panels = (walk.columns + kPanel<T> - 1) / kPanel<T>;
  const int64_t stride_d = walk.v_first ? 1 : value_dim, stride_x = walk.v_first ? dims : 1;
  Arena arena(buffer);
  ValuesScratch<T> scratch(shape, arena);
  const auto lanes_of = [&](int64_t panel) { return walk.columns - panel * kPanel<T>; };
  const auto place_of = [&](int64_t panel) { return (walk.first + panel * kPanel<T>)*stride_x; };

  for (int64_t n = 0; n < panels; ++n) {
    load_panel(scratch.state + n * panel_size, walk.entry ? walk.entry + place_of(n) : nullptr, dims, lanes_of(n),
               stride_d, stride_x);
  }

  const int64_t intervals = (sequence.length + kStateInterval - 1) / kStateInterval;
  for (int64_t step = 0; step < intervals; ++step) {
    const int64_t interval = kReverse ? intervals - 1 - step : step, start = interval * kStateInterval;
    const int64_t tokens = min(kStateInterval, sequence.length - start), chunks = (tokens + kTokens - 1) / kTokens;
    const auto tokens_of = [&](int64_t c) { return min(kTokens, tokens - c * kTokens); };
    const ChunkRows<kStateInterval> rows(shape, sequence, start, tokens);
    const Rows<T> write = load_rows(scratch.write, walk.write, rows.at, tokens);
    const Rows<T> read = load_rows(scratch.read, walk.read, rows.at, tokens);
    const Rows<T> x = load_rows(scratch.x, walk.x, rows.at, tokens);
    for (int64_t c = 0; c < chunks; ++c) {
      make_chunk_decay(scratch.gates[c], walk.g, value_heads, rows.at + c * kTokens, tokens_of(c));
      const Rows<T> later = (kReverse ? write : read).from(c * kTokens, 0);
      const Rows<T> earlier = (kReverse ? read : write).from(c * kTokens, 0);
      make_pairs(scratch.pairs + c * kTokens * kTokens, scratch.gates[c], later, earlier, padded_columns(dims),
                 tokens_of(c), walk.scale);
    }

    for (int64_t n = 0; n < panels; ++n) {
      // A share of the next interval's rows is on its way while this panel is walked.
      const int64_t next = kReverse ? start - kStateInterval : start + kStateInterval;
      for (const HeadTensor<E>* tensor : {&walk.write, &walk.read, &walk.x}) {
        prefetch_rows(*tensor, shape, sequence, next + kStateInterval * n / panels,
                      next + kStateInterval * (n + 1) / panels);
      }
      T* state = scratch.state + n * panel_size;
      if (walk.saved) {
        Saved* saved = walk.saved + interval * value_heads * dims * value_dim;
        store_panel(state, saved + walk.first + n * kPanel<T>, dims, lanes_of(n), value_dim, 1);
      }
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t c = kReverse ? chunks - 1 - i : i;
        walk_chunk<kReverse>(
            state, state, dims, write.from(c * kTokens, 0), read.from(c * kTokens, 0),
            x.from(c * kTokens, n * kPanel<T>), scratch.gates[c], scratch.pairs + c * kTokens * kTokens, walk.scale,
            tokens_of(c), [](int64_t, const Vec<T>(&)[2]) REMORA_ALWAYS_INLINE {},
            [&](int64_t t, const Vec<T>(&acc)[2]) REMORA_ALWAYS_INLINE {
              if (t >= tokens_of(c)) return;
              const int64_t row = rows.at[c * kTokens + t].row;
              store_lanes<T>(walk.out + row * value_heads * value_dim + walk.first + n * kPanel<T>, acc, lanes_of(n));
            });
      }
    }
  }

  for (int64_t n = 0; walk.exit && n < panels; ++n) {
    store_panel(scratch.state + n * panel_size, walk.exit + place_of(n), dims, lanes_of(n), stride_d, stride_x);
  }
}

/// Columns of a part, the last one clipped to the dimension.
struct Columns {
  int64_t first, count;

  Columns(SimpleGlaUnits part, int64_t dim)
      : first(part.begin * kSimpleGlaUnit), count(min(part.end * kSimpleGlaUnit, dim) - first) {}
};

template <class T>
REMORA_INLINE T* offset_or_null(void* data, int64_t offset) {
  return data ? static_cast<T*>(data) + offset : nullptr;
}
template <class T>
REMORA_INLINE const T* offset_or_null(const void* data, int64_t offset) {
  return data ? static_cast<const T*>(data) + offset : nullptr;
}

template <class T, class E, class Saved>
void fwd(const SimpleGlaFwdParams& p, const RecurrenceSequence& sequence, int64_t value_head, SimpleGlaUnits part,
         void* buffer) {
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, state_size = dims * shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t head = value_head / (value_heads / shape.num_heads);
  const int64_t state = (sequence.index * value_heads + value_head) * state_size;
  const Columns columns(part, shape.value_dim);
  const ValuesWalk<T, E, Saved> walk{
      .x = {p.v, p.v_stride, value_head, columns.first, columns.count},
      .write = {p.k, p.k_stride, head, 0, dims},
      .read = {p.q, p.q_stride, head, 0, dims},
      .g = offset_or_null<T>(p.g, value_head),
      .out = static_cast<E*>(p.o) + value_head * shape.value_dim,
      .entry = offset_or_null<T>(p.initial_state, state),
      .exit = offset_or_null<T>(p.final_state, state),
      .saved = offset_or_null<Saved>(p.saved_states, (sequence.first_slot() * value_heads + value_head) * state_size),
      .first = columns.first,
      .columns = columns.count,
      .v_first = p.state_v_first,
      .scale = static_cast<T>(p.scale),
  };
  walk_values<false>(walk, shape, sequence, buffer);
}

template <class T, class E>
void bwd_values(const SimpleGlaBwdParams& p, const RecurrenceSequence& sequence, int64_t value_head,
                SimpleGlaUnits part, void* buffer) {
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, value_dim = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t head = value_head / (value_heads / shape.num_heads);
  const int64_t state = (sequence.index * value_heads + value_head) * dims * value_dim;
  const TokenStrides o_stride{shape.seqlen * value_heads * value_dim, value_heads * value_dim, value_dim};
  const Columns columns(part, value_dim);
  const ValuesWalk<T, E, E> walk{
      .x = {p.d_o, o_stride, value_head, columns.first, columns.count},
      .write = {p.q, p.q_stride, head, 0, dims},
      .read = {p.k, p.k_stride, head, 0, dims},
      .g = offset_or_null<T>(p.g, value_head),
      .out = static_cast<E*>(p.dv) + value_head * value_dim,
      .entry = offset_or_null<T>(p.d_final_state, state),
      .exit = offset_or_null<T>(p.d_initial_state, state),
      .saved = nullptr,
      .first = columns.first,
      .columns = columns.count,
      .v_first = p.state_v_first,
      .scale = static_cast<T>(p.scale),
  };
  walk_values<true>(walk, shape, sequence, buffer);
}

}  // namespace remora::REMORA_CPU_ISA::simple_gla
