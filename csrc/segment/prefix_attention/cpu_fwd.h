// The forward pass of a block of rows.
#pragma once
#include "segment/prefix_attention/cpu_blocks.h"

namespace remora::REMORA_CPU_ISA {

template <class Op, class E>
struct ForwardScratch {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  Word *q, *k, *v, *packed;
  T *scores, *o;
  E* copy;

  ForwardScratch(int64_t dims, Arena& arena)
      : q(arena.take<Word>(words<Op>(pad(dims)) * kBlockRows)),
        k(arena.take<Word>(words<Op>(pad(dims)) * kBlockKeys)),
        v(arena.take<Word>(kBlockKeys / Op::kPack * pad(dims))),
        packed(arena.take<Word>(Op::kPack == 1 ? 0 : kBlockKeys / 2 * kChunk)),
        scores(arena.take<T>(kBlockKeys * kChunk)),
        o(arena.take<T>(kBlockRows * pad(dims))),
        copy(arena.take<E>(operand_copy_size(dims))) {}
};

/// Largest score and sum of exponentials of every row, in powers of two.
template <class T>
struct RowSums {
  alignas(64) T largest[kBlockRows], sum[kBlockRows];
};

/// The sums of what a row sees of itself and of the sink; o becomes the value of itself with its weight.
template <class Op, class E>
void start_rows(const PrefixAttentionInputs& in, const RowBlock& rows, RowSums<typename Op::Real>& sums,
                typename Op::Real* o) {
  using T = typename Op::Real;
  const int64_t dims = in.shape.head_dim, padded = pad(dims);
  const T* const sink = static_cast<const T*>(in.sink);
  std::fill(o, o + kBlockRows * padded, T(0));
  for (int64_t i = 0; i < kBlockRows; ++i) {
    sums.largest[i] = -std::numeric_limits<T>::infinity(), sums.sum[i] = T(0);
    if (!rows.tokens.is_covered || i >= rows.count) continue;
    const int64_t batch = rows.tokens.batch, token = rows.tokens.begin + rows.token[i], head = rows.head[i];
    T own = -std::numeric_limits<T>::infinity(), other = own;
    if (in.k_self) {
      const E* const q = static_cast<const E*>(in.q) + in.q_stride.offset(batch, token, head);
      const E* const k = static_cast<const E*>(in.k_self) + in.k_self_stride.offset(batch, token, rows.kv_head);
      own = dot_rows<T>(q, k, dims) * static_cast<T>(in.scale * kLog2e);
    }
    if (sink) other = sink[head] * T(kLog2e);
    const T largest = own > other ? own : other, base = std::isinf(largest) && largest < 0 ? T(0) : largest;
    const T weight = in.k_self ? std::exp2(own - base) : T(0);
    sums.largest[i] = largest, sums.sum[i] = weight + (sink ? std::exp2(other - base) : T(0));
    if (!in.k_self) continue;
    const E* const v = static_cast<const E*>(in.v_self) + in.v_self_stride.offset(batch, token, rows.kv_head);
    for (int64_t d = 0; d < dims; d += kWidth<T>) {
      store<T>(o + i * padded + d, load_lanes<T>(v, d, dims) * weight);
    }
  }
}

/// One chunk of rows over chunks [chunks.first, chunks.last) of a block of keys: scores become weights.
template <class T>
void weigh(T* scores, const ScoreMap<T>& map, const VisibleKeys<T>& visible, int64_t row_chunk, int64_t first_key,
           typename VisibleKeys<T>::Chunks chunks, RowSums<T>& sums, T* factor) {
  constexpr int w = kWidth<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (int j = 0; j < kChunk; j += w) {
    const int64_t row = row_chunk * kChunk + j;
    const Vec<T> before = load<T>(sums.largest + row);
    Vec<T> largest = before;
    for (int64_t c = chunks.first; c < chunks.last; ++c) {
      const bool all_see = visible.all_see(row_chunk, first_key + c * kChunk);
      const auto begin = load<Index<T>>(visible.begin + row), end = load<Index<T>>(visible.end + row);
      for (int64_t i = c * kChunk; i < (c + 1) * kChunk; ++i) {
        T* const at = scores + i * kChunk + j;
        Vec<T> x = map(load<T>(at), i, j);
        if (!all_see) {
          const Index<T> key = static_cast<Index<T>>(first_key + i);
          x = ((begin <= key) & (end > key)) ? x : broadcast(-kInfinity);
        }
        store<T>(at, x);
        largest = (x > largest) ? x : largest;
      }
    }
    const Vec<T> base = (largest == -kInfinity) ? Vec<T>{} : largest;
    const Vec<T> rescale = exp2_or_nan<T>(before - base);
    Vec<T> sum = load<T>(sums.sum + row) * rescale;
    for (int64_t i = chunks.first * kChunk; i < chunks.last * kChunk; ++i) {
      T* const at = scores + i * kChunk + j;
      const Vec<T> p = exp2_or_nan<T>(load<T>(at) - base);
      store<T>(at, p);
      sum += p;
    }
    store<T>(sums.largest + row, largest), store<T>(sums.sum + row, sum), store<T>(factor + j, rescale);
  }
}

template <class Op, class E>
void finish_rows(const PrefixAttentionFwdParams& p, const RowBlock& rows, const RowSums<typename Op::Real>& sums,
                 const typename Op::Real* o) {
  using T = typename Op::Real;
  const AttentionShape& shape = p.in.shape;
  const int64_t dims = shape.head_dim, padded = pad(dims);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.place(shape, i) * shape.num_heads + rows.head[i];
    const T sum = sums.sum[i], inverse = sum == T(0) ? T(0) : T(1) / sum;
    static_cast<T*>(p.lse)[row] = sum == T(0) ? -std::numeric_limits<T>::infinity()
                                              : static_cast<T>((sums.largest[i] + std::log2(sum)) * T(kLn2));
    E* const to = static_cast<E*>(p.o) + row * dims;
    for (int64_t d = 0; d < dims; d += kWidth<T>) {
      store_lanes<T>(to, d, dims, load<T>(o + i * padded + d) * inverse);
    }
  }
}

template <class Op, class E>
void fwd(const PrefixAttentionFwdParams& p, int64_t slot, int64_t kv_head, void* buffer) {
  using T = typename Op::Real;
  const PrefixAttentionInputs& in = p.in;
  const AttentionSlots slots = in.row_slots(kBlockRows);
  const int64_t seq_idx = slots.owner(slot);
  const RowBlock rows(in, seq_idx, kv_head, slot - slots.first_slot(seq_idx));
  if (rows.count == 0) return;
  const int64_t dims = in.shape.head_dim, padded = pad(dims), n = words<Op>(padded);
  Arena arena(buffer);
  const ForwardScratch<Op, E> s(dims, arena);
  for (int64_t c = 0; c < rows.chunks(); ++c) {
    load_operand<Op>(s.q + c * n * kChunk, rows.tile<E>(in.q, in.q_stride, c * kChunk), kChunk, dims, s.copy);
  }
  RowSums<T> sums;
  start_rows<Op, E>(in, rows, sums, s.o);

  for (const AttentionKeys& source : in.sources) {
    if (source.length == 0) continue;
    const AttentionSpan keys = source.span(in.shape, seq_idx);
    const VisibleKeys<T> visible(in, source, keys, rows);
    for (int64_t first = visible.lowest / kBlockKeys * kBlockKeys; first < visible.highest; first += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, visible.highest - first);
      const KeyRows<E> k(source.k, source.k_stride, keys, kv_head, first, count);
      const KeyRows<E> v(source.v, source.v_stride, keys, kv_head, first, count);
      const int64_t key_chunks = (count + kChunk - 1) / kChunk;
      for (int64_t c = 0; c < key_chunks; ++c) {
        load_operand<Op>(s.k + c * n * kChunk, k.tile(c * kChunk), kChunk, dims, s.copy);
      }
      const bool is_finite = load_rows<Op, E>(s.v, v, key_chunks * kChunk, dims);
      for (int64_t c = 0; c < rows.chunks(); ++c) {
        const auto chunks = visible.chunks(c, first);
        if (chunks.first == chunks.last) continue;
        for (int64_t i = chunks.first; i < chunks.last; ++i) {
          multiply_tokens<Op>(s.scores + i * kChunkScores, s.k + i * n * kChunk, s.q + c * n * kChunk, n);
        }
        alignas(64) T factor[kChunk];
        const ScoreMap<T> map(in, source, keys, rows, c * kChunk, first);
        weigh<T>(s.scores, map, visible, c, first, chunks, sums, factor);
        T* const o = s.o + c * kChunk * padded;
        const int64_t from = chunks.first * kChunk, used = (chunks.last - chunks.first) * kChunk;
        add_product<Op>(o, factor, as_operand<Op>(s.scores + from * kChunk, used, s.packed),
                        s.v + from / Op::kPack * padded, used, padded);
        if (is_finite) continue;
        for (int64_t i = 0; i < used; ++i) {
          for (int64_t r = 0; r < kChunk; ++r) {
            add_not_finite<T>(o + r * padded, s.scores[(from + i) * kChunk + r], v(from + i), dims);
          }
        }
      }
    }
  }
  finish_rows<Op, E>(p, rows, sums, s.o);
}

template <class Op, class E>
int64_t fwd_scratch(const PrefixAttentionInputs& in) {
  Arena arena(nullptr);
  const ForwardScratch<Op, E> scratch(in.shape.head_dim, arena);
  return arena.used();
}

}  // namespace remora::REMORA_CPU_ISA
