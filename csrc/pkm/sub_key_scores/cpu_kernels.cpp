// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <algorithm>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "pkm/cpu_sub_key.h"
#include "pkm/sub_key_scores/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

/// One distinct sub-key of a row: what the gradients need of it, in order of first appearance.
template <class T>
struct SubKeyEntry {
  int32_t key;  // -1 ends the list
  T product, key_square;
};

template <class T, class E>
void narrow(const T* row, int64_t dims, E* to) {
  for (int64_t d = 0; d < dims; d += kWidth<T>) {
    if (d + kWidth<T> <= dims) {
      store<T>(to + d, load<T>(row + d));
    } else {
      store_first<T>(to + d, load<T>(row + d), dims - d);
    }
  }
}

template <class T>
struct QueryBuffers {
  T* query;
  T* d_query;
  int32_t* entry_of_key;  // -1: none yet

  QueryBuffers(const SubKeyScoresParams& p, Arena& arena)
      : query(arena.take<T>(padded_dims<T>(p.dims))),
        d_query(arena.take<T>(padded_dims<T>(p.dims))),
        entry_of_key(arena.take<int32_t>(p.num_keys)) {}
};

template <class T>
int64_t query_scratch(const SubKeyScoresParams& p) {
  Arena arena(nullptr);
  QueryBuffers<T>(p, arena);
  return arena.used();
}

template <class T>
int64_t workspace(const SubKeyScoresParams& p) {
  return p.tokens * p.groups * (p.chosen + 1) * static_cast<int64_t>(sizeof(SubKeyEntry<T>));
}

template <class T>
SubKeyEntry<T>* entries_of(const SubKeyScoresParams& p, int64_t row) {
  return static_cast<SubKeyEntry<T>*>(p.workspace) + row * (p.chosen + 1);
}

template <class T, class E>
void fwd(const SubKeyScoresParams& p, int64_t row, void* scratch) {
  Arena arena(scratch);
  const QueryBuffers<T> b(p, arena);
  widen(static_cast<const E*>(p.query) + row * p.dims, p.dims, b.query);
  const E* keys = static_cast<const E*>(p.keys) + row % p.groups * p.num_keys * p.dims;
  for (int64_t m = row * p.chosen; m < (row + 1) * p.chosen; ++m) {
    const int64_t key = p.index[m];
    const bool is_valid = key >= 0 && key < p.num_keys;
    static_cast<T*>(p.scores)[m] = is_valid ? multiply(b.query, keys + key * p.dims, p.dims).product : T{0};
  }
}

template <class T, class E>
void bwd_query(const SubKeyScoresParams& p, int64_t row, void* scratch) {
  Arena arena(scratch);
  const QueryBuffers<T> b(p, arena);
  const bool is_dot = p.score.kind == ScoreFunction::Kind::kDot;
  const E* keys = static_cast<const E*>(p.keys) + row % p.groups * p.num_keys * p.dims;
  widen(static_cast<const E*>(p.query) + row * p.dims, p.dims, b.query);

  // Sums of d_scores of every distinct sub-key
  SubKeyEntry<T>* entries = entries_of<T>(p, row);
  int32_t num_entries = 0;
  std::fill(b.entry_of_key, b.entry_of_key + p.num_keys, -1);
  for (int64_t m = row * p.chosen; m < (row + 1) * p.chosen; ++m) {
    const int32_t key = p.index[m];
    if (key < 0 || key >= p.num_keys) continue;
    const T d = static_cast<const T*>(p.d_scores)[m];
    int32_t& entry = b.entry_of_key[key];
    if (entry < 0) {
      entry = num_entries;
      entries[num_entries++] = {key, d, T{0}};
    } else {
      entries[entry].product += d;
    }
  }
  entries[num_entries].key = -1;

  T query_square = 0;  // gradient of <q, q>
  if (!is_dot) {
    Vec<T> squares{};
    for (int64_t d = 0; d < p.dims; d += kWidth<T>) squares += load<T>(b.query + d) * load<T>(b.query + d);
    const T square = sum<T>(squares);
    for (int32_t i = 0; i < num_entries; ++i) {
      const Products<T> x = multiply(b.query, keys + entries[i].key * p.dims, p.dims);
      const ScoreGradient<T> g =
          score_gradient(p.score, entries[i].product, x.product, square, x.key_square, x.distance);
      entries[i].product = g.product, entries[i].key_square = g.key_square;
      query_square += g.query_square;
    }
  }
  for (int64_t d = 0; d < p.dims; d += kWidth<T>) {
    Vec<T> sum = 2 * query_square * load<T>(b.query + d);
    for (int32_t i = 0; i < num_entries; ++i) {
      sum += entries[i].product * load_part<T>(keys + entries[i].key * p.dims, d, p.dims);
    }
    store<T>(b.d_query + d, sum);
  }
  narrow(b.d_query, p.dims, static_cast<E*>(p.d_query) + row * p.dims);
}

/// Sub-keys whose gradients stay in L2 while the tokens pass.
template <class T>
int64_t block_keys(const SubKeyScoresParams& p) {
  constexpr int64_t kBytes = 96 << 10;
  return std::clamp<int64_t>(kBytes / (padded_dims<T>(p.dims) * static_cast<int64_t>(sizeof(T))), 8, 1024);
}

template <class T>
struct KeyBuffers {
  T* sums;         // [block_keys][padded_dims]
  T* key_squares;  // [block_keys]
  T* row;          // a query, or a sub-key

  KeyBuffers(const SubKeyScoresParams& p, Arena& arena)
      : sums(arena.take<T>(block_keys<T>(p) * padded_dims<T>(p.dims))),
        key_squares(arena.take<T>(block_keys<T>(p))),
        row(arena.take<T>(padded_dims<T>(p.dims))) {}
};

template <class T>
int64_t keys_scratch(const SubKeyScoresParams& p) {
  Arena arena(nullptr);
  KeyBuffers<T>(p, arena);
  return arena.used();
}

template <class T>
REMORA_INLINE void add_scaled(T* to, T scale, const T* x, int64_t dims) {
  for (int64_t d = 0; d < dims; d += kWidth<T>) store<T>(to + d, load<T>(to + d) + scale * load<T>(x + d));
}

template <class T, class E>
void bwd_keys(const SubKeyScoresParams& p, int64_t group, int64_t first, void* scratch) {
  Arena arena(scratch);
  const KeyBuffers<T> b(p, arena);
  const int64_t num_keys = std::min(block_keys<T>(p), p.num_keys - first), stride = padded_dims<T>(p.dims);
  std::fill(b.sums, b.sums + num_keys * stride, T{0});
  std::fill(b.key_squares, b.key_squares + num_keys, T{0});
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t row = token * p.groups + group;
    bool has_query = false;
    for (const SubKeyEntry<T>* entry = entries_of<T>(p, row); entry->key >= 0; ++entry) {
      const int64_t key = entry->key - first;
      if (key < 0 || key >= num_keys) continue;
      if (!has_query) widen(static_cast<const E*>(p.query) + row * p.dims, p.dims, b.row), has_query = true;
      add_scaled(b.sums + key * stride, entry->product, b.row, p.dims);
      b.key_squares[key] += entry->key_square;
    }
  }
  const bool is_dot = p.score.kind == ScoreFunction::Kind::kDot;
  for (int64_t key = 0; key < num_keys; ++key) {
    const int64_t row = (group * p.num_keys + first + key) * p.dims;
    T* sums = b.sums + key * stride;
    if (!is_dot) {
      widen(static_cast<const E*>(p.keys) + row, p.dims, b.row);
      add_scaled(sums, 2 * b.key_squares[key], b.row, p.dims);
    }
    narrow(sums, p.dims, static_cast<E*>(p.d_keys) + row);
  }
}

template <class T, class E>
constexpr SubKeyScoresCpuKernels kKernels = {
    workspace<T>, query_scratch<T>, keys_scratch<T>, block_keys<T>, fwd<T, E>, bwd_query<T, E>, bwd_keys<T, E>,
};

}  // namespace

const SubKeyScoresCpuKernels& sub_key_scores_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
