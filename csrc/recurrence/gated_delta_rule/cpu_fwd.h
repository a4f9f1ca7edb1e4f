// Forward pass of one value head over one sequence, or of some of its value columns.
#pragma once
#include "recurrence/gated_delta_rule/cpu.h"
#include "recurrence/gated_delta_rule/cpu_chunk.h"

namespace remora::REMORA_CPU_ISA {

/// O of one panel from what the queries read of the chunk's first state, [kChunk][width], and the solved tokens.
template <class T, class E>
REMORA_INLINE void store_outputs(const T* read, const Vec<T> (&u)[kChunk], const ValueChunk<T>& value,
                                 const OutputTile<E>& o) {
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    Vec<T> sum = load<T>(read + i * kWidth<T>);
    unroll<i + 1>([&](auto j) REMORA_ALWAYS_INLINE { sum += u[j] * value.attn[i * kChunk + j]; });
    o.template store_row<T>(i, sum);
  });
}

template <class Op, class E>
REMORA_INLINE void fwd_tile(const KeyChunk<Op>& key, const ValueChunk<typename Op::Real>& value, const Panel<Op>& state,
                            int64_t padded, const Tile<E>& v, const OutputTile<E>& o) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  alignas(64) T read[kChunk * w];
  {
    Vec<T> acc[kChunk];
    multiply<Op>(acc, key.q, state.operand(), w, words<Op>(padded));
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(read + i * w, acc[i] * value.q_read[i]); });
  }
  Vec<T> u[1][kChunk];
  solve_tile<Op>(u[0], key, value, state, padded, v, static_cast<T*>(nullptr), 0);
  store_outputs(read, u[0], value, o);
  write_tile<Op>(u, key, value, state, padded);
}

/// The same for whole panels side by side.
template <class Op, int kTiles, class E>
REMORA_INLINE void fwd_tiles(const KeyChunk<Op>& key, const ValueChunk<typename Op::Real>& value,
                             typename Op::Real* state, int64_t padded, const Tile<E> (&v)[kTiles],
                             const OutputTile<E>& o) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  const int64_t distance = padded * w;
  alignas(64) T read[kTiles * kChunk * w], solved[kTiles * kChunk * w];
  multiply_abreast<Op, kTiles>(read, key.q, state, distance, padded);
  multiply_abreast<Op, kTiles>(solved, key.k, state, distance, padded);
  for (int tile = 0; tile < kTiles; ++tile) {
    T* const tile_read = read + tile * kChunk * w;
    T* const tile_solved = solved + tile * kChunk * w;
    Vec<T> u[kChunk];
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
      store<T>(tile_read + i * w, load<T>(tile_read + i * w) * value.q_read[i]);
      u[i] = load<T>(tile_solved + i * w);
    });
    solve_tokens(u, value, v[tile], static_cast<T*>(nullptr), 0);
    store_outputs(tile_read, u, value, o.columns_from(tile * w));
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(tile_solved + i * w, u[i] * value.k_write[i]); });
  }
  rank_update_abreast<Op, kTiles, 1>(state, distance, padded, value.total, {key.k_pairs()}, solved);
}

template <class Op, class E, class Saved>
void fwd(const GatedDeltaRuleFwdParams& p, const RecurrenceSequence& sequence, int64_t value_head,
         GatedDeltaRuleColumns part, void* buffer) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>, abreast = kPanelsAbreast<Op>;
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, columns = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t padded = pad(dims);
  const int64_t head = value_head / (value_heads / shape.num_heads);
  const int64_t first_tile = part.begin * kGatedDeltaRuleColumns / w;
  const int64_t end_tile = min(part.end * kGatedDeltaRuleColumns / w, (columns + w - 1) / w);
  const int64_t state_offset = (sequence.index * value_heads + value_head) * dims * columns;

  Arena arena(buffer);
  WalkScratch<Op, E> scratch(shape, arena);
  KeyChunk<Op>& key = *scratch.key;
  ValueChunk<T>& value = *scratch.value;

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t j = tile * w;
    const T* initial = static_cast<const T*>(p.initial_state);
    if (initial) initial += state_offset + column_offset(j, dims, p.state_v_first);
    load_panel(scratch.panel(tile, padded), initial, dims, columns, min(w, columns - j), p.state_v_first);
  }

  for (int64_t t = 0; t < sequence.length; t += kChunk) {
    if (p.saved_states && t % kStateInterval == 0) {
      const int64_t slot = sequence.first_slot() + t / kStateInterval;
      Saved* saved = static_cast<Saved*>(p.saved_states) + (slot * value_heads + value_head) * dims * columns;
      for (int64_t tile = first_tile; tile < end_tile; ++tile) {
        store_panel(scratch.panel(tile, padded), saved + tile * w, dims, columns, min(w, columns - tile * w), false);
      }
    }
    const int64_t tokens = min(kChunk, sequence.length - t);
    const ChunkRows<kChunk> rows(shape, sequence, t, tokens);
    make_key_chunk<Op>(key, head_tile<E>(p.q, p.q_stride, head, rows), head_tile<E>(p.k, p.k_stride, head, rows),
                       tokens, dims, p.use_qk_l2norm, scratch.copy);
    make_value_chunk<Op>(value, key, p.g ? static_cast<const T*>(p.g) + value_head : nullptr,
                         static_cast<const T*>(p.beta) + value_head, value_heads, rows, tokens,
                         static_cast<T>(p.scale));
    const Tile<E> v_rows = head_tile<E>(p.v, p.v_stride, value_head, rows);
    // Whole panels abreast; which ones these are depends on the shape alone.
    const int64_t end_abreast = abreast > 1 ? min(end_tile, columns / (abreast * w) * abreast) : first_tile;
    for (int64_t tile = first_tile; tile < end_tile;) {
      const int64_t count = tile < end_abreast ? abreast : 1;
      // A share of the next chunk's rows is on its way while these panels are worked on.
      const int64_t next = t + kChunk, share = end_tile - first_tile;
      for (int64_t i = next + kChunk * (tile - first_tile) / share;
           i < min(next + kChunk * (tile - first_tile + count) / share, sequence.length); ++i) {
        const TokenRow row = sequence.at(shape, i);
        prefetch_row(static_cast<const E*>(p.q) + row.offset(p.q_stride) + head * p.q_stride.head, dims);
        prefetch_row(static_cast<const E*>(p.k) + row.offset(p.k_stride) + head * p.k_stride.head, dims);
        prefetch_row(static_cast<const E*>(p.v) + row.offset(p.v_stride) + value_head * p.v_stride.head, columns);
      }
      E copy[abreast][kChunk * w];
      Tile<E> v_tiles[abreast];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = (tile + i) * w;
        v_tiles[i] = whole_tile(v_rows.columns_from(j), tokens, min(w, columns - j), w, copy[i]);
      }
      const OutputTile<E> o_tile{static_cast<E*>(p.o) + value_head * columns + tile * w, value_heads * columns, rows,
                                 tokens, min(w, columns - tile * w)};
      const Panel<Op> panel = scratch.panel(tile, padded);
      if constexpr (abreast > 1) {
        if (count == abreast) fwd_tiles<Op, abreast>(key, value, panel.values, padded, v_tiles, o_tile);
      }
      if (count == 1) fwd_tile<Op>(key, value, panel, padded, v_tiles[0], o_tile);
      tile += count;
    }
  }

  if (!p.final_state) return;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t j = tile * w;
    T* final_state = static_cast<T*>(p.final_state) + state_offset + column_offset(j, dims, p.state_v_first);
    store_panel(scratch.panel(tile, padded), final_state, dims, columns, min(w, columns - j), p.state_v_first);
  }
}

}  // namespace remora::REMORA_CPU_ISA
