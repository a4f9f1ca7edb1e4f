// The backward pass, with the weights recomputed from lse:
//
//   dS = P (dO V^T - delta),   delta = rowsum(dO O) - d_lse
//   dQ = scale dS K            a block of rows over all keys that they see
//   dK = scale dS^T Q, dV = P^T dO    a block of keys over all rows that see them
//
// Sums over keys and over rows run upwards in blocks, whichever of the tasks does them.
#pragma once
#include "segment/prefix_attention/cpu_blocks.h"

namespace remora::REMORA_CPU_ISA {

/// The workspace: delta, and scale dS of what a row sees of itself, [B, T, H] each.
template <class T>
struct RowGradients {
  T *delta, *own;

  explicit RowGradients(const PrefixAttentionBwdParams& p) {
    const AttentionShape& s = p.in.shape;
    delta = static_cast<T*>(p.workspace), own = delta + s.batch * s.seqlen * s.num_heads;
  }
};

template <class Op, class E>
void bwd_tokens(const PrefixAttentionBwdParams& p, int64_t first, int64_t count) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  const PrefixAttentionInputs& in = p.in;
  const AttentionShape& shape = in.shape;
  const int64_t dims = shape.head_dim, group = shape.group();
  const RowGradients<T> gradients(p);
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t batch = i / shape.seqlen, token = i % shape.seqlen;
    const bool is_covered = !in.cu_seqlens || (token >= in.cu_seqlens[0] && token < in.cu_seqlens[shape.num_seqs]);
    for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
      alignas(64) T dk[kMaxHeadDim] = {}, dv[kMaxHeadDim] = {};
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const int64_t row = i * shape.num_heads + head;
        const E* const d_o = static_cast<const E*>(p.d_o) + p.d_o_stride.offset(batch, token, head);
        const E* const o = static_cast<const E*>(p.o) + row * dims;
        T delta = dot_rows<T>(d_o, o, dims);
        if (p.d_lse) delta -= static_cast<const T*>(p.d_lse)[row];
        gradients.delta[row] = delta, gradients.own[row] = T(0);
        if (!in.k_self || !is_covered) continue;
        const E* const q = static_cast<const E*>(in.q) + in.q_stride.offset(batch, token, head);
        const E* const k = static_cast<const E*>(in.k_self) + in.k_self_stride.offset(batch, token, kv_head);
        const E* const v = static_cast<const E*>(in.v_self) + in.v_self_stride.offset(batch, token, kv_head);
        const T score = dot_rows<T>(q, k, dims) * static_cast<T>(in.scale);
        const T weight = std::isinf(score) && score < 0 ? T(0) : std::exp(score - static_cast<const T*>(p.lse)[row]);
        const T own = weight * (dot_rows<T>(d_o, v, dims) - delta) * static_cast<T>(in.scale);
        gradients.own[row] = own;
        for (int64_t d = 0; d < dims; d += w) {
          store<T>(dk + d, load<T>(dk + d) + load_lanes<T>(q, d, dims) * own);
          store<T>(dv + d, load<T>(dv + d) + load_lanes<T>(d_o, d, dims) * weight);
        }
      }
      if (!in.k_self) continue;
      const int64_t at = (i * shape.num_kv_heads + kv_head) * dims;
      for (int64_t d = 0; d < dims; d += w) {
        store_lanes<T>(static_cast<E*>(p.dk_self) + at, d, dims, load<T>(dk + d));
        store_lanes<T>(static_cast<E*>(p.dv_self) + at, d, dims, load<T>(dv + d));
      }
    }
  }
}

template <class Op>
void bwd_sink(const PrefixAttentionBwdParams& p, int64_t head) {
  using T = typename Op::Real;
  const AttentionShape& shape = p.in.shape;
  const RowGradients<T> gradients(p);
  const T sink = static_cast<const T*>(p.in.sink)[head];
  double sum = 0;
  for (int64_t i = 0; i < shape.batch * shape.seqlen; ++i) {
    const int64_t row = i * shape.num_heads + head;
    const T lse = static_cast<const T*>(p.lse)[row];
    if (std::isinf(lse) && lse < 0) continue;
    sum -= std::exp(sink - lse) * gradients.delta[row];
  }
  static_cast<T*>(p.dsink)[head] = static_cast<T>(sum);
}

template <class Op, class E>
struct BackwardScratch {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  Word *q, *d_o, *q_rows, *d_o_rows;  // rows: operands, panels
  Word *k, *v, *k_rows;               // keys
  Word* packed;
  T *scores, *products;  // [key][row] of a chunk
  T* ds_keys;            // [row chunk][key][row]
  T *p, *ds;             // [key chunk][row][key]
  T *lse, *delta;
  T *dq, *dk, *dv, *dbias;
  E* copy;

  BackwardScratch(const AttentionShape& shape, int64_t num_keys, Arena& arena) {
    const int64_t dims = shape.head_dim, padded = pad(dims), n = words<Op>(padded);
    const int64_t keys = num_keys + kNumKeySources * kBlockKeys;
    q = arena.take<Word>(n * kBlockRows), d_o = arena.take<Word>(n * kBlockRows);
    q_rows = arena.take<Word>(kBlockRows / Op::kPack * padded);
    d_o_rows = arena.take<Word>(kBlockRows / Op::kPack * padded);
    k = arena.take<Word>(n * kBlockKeys), v = arena.take<Word>(n * kBlockKeys);
    k_rows = arena.take<Word>(kBlockKeys / Op::kPack * padded);
    packed = arena.take<Word>(Op::kPack == 1 ? 0 : std::max(kBlockKeys, kBlockRows) / 2 * kChunk);
    scores = arena.take<T>(kChunkScores), products = arena.take<T>(kChunkScores);
    ds_keys = arena.take<T>(kBlockRows * kBlockKeys);
    p = arena.take<T>(kBlockRows * kBlockKeys), ds = arena.take<T>(kBlockRows * kBlockKeys);
    lse = arena.take<T>(kBlockRows), delta = arena.take<T>(kBlockRows);
    dq = arena.take<T>(kBlockRows * padded);
    dk = arena.take<T>(keys * padded), dv = arena.take<T>(keys * padded);
    dbias = arena.take<T>(shape.group() * keys);
    copy = arena.take<E>(operand_copy_size(dims));
  }
};

/// Where the gradients of the keys of one source are summed: rows from the first key of a sequence, or of a block, on.
template <class T>
struct KeySums {
  T *dk, *dv, *dbias;  // [keys][pad(dims)], [group][keys]
  int64_t keys;

  void clear(int64_t padded, int64_t group) const {
    std::fill(dk, dk + keys * padded, T(0)), std::fill(dv, dv + keys * padded, T(0));
    std::fill(dbias, dbias + group * keys, T(0));
  }
};

/// The transpose of a [kChunk][kChunk] matrix.
template <class T>
REMORA_INLINE void transpose_chunk(T* to, const T* from) {
  constexpr int w = kWidth<T>;
  for (int i = 0; i < kChunk; i += w) {
    for (int j = 0; j < kChunk; j += w) {
      Vec<T> block[w];
      unroll<w>([&](auto r) REMORA_ALWAYS_INLINE { block[r] = load<T>(from + (i + r) * kChunk + j); });
      transpose(block);
      unroll<w>([&](auto r) REMORA_ALWAYS_INLINE { store<T>(to + (j + r) * kChunk + i, block[r]); });
    }
  }
}

template <class Op, class E>
class Backward {
 public:
  using T = typename Op::Real;

  Backward(const PrefixAttentionBwdParams& params, int64_t seq_idx, int64_t kv_head, const BackwardScratch<Op, E>& s)
      : p_(params),
        in_(params.in),
        seq_idx_(seq_idx),
        kv_head_(kv_head),
        s_(s),
        dims_(in_.shape.head_dim),
        padded_(pad(dims_)),
        n_(words<Op>(padded_)) {}

  void load_queries(const RowBlock& rows, bool with_keys) {
    for (int64_t c = 0; c < rows.chunks(); ++c) {
      const Tile<E> q = rows.tile<E>(in_.q, in_.q_stride, c * kChunk);
      const Tile<E> d_o = rows.tile<E>(p_.d_o, p_.d_o_stride, c * kChunk);
      load_operand<Op>(s_.q + c * n_ * kChunk, q, kChunk, dims_, s_.copy);
      load_operand<Op>(s_.d_o + c * n_ * kChunk, d_o, kChunk, dims_, s_.copy);
    }
    const RowGradients<T> gradients(p_);
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const int64_t row = rows.place(in_.shape, i) * in_.shape.num_heads + rows.head[i];
      const T lse = static_cast<const T*>(p_.lse)[row];
      // of rows that see nothing every weight is 2^-inf
      s_.lse[i] = std::isinf(lse) ? std::numeric_limits<T>::infinity() : lse * T(kLog2e);
      s_.delta[i] = gradients.delta[row];
    }
    if (!with_keys) return;
    const auto q = [&](int64_t i) { return query(rows, i); };
    const auto d_o = [&](int64_t i) { return d_output(rows, i); };
    rows_finite_ = load_rows<Op, E>(s_.q_rows, q, rows.chunks() * kChunk, dims_);
    rows_finite_ &= load_rows<Op, E>(s_.d_o_rows, d_o, rows.chunks() * kChunk, dims_);
  }

  /// Adds what a block of rows and the keys [first, first + count) of a source have to do with each other: to the
  /// gradients of the rows, if with_queries, and of the keys, if `sums` is given, whose rows begin at key `base`.
  void add_block(const RowBlock& rows, const AttentionKeys& source, const VisibleKeys<T>& visible, int64_t first,
                 int64_t count, bool with_queries, const KeySums<T>* sums, int64_t base) {
    const AttentionSpan keys = source.span(in_.shape, seq_idx_);
    const KeyRows<E> k(source.k, source.k_stride, keys, kv_head_, first, count);
    const KeyRows<E> v(source.v, source.v_stride, keys, kv_head_, first, count);
    const int64_t key_chunks = (count + kChunk - 1) / kChunk;
    for (int64_t c = 0; c < key_chunks; ++c) {
      load_operand<Op>(s_.k + c * n_ * kChunk, k.tile(c * kChunk), kChunk, dims_, s_.copy);
      load_operand<Op>(s_.v + c * n_ * kChunk, v.tile(c * kChunk), kChunk, dims_, s_.copy);
    }
    const bool keys_finite = !with_queries || load_rows<Op, E>(s_.k_rows, k, key_chunks * kChunk, dims_);

    for (int64_t c = 0; c < rows.chunks(); ++c) {
      const auto chunks = visible.chunks(c, first);
      const ScoreMap<T> map(in_, source, keys, rows, c * kChunk, first);
      for (int64_t i = 0; i < key_chunks; ++i) {
        weigh_chunk(visible, map, c, i, first, i >= chunks.first && i < chunks.last, sums != nullptr);
      }
      if (with_queries && chunks.first < chunks.last) add_dq(c, chunks.first, chunks.last, k, keys_finite);
    }
    if (!sums) return;
    for (int64_t i = 0; i < key_chunks; ++i) {
      int64_t begin = rows.chunks(), end = 0;  // chunks of rows that see any
      for (int64_t c = 0; c < rows.chunks(); ++c) {
        const auto chunks = visible.chunks(c, first);
        if (i < chunks.first || i >= chunks.last) continue;
        begin = std::min(begin, c), end = c + 1;
      }
      if (begin < end) add_dkv(rows, i, begin, end, *sums, first + i * kChunk - base);
    }
  }

  void clear_dq() const { std::fill(s_.dq, s_.dq + kBlockRows * padded_, T(0)); }

  void store_dq(const RowBlock& rows) const {
    const T scale = static_cast<T>(in_.scale);
    const RowGradients<T> gradients(p_);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = rows.place(in_.shape, i) * in_.shape.num_heads + rows.head[i];
      const T own = gradients.own[row];
      const E* const k = static_cast<const E*>(in_.k_self) +
                         in_.k_self_stride.offset(rows.tokens.batch, rows.tokens.begin + rows.token[i], kv_head_);
      for (int64_t d = 0; d < dims_; d += kWidth<T>) {
        Vec<T> x = load<T>(s_.dq + i * padded_ + d) * scale;
        if (own != T(0)) x += load_lanes<T>(k, d, dims_) * own;
        store_lanes<T>(static_cast<E*>(p_.dq) + row * dims_, d, dims_, x);
      }
    }
  }

  /// Of keys [first, first + count) of a span of source `index`.
  void store_keys(int index, const AttentionSpan& keys, int64_t first, int64_t count, const KeySums<T>& sums,
                  int64_t base) const {
    const AttentionShape& shape = in_.shape;
    const int64_t length = in_.sources[index].length;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = keys.batch * length + keys.begin + first + i;
      const int64_t at = (row * shape.num_kv_heads + kv_head_) * dims_, from = (first + i - base) * padded_;
      for (int64_t d = 0; d < dims_; d += kWidth<T>) {
        const Vec<T> dk = load<T>(sums.dk + from + d) * static_cast<T>(in_.scale);
        store_lanes<T>(static_cast<E*>(p_.dk[index]) + at, d, dims_, dk);
        store_lanes<T>(static_cast<E*>(p_.dv[index]) + at, d, dims_, load<T>(sums.dv + from + d));
      }
    }
    if (index != 0 || !p_.dbias) return;
    for (int64_t g = 0; g < shape.group(); ++g) {
      const int64_t head = keys.batch * shape.num_heads + kv_head_ * shape.group() + g;
      std::copy_n(sums.dbias + g * sums.keys + first - base, count,
                  static_cast<T*>(p_.dbias) + head * length + keys.begin + first);
    }
  }

 private:
  const E* query(const RowBlock& rows, int64_t i) const {
    return static_cast<const E*>(in_.q) +
           in_.q_stride.offset(rows.tokens.batch, rows.tokens.begin + rows.token[i], rows.head[i]);
  }
  const E* d_output(const RowBlock& rows, int64_t i) const {
    return static_cast<const E*>(p_.d_o) +
           p_.d_o_stride.offset(rows.tokens.batch, rows.tokens.begin + rows.token[i], rows.head[i]);
  }

  /// P and dS of chunk c of the rows and chunk i of the keys; zeros if no row sees a key.
  void weigh_chunk(const VisibleKeys<T>& visible, const ScoreMap<T>& map, int64_t c, int64_t i, int64_t first,
                   bool is_visible, bool with_keys) {
    constexpr int w = kWidth<T>;
    T* const ds = s_.ds_keys + (c * kBlockKeys + i * kChunk) * kChunk;
    T* const p_rows = s_.p + (i * kBlockRows + c * kChunk) * kChunk;
    T* const ds_rows = s_.ds + (i * kBlockRows + c * kChunk) * kChunk;
    if (!is_visible) {
      std::fill(p_rows, p_rows + kChunkScores, T(0)), std::fill(ds_rows, ds_rows + kChunkScores, T(0));
      return;
    }
    multiply_tokens<Op>(s_.scores, s_.k + i * n_ * kChunk, s_.q + c * n_ * kChunk, n_);
    multiply_tokens<Op>(s_.products, s_.v + i * n_ * kChunk, s_.d_o + c * n_ * kChunk, n_);
    const bool all_see = visible.all_see(c, first + i * kChunk);
    for (int j = 0; j < kChunk; j += w) {
      const int64_t row = c * kChunk + j;
      const Vec<T> lse = load<T>(s_.lse + row), delta = load<T>(s_.delta + row);
      const auto begin = load<Index<T>>(visible.begin + row), end = load<Index<T>>(visible.end + row);
      for (int64_t key = 0; key < kChunk; ++key) {
        const int64_t at = key * kChunk + j;
        Vec<T> p = exp2_or_nan<T>(map(load<T>(s_.scores + at), i * kChunk + key, j) - lse);
        Vec<T> x = p * (load<T>(s_.products + at) - delta);
        if (!all_see) {
          const Index<T> place = static_cast<Index<T>>(first + i * kChunk + key);
          const auto is_seen = (begin <= place) & (end > place);
          p = is_seen ? p : Vec<T>{}, x = is_seen ? x : Vec<T>{};
        }
        store<T>(s_.scores + at, p), store<T>(ds + at, x);
      }
    }
    if (!with_keys) return;
    transpose_chunk(p_rows, s_.scores), transpose_chunk(ds_rows, ds);
  }

  void add_dq(int64_t c, int64_t begin, int64_t end, const KeyRows<E>& k, bool is_finite) {
    const T* const ds = s_.ds_keys + (c * kBlockKeys + begin * kChunk) * kChunk;
    const int64_t used = (end - begin) * kChunk;
    T* const dq = s_.dq + c * kChunk * padded_;
    add_product<Op>(dq, nullptr, as_operand<Op>(ds, used, s_.packed), s_.k_rows + begin * kChunk / Op::kPack * padded_,
                    used, padded_);
    if (is_finite) return;
    for (int64_t i = 0; i < used; ++i) {
      for (int64_t r = 0; r < kChunk; ++r) {
        add_not_finite<T>(dq + r * padded_, ds[i * kChunk + r], k(begin * kChunk + i), dims_);
      }
    }
  }

  void add_dkv(const RowBlock& rows, int64_t i, int64_t begin, int64_t end, const KeySums<T>& sums, int64_t key) {
    const int64_t from = begin * kChunk, used = (end - begin) * kChunk, panel = from / Op::kPack * padded_;
    const T* const p = s_.p + (i * kBlockRows + from) * kChunk;
    const T* const ds = s_.ds + (i * kBlockRows + from) * kChunk;
    T *const dk = sums.dk + key * padded_, *const dv = sums.dv + key * padded_;
    add_product<Op>(dv, nullptr, as_operand<Op>(p, used, s_.packed), s_.d_o_rows + panel, used, padded_);
    add_product<Op>(dk, nullptr, as_operand<Op>(ds, used, s_.packed), s_.q_rows + panel, used, padded_);
    if (!rows_finite_) {
      for (int64_t r = 0; r < used; ++r) {
        for (int64_t j = 0; j < kChunk; ++j) {
          add_not_finite<T>(dv + j * padded_, p[r * kChunk + j], d_output(rows, from + r), dims_);
          add_not_finite<T>(dk + j * padded_, ds[r * kChunk + j], query(rows, from + r), dims_);
        }
      }
    }
    if (!p_.dbias) return;
    for (int64_t r = 0; r < used; ++r) {
      T* const dbias = sums.dbias + (rows.head[from + r] - kv_head_ * rows.group) * sums.keys + key;
      for (int j = 0; j < kChunk; j += kWidth<T>)
        store<T>(dbias + j, load<T>(dbias + j) + load<T>(ds + r * kChunk + j));
    }
  }

  const PrefixAttentionBwdParams& p_;
  const PrefixAttentionInputs& in_;
  int64_t seq_idx_, kv_head_;
  const BackwardScratch<Op, E>& s_;
  int64_t dims_, padded_, n_;
  bool rows_finite_ = true;
};

template <class Op, class E>
void bwd_queries(const PrefixAttentionBwdParams& p, int64_t slot, int64_t kv_head, void* buffer) {
  using T = typename Op::Real;
  const PrefixAttentionInputs& in = p.in;
  const AttentionSlots slots = in.row_slots(kBlockRows);
  const int64_t seq_idx = slots.owner(slot);
  const RowBlock rows(in, seq_idx, kv_head, slot - slots.first_slot(seq_idx));
  if (rows.count == 0) return;
  Arena arena(buffer);
  const BackwardScratch<Op, E> scratch(in.shape, kBlockKeys, arena);
  Backward<Op, E> backward(p, seq_idx, kv_head, scratch);
  backward.load_queries(rows, false);
  backward.clear_dq();
  for (const AttentionKeys& source : in.sources) {
    if (source.length == 0) continue;
    const VisibleKeys<T> visible(in, source, source.span(in.shape, seq_idx), rows);
    for (int64_t first = visible.lowest / kBlockKeys * kBlockKeys; first < visible.highest; first += kBlockKeys) {
      backward.add_block(rows, source, visible, first, std::min(kBlockKeys, visible.highest - first), true, nullptr, 0);
    }
  }
  backward.store_dq(rows);
}

template <class Op, class E>
void bwd_keys(const PrefixAttentionBwdParams& p, int index, int64_t slot, int64_t kv_head, void* buffer) {
  using T = typename Op::Real;
  const PrefixAttentionInputs& in = p.in;
  const AttentionKeys& source = in.sources[index];
  const AttentionSlots slots = in.key_slots(index, kBlockKeys);
  const int64_t seq_idx = slots.owner(slot), first = (slot - slots.first_slot(seq_idx)) * kBlockKeys;
  const AttentionSpan keys = source.span(in.shape, seq_idx), tokens = in.tokens(seq_idx);
  const int64_t count = std::min(kBlockKeys, keys.length - first), group = in.shape.group();
  if (count <= 0) return;
  Arena arena(buffer);
  const BackwardScratch<Op, E> scratch(in.shape, kBlockKeys, arena);
  Backward<Op, E> backward(p, seq_idx, kv_head, scratch);
  const KeySums<T> sums{scratch.dk, scratch.dv, scratch.dbias, kBlockKeys};
  sums.clear(pad(in.shape.head_dim), group);
  int64_t begin = 0, end = tokens.length;
  if (!source.n_visible) {
    begin = std::max(begin, source.rule.first_token(first));
    end = std::min(end, source.rule.end_token(first + count - 1));
  }
  for (int64_t block = begin * group / kBlockRows; block * kBlockRows < end * group && keys.is_covered; ++block) {
    const RowBlock rows(in, seq_idx, kv_head, block);
    const VisibleKeys<T> visible(in, source, keys, rows);
    if (visible.highest <= first || visible.lowest >= first + count) continue;
    backward.load_queries(rows, true);
    backward.add_block(rows, source, visible, first, count, false, &sums, first);
  }
  backward.store_keys(index, keys, first, count, sums, first);
}

template <class Op, class E>
void bwd_sequence(const PrefixAttentionBwdParams& p, int64_t seq_idx, int64_t kv_head, void* buffer) {
  using T = typename Op::Real;
  const PrefixAttentionInputs& in = p.in;
  const int64_t padded = pad(in.shape.head_dim), group = in.shape.group();
  Arena arena(buffer);
  const BackwardScratch<Op, E> scratch(in.shape, in.sources[0].length + in.sources[1].length, arena);
  Backward<Op, E> backward(p, seq_idx, kv_head, scratch);
  KeySums<T> sums[kNumKeySources];
  AttentionSpan keys[kNumKeySources];
  int64_t used = 0;
  for (int i = 0; i < kNumKeySources; ++i) {
    keys[i] = in.sources[i].length == 0 ? AttentionSpan{} : in.sources[i].span(in.shape, seq_idx);
    const int64_t size = (keys[i].length + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
    sums[i] = {scratch.dk + used * padded, scratch.dv + used * padded, scratch.dbias + used * group, size};
    sums[i].clear(padded, group);
    used += size;
  }
  const int64_t num_rows = in.tokens(seq_idx).length * group;
  for (int64_t block = 0; block * kBlockRows < num_rows; ++block) {
    const RowBlock rows(in, seq_idx, kv_head, block);
    backward.load_queries(rows, true);
    backward.clear_dq();
    for (int i = 0; i < kNumKeySources; ++i) {
      if (keys[i].length == 0) continue;
      const AttentionKeys& source = in.sources[i];
      const VisibleKeys<T> visible(in, source, keys[i], rows);
      for (int64_t first = visible.lowest / kBlockKeys * kBlockKeys; first < visible.highest; first += kBlockKeys) {
        const int64_t count = std::min(kBlockKeys, visible.highest - first);
        backward.add_block(rows, source, visible, first, count, true, &sums[i], 0);
      }
    }
    backward.store_dq(rows);
  }
  for (int i = 0; i < kNumKeySources; ++i) backward.store_keys(i, keys[i], 0, keys[i].length, sums[i], 0);
}

template <class Op, class E>
int64_t bwd_scratch(const PrefixAttentionInputs& in, int64_t num_keys) {
  Arena arena(nullptr);
  const BackwardScratch<Op, E> scratch(in.shape, num_keys, arena);
  return arena.used();
}

}  // namespace remora::REMORA_CPU_ISA
