// Forward pass of one value head over one sequence, or of some of its value columns.
#pragma once
#include "recurrence/gated_delta_rule/cpu.h"
#include "recurrence/gated_delta_rule/cpu_chunk.h"

namespace remora::REMORA_CPU_ISA {

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
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
    Vec<T> sum = load<T>(read + i * w);
    unroll<i + 1>([&](auto j) REMORA_ALWAYS_INLINE { sum += u[0][j] * value.attn[i * kChunk + j]; });
    o.template store_row<T>(i, sum);
  });
  write_tile<Op>(u, key, value, state, padded);
}

template <class Op, class E, class Saved>
void fwd(const GatedDeltaRuleFwdParams& p, const RecurrenceSequence& sequence, int64_t value_head,
         GatedDeltaRuleColumns part, void* buffer) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
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
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const int64_t j = tile * w, lanes = min(w, columns - j);
      // A share of the next chunk's rows is on its way while this panel is worked on.
      const int64_t next = t + kChunk, share = end_tile - first_tile;
      for (int64_t i = next + kChunk * (tile - first_tile) / share;
           i < min(next + kChunk * (tile - first_tile + 1) / share, sequence.length); ++i) {
        const TokenRow row = sequence.at(shape, i);
        prefetch_row(static_cast<const E*>(p.q) + row.offset(p.q_stride) + head * p.q_stride.head, dims);
        prefetch_row(static_cast<const E*>(p.k) + row.offset(p.k_stride) + head * p.k_stride.head, dims);
        prefetch_row(static_cast<const E*>(p.v) + row.offset(p.v_stride) + value_head * p.v_stride.head, columns);
      }
      E copy[kChunk * w];
      const Tile<E> v_tile = whole_tile(v_rows.columns_from(j), tokens, lanes, w, copy);
      const OutputTile<E> o_tile{static_cast<E*>(p.o) + value_head * columns + j, value_heads * columns, rows, tokens,
                                 lanes};
      fwd_tile<Op>(key, value, scratch.panel(tile, padded), padded, v_tile, o_tile);
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
