// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "common/cpu/element_types.h"
#include "pkm/cpu_score.h"
#include "pkm/pk_topk/cpu.h"
#include "pkm/pk_topk/staircase.h"

namespace remora::REMORA_CPU_ISA {
namespace {

/// Tokens of a task: more share a panel of keys in L1, fewer keep their scores in L2.
template <class T>
int64_t block_tokens(const PkTopkParams& p) {
  constexpr int64_t kTileBytes = 128 << 10;
  const int64_t fit = kTileBytes / (kScoreRows * p.num_keys * static_cast<int64_t>(sizeof(T)));
  return kScoreRows * std::clamp<int64_t>(fit, 1, 4);
}

/// Buffers of one thread.
template <class T>
struct Buffers {
  int64_t row_stride;  // of the tile; a multiple of 4096 bytes would put all rows into the same sets of L1
  Key<T>* tile;
  T* query;
  T* query_squares;
  int64_t ranking_stride;
  Ranking<T> rankings[2];  // [tokens] of each axis
  Ranking<T> pairs;
  Key<T>* sums;
  int32_t* ranks;  // row rank << 16 | column rank, by position in the staircase
  Selector<T> selector;

  Buffers(const PkTopkParams& p, Arena& arena)
      : row_stride(pad_to_panel<T>(p.num_keys) + 64 / static_cast<int64_t>(sizeof(T))),
        tile(arena.take<Key<T>>(block_tokens<T>(p) * row_stride)),
        query(arena.take<T>(p.sub_scores ? 0 : block_tokens<T>(p) * p.dims)),
        query_squares(arena.take<T>(block_tokens<T>(p))),
        ranking_stride(std::max(p.candidates, p.lowest) + 1),
        rankings{Ranking<T>::take(arena, block_tokens<T>(p) * ranking_stride),
                 Ranking<T>::take(arena, block_tokens<T>(p) * ranking_stride)},
        pairs(Ranking<T>::take(arena, p.topk + 1)),
        sums(arena.take<Key<T>>(num_pairs(p) + p.candidates + 2 * kWidth<T>)),
        ranks(arena.take<int32_t>(num_pairs(p))),
        selector(arena, std::max(p.num_keys, num_pairs(p)), std::max(ranking_stride, p.topk)) {}

  static int64_t num_pairs(const PkTopkParams& p) {
    return p.output == PkTopkParams::Output::kPairs ? staircase_size(p.topk, p.candidates) : 0;
  }
};

template <class T>
int64_t scratch_bytes(const PkTopkParams& p) {
  Arena arena(nullptr);
  Buffers<T>(p, arena);
  return arena.used();
}

/// Where the sub-keys of every axis lie in the workspace.
template <class T>
struct PackedKeys {
  int64_t size, squares_size;
  T* keys;

  explicit PackedKeys(const PkTopkParams& p)
      : size(pad_to_panel<T>(p.num_keys) * p.dims),
        squares_size(pad_to_panel<T>(p.num_keys)),
        keys(static_cast<T*>(p.workspace)) {}
  T* of(int64_t axis) const { return keys + axis * (size + squares_size); }
  T* squares_of(int64_t axis) const { return of(axis) + size; }
};

template <class T>
int64_t workspace_bytes(const PkTopkParams& p) {
  const PackedKeys<T> packed(p);
  return 2 * p.heads * (packed.size + packed.squares_size) * static_cast<int64_t>(sizeof(T));
}

template <class T, class E>
void pack(const PkTopkParams& p, int64_t axis) {
  const PackedKeys<T> packed(p);
  pack_rows<kPanel<T>>(static_cast<const E*>(p.keys) + axis * p.num_keys * p.dims, p.dims, p.num_keys, p.dims,
                       packed.of(axis), packed.squares_of(axis));
}

/// Scores of an axis of a block of tokens.
template <class T, class E>
void fill_tile(const PkTopkParams& p, int64_t head, int axis, int64_t first, int64_t tokens, const Buffers<T>& b) {
  const int64_t stride = p.heads * 2, column = head * 2 + axis;
  if (!p.sub_scores) {
    const PackedKeys<T> packed(p);
    const E* query = static_cast<const E*>(p.query) + (first * stride + column) * p.dims;
    pack_rows<kScoreRows>(query, stride * p.dims, tokens, p.dims, b.query, b.query_squares);
    ScoreTile<T>{p.num_keys, p.dims,          b.row_stride, p.score, packed.of(column), packed.squares_of(column),
                 b.query,    b.query_squares, b.tile}
        .fill(tokens);
    return;
  }
  for (int64_t token = 0; token < tokens; ++token) {
    const E* scores = static_cast<const E*>(p.sub_scores) + ((first + token) * stride + column) * p.num_keys;
    Key<T>* row = b.tile + token * b.row_stride;
    int64_t i = 0;
    for (; i + kWidth<T> <= p.num_keys; i += kWidth<T>) store<Key<T>>(row + i, keys_of<T>(load<T>(scores + i)));
    for (; i < p.num_keys; ++i) row[i] = key_of(load_one<T>(scores + i));
    for (; i < pad_to_panel<T>(p.num_keys); ++i) row[i] = kNoKey<T>;
  }
}

/// Sums of a row and of `width` columns; writes whole vectors.
template <class T>
REMORA_INLINE void add_row(Key<T> row_key, const Key<T>* column_keys, int64_t width, Key<T>* sums) {
  const T row = score_of<T>(row_key);
  for (int64_t i = 0; i < width; i += kWidth<T>) {
    const Vec<Key<T>> keys = load<Key<T>>(column_keys + i);
    const Vec<T> column = reinterpret_cast<Vec<T>>(keys ^ ((keys >> (8 * sizeof(T) - 1)) & kGreatestKey<T>));
    Vec<T> sum = row + column;
    if (__builtin_isinf(row)) {
      // The order of sums must follow that of the terms: opposite infinities give -infinity.
      sum = (sum != sum) & (column == column) ? broadcast(-std::numeric_limits<T>::infinity()) : sum;
    }
    store<Key<T>>(sums + i, keys_of<T>(sum));
  }
}

/// The best pairs of a token from the rankings of its axes.
template <class T>
void combine(const PkTopkParams& p, Ranking<T> rows, Ranking<T> columns, const Buffers<T>& b, T* scores,
             int32_t* slots) {
  int64_t num_pairs = 0;
  for (int64_t rank = 0; rank < staircase_rows(p.topk, p.candidates); ++rank) {
    const int64_t width = staircase_width(rank, p.topk, p.candidates);
    add_row<T>(rows.keys[rank], columns.keys, width, b.sums + num_pairs);
    num_pairs += width;
  }
  store<Key<T>>(b.sums + num_pairs, broadcast(kNoKey<T>));
  b.selector(b.sums, num_pairs, p.topk, b.pairs);
  for (int64_t m = 0; m < p.topk; ++m) {
    const int32_t ranks = b.ranks[b.pairs.positions[m]];
    scores[m] = score_of<T>(b.pairs.keys[m]);
    slots[m] = rows.positions[ranks >> 16] * static_cast<int32_t>(p.num_keys) + columns.positions[ranks & 0xffff];
  }
}

/// The order of an axis: its best, and its worst, which are the best of the reversed order.
template <class T>
void write_axis(const PkTopkParams& p, Key<T>* row, const Buffers<T>& b, T* scores, int32_t* index) {
  const int64_t n = p.num_keys;
  const Ranking<T> best = b.rankings[0], worst = b.rankings[1];
  b.selector(row, n, p.candidates, best);
  for (int64_t m = 0; m < p.candidates; ++m) scores[m] = score_of<T>(best.keys[m]), index[m] = best.positions[m];
  if (p.lowest == 0) return;
  std::reverse(row, row + n);
  for (int64_t i = 0; i < n; ++i) row[i] = ~row[i];
  b.selector(row, n, p.lowest, worst);
  for (int64_t m = 0; m < p.lowest; ++m) {
    scores[p.candidates + m] = score_of<T>(~worst.keys[m]);
    index[p.candidates + m] = static_cast<int32_t>(n - 1) - worst.positions[m];
  }
}

template <class T, class E>
void select(const PkTopkParams& p, int64_t head, int64_t first, void* scratch) {
  Arena arena(scratch);
  const Buffers<T> b(p, arena);
  const int64_t tokens = std::min(block_tokens<T>(p), p.tokens - first);
  const bool is_pairs = p.output == PkTopkParams::Output::kPairs;
  T* scores = static_cast<T*>(p.scores);
  for (int axis = 0; axis < 2; ++axis) {
    fill_tile<T, E>(p, head, axis, first, tokens, b);
    for (int64_t token = 0; token < tokens; ++token) {
      Key<T>* row = b.tile + token * b.row_stride;
      if (is_pairs) {
        b.selector(row, p.num_keys, p.candidates, b.rankings[axis] + token * b.ranking_stride);
      } else {
        const int64_t to = (((first + token) * p.heads + head) * 2 + axis) * (p.candidates + p.lowest);
        write_axis(p, row, b, scores + to, p.index + to);
      }
    }
  }
  if (!is_pairs) return;
  int32_t* ranks = b.ranks;
  for (int32_t row = 0; row < staircase_rows(p.topk, p.candidates); ++row) {
    for (int32_t column = 0; column < staircase_width(row, p.topk, p.candidates); ++column) {
      *ranks++ = row << 16 | column;
    }
  }
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t to = ((first + token) * p.heads + head) * p.topk, offset = token * b.ranking_stride;
    combine(p, b.rankings[0] + offset, b.rankings[1] + offset, b, scores + to, p.index + to);
  }
}

template <class T>
void select_bwd(const PkSelectBwdParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.num_keys;
  for (int64_t row = begin; row < end; ++row) {
    T* sums = static_cast<T*>(p.d_sub_scores) + row * 2 * n;
    std::fill(sums, sums + 2 * n, T{0});
    for (int64_t m = row * p.topk; m < (row + 1) * p.topk; ++m) {
      const int64_t slot = p.slots[m];
      if (slot < 0 || slot >= n * n) continue;
      const T d = static_cast<const T*>(p.d_scores)[m];
      sums[slot / n] += d, sums[n + slot % n] += d;
    }
  }
}

template <class T, class E>
constexpr PkTopkCpuKernels kKernels = {workspace_bytes<T>, scratch_bytes<T>, block_tokens<T>,
                                       pack<T, E>,         select<T, E>,     select_bwd<T>};

}  // namespace

const PkTopkCpuKernels& pk_topk_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
