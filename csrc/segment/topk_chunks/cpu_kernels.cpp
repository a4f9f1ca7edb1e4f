// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <algorithm>
#include <limits>

#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "common/cpu/panels.h"
#include "common/cpu/select.h"
#include "segment/topk_chunks/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kMaxDim = 256;
/// Chunks whose scores a token holds at a time; the best of earlier ones stand before them.
constexpr int64_t kSpan = 2048;

template <class T>
int64_t span_of(const TopkChunksParams& p) {
  return std::min(kSpan, pad_to_panel<T>(p.shape.packed.key_seqlen));
}

/// Keys of a token: room for the best so far, a span, and a vector behind it. Not a multiple of 4096 bytes, which would
/// put all rows into the same sets of L1.
template <class T>
int64_t row_stride(const TopkChunksParams& p) {
  return (p.k + span_of<T>(p) + 2 * kWidth<T>) / kWidth<T> * kWidth<T> + 64 / static_cast<int64_t>(sizeof(T));
}

/// Tokens of a task: more share a panel of summaries in L1, fewer keep their scores in L2.
template <class T>
int64_t block_tokens(const TopkChunksParams& p) {
  constexpr int64_t kTileBytes = 192 << 10;
  const int64_t fit = kTileBytes / (kScoreRows * row_stride<T>(p) * static_cast<int64_t>(sizeof(T)));
  return kScoreRows * std::clamp<int64_t>(fit, 1, 4);
}

/// Summaries of a batch row in panels, [panels][Hk][D][kPanel]: the heads of a panel side by side, because a list over
/// all heads adds them like more channels.
template <class T>
struct PackedChunks {
  int64_t num_panels, head_size, panel_size;
  T* data;

  explicit PackedChunks(const TopkChunksParams& p)
      : num_panels(pad_to_panel<T>(p.shape.packed.key_seqlen) / kPanel<T>),
        head_size(p.shape.dim * kPanel<T>),
        panel_size(head_size * p.shape.num_key_heads),
        data(static_cast<T*>(p.workspace)) {}
  T* at(int64_t b, int64_t panel, int64_t key_head) const {
    return data + (b * num_panels + panel) * panel_size + key_head * head_size;
  }
};

template <class T>
int64_t workspace_bytes(const TopkChunksParams& p) {
  const PackedChunks<T> packed(p);
  return p.shape.packed.batch * packed.num_panels * packed.panel_size * static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t num_panels(const TopkChunksParams& p) {
  return p.shape.packed.batch * PackedChunks<T>(p).num_panels;
}

template <class T, class E>
void pack(const TopkChunksParams& p, int64_t begin, int64_t end) {
  const PackedChunks<T> packed(p);
  T squares[kPanel<T>];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / packed.num_panels, panel = i % packed.num_panels, first = panel * kPanel<T>;
    for (int64_t head = 0; head < p.shape.num_key_heads; ++head) {
      const E* rows = static_cast<const E*>(p.shape.k_sum) + p.shape.k_stride.at(b, first, head);
      pack_rows<kPanel<T>>(rows, p.shape.k_stride.token, std::min(kPanel<T>, p.shape.packed.key_seqlen - first),
                           p.shape.dim, packed.at(b, panel, head), squares);
    }
  }
}

/// Buffers of one thread.
template <class T>
struct Buffers {
  int64_t query_dims;
  Key<T>* tile;  // [tokens][row_stride]
  T* query;      // [tokens / kScoreRows][query_dims][kScoreRows]
  T* query_row;
  VisibleChunks* visible;  // [tokens]
  int64_t* num_best;       // [tokens]
  Ranking<T> best;         // [tokens][k]
  Ranking<T> found;        // [k + 1]
  Selector<T> selector;

  Buffers(const TopkChunksParams& p, Arena& arena)
      : query_dims(p.shape.dim * (p.shape.is_relu || p.shape.num_lists > 1 ? 1 : p.shape.num_key_heads)),
        tile(arena.take<Key<T>>(block_tokens<T>(p) * row_stride<T>(p))),
        query(arena.take<T>(block_tokens<T>(p) * query_dims)),
        query_row(arena.take<T>(query_dims + kWidth<T>)),
        visible(arena.take<VisibleChunks>(block_tokens<T>(p))),
        num_best(arena.take<int64_t>(block_tokens<T>(p))),
        best(Ranking<T>::take(arena, block_tokens<T>(p) * p.k)),
        found(Ranking<T>::take(arena, p.k + 1)),
        selector(arena, p.k + span_of<T>(p) + kWidth<T>, p.k) {}
};

template <class T>
int64_t scratch_bytes(const TopkChunksParams& p) {
  Arena arena(nullptr);
  Buffers<T>(p, arena);
  return arena.used();
}

/// A block of tokens of a list.
template <class T, class E>
struct Selection {
  const TopkChunksParams& p;
  const Buffers<T>& b;
  int64_t batch, list, first_token, num_tokens;

  /// Query rows of heads [head, head + num_heads), summed where they read the same summaries: products are linear.
  void pack_queries(int64_t head, int64_t num_heads) const {
    const ChunkScoreShape& shape = p.shape;
    const int64_t dims = num_heads == 1 ? shape.dim : b.query_dims;
    std::fill(b.query, b.query + (num_tokens + kScoreRows - 1) / kScoreRows * kScoreRows * dims, T{0});
    for (int64_t i = 0; i < num_tokens; ++i) {
      T* to = b.query + i / kScoreRows * kScoreRows * dims + i % kScoreRows;
      const E* q = static_cast<const E*>(shape.q) + shape.q_stride.at(batch, first_token + i, head);
      if (num_heads == 1) {
        spread_row(q, dims, to, kScoreRows);
        continue;
      }
      std::fill(b.query_row, b.query_row + dims, T{0});
      for (int64_t h = 0; h < num_heads; ++h) {
        T* sums = b.query_row + (shape.key_head(head + h) - shape.key_head(head)) * shape.dim;
        const E* row = q + h * shape.q_stride.head;
        for (int64_t d = 0; d < shape.dim; d += kWidth<T>) {
          store_lanes<T>(sums, d, shape.dim, load_lanes<T>(sums, d, shape.dim) + load_lanes<T>(row, d, shape.dim));
        }
      }
      spread_row(b.query_row, dims, to, kScoreRows);
    }
  }

  /// Products of kScoreRows tokens with a panel, as keys unless a head of the list is yet to come.
  template <bool kIsRelu>
  void score(int64_t row0, const T* panel, int64_t chunk0, Key<T>* tile, int64_t head, bool is_last) const {
    constexpr int w = kWidth<T>;
    const ChunkScoreShape& shape = p.shape;
    const int64_t dims = kIsRelu ? shape.dim : b.query_dims;
    Vec<T> acc[kScoreRows][2];
    multiply_rows<T>(acc, b.query + row0 * dims, panel, dims);
    const T scale = static_cast<T>(shape.scale);
    const bool is_first = head == list * shape.list_heads();
    const T* weights = nullptr;
    if constexpr (kIsRelu) {
      weights =
          static_cast<const T*>(shape.w) + (batch * shape.packed.seqlen + first_token + row0) * shape.num_heads + head;
    }
    Vec<T> bias[2] = {};
    if (p.bias) {
      const T* row = static_cast<const T*>(p.bias) + (batch * shape.num_lists + list) * shape.packed.key_seqlen;
      unroll<2>([&](auto half) REMORA_ALWAYS_INLINE {
        bias[half] = load_lanes<T>(row, chunk0 + half * w, shape.packed.key_seqlen);
      });
    }
    unroll<kScoreRows>([&](auto i) REMORA_ALWAYS_INLINE {
      Key<T>* to = tile + (row0 + i) * row_stride<T>(p);
      unroll<2>([&](auto half) REMORA_ALWAYS_INLINE {
        Vec<T> x = acc[i][half];
        if constexpr (kIsRelu) {
          const T weight = row0 + i < num_tokens ? weights[i * shape.num_heads] : T{0};
          x = ((x < T{0}) ? Vec<T>{} : x) * weight;
          if (!is_first) x += load<T>(reinterpret_cast<const T*>(to + half * w));
        }
        if (!kIsRelu || is_last) {
          x = p.bias ? x * scale + bias[half] : x * scale;
          store<Key<T>>(to + half * w, keys_of<T>(x));
        } else {
          store<T>(reinterpret_cast<T*>(to + half * w), x);
        }
      });
    });
  }

  /// Keys of chunks [begin, end), whole panels, with all tokens.
  void fill(int64_t begin, int64_t end) const {
    const ChunkScoreShape& shape = p.shape;
    const PackedChunks<T> packed(p);
    const int64_t head0 = list * shape.list_heads(), num_passes = shape.is_relu ? shape.list_heads() : 1;
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t head = head0 + pass;
      if (shape.is_relu) pack_queries(head, 1);
      for (int64_t chunk = begin; chunk < end; chunk += kPanel<T>) {
        const T* panel = packed.at(batch, chunk / kPanel<T>, shape.key_head(head));
        Key<T>* tile = b.tile + p.k + chunk - begin;
        for (int64_t row = 0; row < num_tokens; row += kScoreRows) {
          if (shape.is_relu) {
            score<true>(row, panel, chunk, tile, head, pass == num_passes - 1);
          } else {
            score<false>(row, panel, chunk, tile, head, true);
          }
        }
      }
    }
  }

  int64_t output_of(int64_t i) const {
    return ((batch * p.shape.packed.seqlen + first_token + i) * p.shape.num_lists + list) * p.k;
  }

  /// The best of token i among those so far and the chunks of the span [begin, end).
  void select(int64_t i, int64_t begin, int64_t end) const {
    const VisibleChunks& visible = b.visible[i];
    const int64_t first = std::max(begin, visible.begin), last = std::min(end, visible.begin + visible.count);
    if (first >= last) return;
    Key<T>* row = b.tile + i * row_stride<T>(p) + p.k;  // of chunk `begin`
    int64_t num_forced = 0;
    const auto write_forced = [&](int64_t from, int64_t to) {
      for (int64_t chunk = std::max(from, first); chunk < std::min(to, last); ++chunk, ++num_forced) {
        const int64_t out = output_of(i) + visible.slot(chunk - visible.begin);
        p.idx[out] = static_cast<int32_t>(chunk - visible.begin);
        static_cast<T*>(p.scores)[out] = score_of<T>(row[chunk - begin]);
        row[chunk - begin] = kNoKey<T>;
      }
    };
    write_forced(visible.begin, visible.begin + visible.num_first);
    write_forced(visible.begin + visible.count - visible.num_local, visible.begin + visible.count);

    const Ranking<T> best = b.best + i * p.k;
    const int64_t num_best = b.num_best[i], num_wanted = p.k - visible.num_forced();
    const int64_t num_found = std::min(num_wanted, num_best + last - first - num_forced);
    Key<T>* keys = row + first - begin - num_best;
    std::copy_n(best.keys, num_best, keys);
    store<Key<T>>(row + last - begin, broadcast(kNoKey<T>));
    if (num_found == 0) return;
    b.selector(keys, num_best + last - first, num_found, b.found);
    for (int64_t m = 0; m < num_found; ++m) {
      int32_t& position = b.found.positions[m];
      position = position < num_best ? best.positions[position]
                                     : static_cast<int32_t>(position - num_best + first - visible.begin);
    }
    std::copy_n(b.found.keys, num_found, best.keys);
    std::copy_n(b.found.positions, num_found, best.positions);
    b.num_best[i] = num_found;
  }

  void run() const {
    int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
    for (int64_t i = 0; i < num_tokens; ++i) {
      const VisibleChunks visible = visible_chunks(p, batch, first_token + i);
      b.visible[i] = visible, b.num_best[i] = 0;
      if (visible.count > 0) begin = std::min(begin, visible.begin), end = std::max(end, visible.begin + visible.count);
    }
    if (!p.shape.is_relu && begin < end) pack_queries(list * p.shape.list_heads(), p.shape.list_heads());
    const int64_t span = span_of<T>(p);
    for (int64_t from = begin / kPanel<T> * kPanel<T>; from < end; from += span) {
      const int64_t to = std::min(from + span, end);
      fill(from, from + pad_to_panel<T>(to - from));
      for (int64_t i = 0; i < num_tokens; ++i) select(i, from, to);
    }
    for (int64_t i = 0; i < num_tokens; ++i) {
      const Ranking<T> best = b.best + i * p.k;
      const int64_t num_forced = b.visible[i].num_forced(), out = output_of(i) + num_forced;
      T* scores = static_cast<T*>(p.scores) + out;
      for (int64_t m = 0; m < p.k - num_forced; ++m) {
        const bool is_found = m < b.num_best[i];
        p.idx[out + m] = is_found ? best.positions[m] : -1;
        scores[m] = is_found ? score_of<T>(best.keys[m]) : -std::numeric_limits<T>::infinity();
      }
    }
  }
};

template <class T, class E>
void select(const TopkChunksParams& p, int64_t batch, int64_t list, int64_t first_token, void* scratch) {
  Arena arena(scratch);
  const Buffers<T> buffers(p, arena);
  const int64_t num_tokens = std::min(block_tokens<T>(p), p.shape.packed.seqlen - first_token);
  Selection<T, E>{p, buffers, batch, list, first_token, num_tokens}.run();
}

template <class T, class E>
REMORA_INLINE T dot(const E* x, const E* y, int64_t dims) {
  Vec<T> acc{};
  for (int64_t d = 0; d < dims; d += kWidth<T>) acc += load_lanes<T>(x, d, dims) * load_lanes<T>(y, d, dims);
  return sum<T>(acc);
}

/// A row of lookups, and where it reads.
template <class E>
struct ScoreRow {
  const ChunkScoresParams& p;
  int64_t b, t, list, first_head;
  PackedQuery query;

  ScoreRow(const ChunkScoresParams& p, int64_t row) : p(p) {
    const ChunkScoreShape& shape = p.shape;
    list = row % shape.num_lists, first_head = list * shape.list_heads();
    t = row / shape.num_lists % shape.packed.seqlen, b = row / shape.num_lists / shape.packed.seqlen;
    query = locate_query(shape.packed, t);
  }
  bool is_chunk(int64_t idx) const { return idx >= 0 && idx < query.num_keys; }
  int64_t query_head(int64_t head) const { return (b * p.shape.packed.seqlen + t) * p.shape.num_heads + head; }
  const E* q(int64_t head) const { return static_cast<const E*>(p.shape.q) + p.shape.q_stride.at(b, t, head); }
  const E* key(int64_t idx, int64_t head) const {
    return static_cast<const E*>(p.shape.k_sum) + p.shape.k_stride.at(b, query.key_begin + idx, p.shape.key_head(head));
  }
};

template <class T, class E>
void scores_fwd(const ChunkScoresParams& p, int64_t begin, int64_t end) {
  const ChunkScoreShape& shape = p.shape;
  for (int64_t r = begin; r < end; ++r) {
    const ScoreRow<E> row(p, r);
    for (int64_t m = r * p.k; m < (r + 1) * p.k; ++m) {
      T score = -std::numeric_limits<T>::infinity();
      if (row.is_chunk(p.idx[m])) {
        score = 0;
        for (int64_t h = row.first_head; h < row.first_head + shape.list_heads(); ++h) {
          const T x = dot<T>(row.q(h), row.key(p.idx[m], h), shape.dim);
          score += shape.is_relu ? (x < T{0} ? T{0} : x) * static_cast<const T*>(shape.w)[row.query_head(h)] : x;
        }
        score *= static_cast<T>(shape.scale);
      }
      static_cast<T*>(p.scores)[m] = score;
    }
  }
}

/// Of relu: the factors of <q, k> gradients, [M, list_heads]; else they are scale d_scores.
template <class T>
int64_t bwd_workspace(const ChunkScoresParams& p) {
  return p.shape.is_relu ? p.num_lookups() * p.shape.list_heads() * static_cast<int64_t>(sizeof(T)) : 0;
}

template <class T, class E>
REMORA_INLINE void add_scaled(T* to, T factor, const E* x, int64_t dims) {
  for (int64_t d = 0; d < dims; d += kWidth<T>) store<T>(to + d, load<T>(to + d) + factor * load_lanes<T>(x, d, dims));
}

template <class T, class E>
REMORA_INLINE void write_row(E* to, const T* x, int64_t dims) {
  for (int64_t d = 0; d < dims; d += kWidth<T>) store_lanes<T>(to, d, dims, load<T>(x + d));
}

template <class T, class E>
void bwd_query(const ChunkScoresParams& p, int64_t begin, int64_t end) {
  const ChunkScoreShape& shape = p.shape;
  const T scale = static_cast<T>(shape.scale);
  // Heads that read the same summaries have the same gradient, unless relu tells them apart.
  const int64_t step = shape.is_relu ? 1 : std::min(shape.list_heads(), shape.num_heads / shape.num_key_heads);
  alignas(64) T sums[kMaxDim + kWidth<T>];
  for (int64_t r = begin; r < end; ++r) {
    const ScoreRow<E> row(p, r);
    for (int64_t h = 0; h < shape.list_heads(); h += step) {
      const int64_t head = row.first_head + h;
      const T weight = shape.is_relu ? static_cast<const T*>(shape.w)[row.query_head(head)] : T{1};
      T d_weight = 0;
      std::fill(sums, sums + shape.dim + kWidth<T>, T{0});
      for (int64_t m = r * p.k; m < (r + 1) * p.k; ++m) {
        if (!row.is_chunk(p.idx[m])) continue;
        const E* key = row.key(p.idx[m], head);
        T factor = scale * static_cast<const T*>(p.d_scores)[m];
        if (shape.is_relu) {
          const T x = dot<T>(row.q(head), key, shape.dim);
          d_weight += factor * (x < T{0} ? T{0} : x);
          factor = x <= T{0} ? T{0} : factor * weight;
          static_cast<T*>(p.workspace)[m * shape.list_heads() + h] = factor;
        }
        add_scaled(sums, factor, key, shape.dim);
      }
      for (int64_t same = head; same < head + step; ++same) {
        write_row(static_cast<E*>(p.dq) + row.query_head(same) * shape.dim, sums, shape.dim);
      }
      if (shape.is_relu) static_cast<T*>(p.dw)[row.query_head(head)] = d_weight;
    }
  }
}

template <class T, class E>
void bwd_keys(const ChunkScoresParams& p, int64_t segment) {
  const ChunkScoreShape& shape = p.shape;
  const int64_t num_chunks = shape.packed.key_seqlen, row_heads = std::min(shape.num_lists, shape.num_key_heads);
  const int64_t from = clamp_to(p.starts[segment], 0, p.num_lookups());
  const int64_t to = clamp_to(p.starts[segment + 1], from, p.num_lookups());
  const int64_t row = p.rows[segment];
  if (from == to || row < 0 || row >= shape.packed.batch * row_heads * num_chunks) return;
  const int64_t chunk = row % num_chunks, b = row / num_chunks / row_heads, row_head = row / num_chunks % row_heads;
  const bool is_shared = row_heads < shape.num_key_heads;
  alignas(64) T sums[kMaxDim + kWidth<T>];
  for (int64_t key_head = is_shared ? 0 : row_head; key_head < (is_shared ? shape.num_key_heads : row_head + 1);
       ++key_head) {
    std::fill(sums, sums + shape.dim + kWidth<T>, T{0});
    for (int64_t i = from; i < to; ++i) {
      const int64_t m = clamp_to(p.order[i], 0, p.num_lookups() - 1), r = m / p.k;
      const int64_t first_head = r % shape.num_lists * shape.list_heads(), t = r / shape.num_lists;
      const E* q = static_cast<const E*>(shape.q) +
                   shape.q_stride.at(t / shape.packed.seqlen, t % shape.packed.seqlen, first_head);
      for (int64_t h = 0; h < shape.list_heads(); ++h) {
        if (shape.key_head(first_head + h) != key_head) continue;
        const T factor = shape.is_relu ? static_cast<const T*>(p.workspace)[m * shape.list_heads() + h]
                                       : static_cast<T>(shape.scale) * static_cast<const T*>(p.d_scores)[m];
        add_scaled(sums, factor, q + h * shape.q_stride.head, shape.dim);
      }
    }
    E* out = static_cast<E*>(p.dk_sum) + ((b * num_chunks + chunk) * shape.num_key_heads + key_head) * shape.dim;
    write_row(out, sums, shape.dim);
  }
}

template <class T, class E>
constexpr TopkChunksCpuKernels kKernels = {
    workspace_bytes<T>, scratch_bytes<T>, block_tokens<T>,  pack<T, E>,      num_panels<T>,
    select<T, E>,       scores_fwd<T, E>, bwd_workspace<T>, bwd_query<T, E>, bwd_keys<T, E>,
};

}  // namespace

const TopkChunksCpuKernels& topk_chunks_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
