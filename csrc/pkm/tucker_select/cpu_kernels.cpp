// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "common/cpu/element_types.h"
#include "common/cpu/select.h"
#include "pkm/cpu_sub_key.h"
#include "pkm/tucker_select/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kMaxRank = 8;

template <class T>
struct Buffers {
  T* query;    // a row, padded
  T* rows;     // [r][m]
  T* columns;  // [r][m], and a vector behind
  Key<T>* keys;
  Ranking<T> best;
  Selector<T> selector;

  Buffers(const TuckerSelectParams& p, Arena& arena)
      : query(arena.take<T>(padded_dims<T>(p.dims))),
        rows(arena.take<T>(p.rank * p.candidates)),
        columns(arena.take<T>(p.rank * p.candidates + kWidth<T>)),
        keys(arena.take<Key<T>>(p.num_pairs() + 2 * kWidth<T>)),
        best(Ranking<T>::take(arena, p.topk + 1)),
        selector(arena, p.num_pairs(), p.topk) {}
};

template <class T>
int64_t scratch_bytes(const TuckerSelectParams& p) {
  Arena arena(nullptr);
  Buffers<T>(p, arena);
  return arena.used();
}

/// Keys of rows [first, end) with columns [first, end), whole vectors at a time.
template <class T>
void score_group(const TuckerSelectParams& p, const T* rows, const T* core, int64_t first, int64_t end,
                 const T* columns, Key<T>* keys) {
  const int64_t m = p.candidates;
  for (int64_t row = first; row < end; ++row, keys += end - first) {
    T weights[kMaxRank];
    for (int64_t s = 0; s < p.rank; ++s) {
      weights[s] = 0;
      for (int64_t r = 0; r < p.rank; ++r) weights[s] += rows[r * m + row] * core[r * p.rank + s];
    }
    for (int64_t i = first; i < end; i += kWidth<T>) {
      Vec<T> sum{};
      for (int64_t s = 0; s < p.rank; ++s) sum += weights[s] * load<T>(columns + s * m + i);
      store<Key<T>>(keys + i - first, keys_of<T>(sum));
    }
  }
  store<Key<T>>(keys, broadcast(kNoKey<T>));
}

/// [r][m] scores of the candidates of an axis.
template <class T, class E>
void score_axis(const TuckerSelectParams& p, int64_t row, int64_t axis, T* query, T* scores) {
  const int32_t* index = p.index + (row * 2 + axis) * p.candidates;
  for (int64_t r = 0; r < p.rank; ++r) {
    widen(static_cast<const E*>(p.query) + ((row * 2 + axis) * p.rank + r) * p.dims, p.dims, query);
    const int64_t group = (row % p.heads * 2 + axis) * p.rank + r;
    const E* keys = static_cast<const E*>(p.keys) + group * p.num_keys * p.dims;
    for (int64_t i = 0; i < p.candidates; ++i) {
      const bool is_valid = index[i] >= 0 && index[i] < p.num_keys;
      scores[r * p.candidates + i] = is_valid ? multiply(query, keys + index[i] * p.dims, p.dims).product : T{0};
    }
  }
}

template <class T, class E>
void select(const TuckerSelectParams& p, int64_t row, void* scratch) {
  Arena arena(scratch);
  const Buffers<T> b(p, arena);
  const int64_t size = p.rank * p.candidates;
  const T* core = static_cast<const T*>(p.core) + row % p.heads * p.rank * p.rank;
  score_axis<T, E>(p, row, 0, b.query, b.rows);
  score_axis<T, E>(p, row, 1, b.query, b.columns);
  std::fill(b.columns + size, b.columns + size + kWidth<T>, T{0});
  score_group(p, b.rows, core, 0, p.positive, b.columns, b.keys);
  if (p.positive < p.candidates) {
    score_group(p, b.rows, core, p.positive, p.candidates, b.columns, b.keys + p.num_first_pairs());
  }
  b.selector(b.keys, p.num_pairs(), p.topk, b.best);

  const int32_t* index = p.index + row * 2 * p.candidates;
  int32_t* chosen = p.chosen + row * 2 * p.topk;
  T* sub_scores = static_cast<T*>(p.sub_scores) + row * 2 * p.rank * p.topk;
  for (int64_t i = 0; i < p.topk; ++i) {
    const TuckerPair pair = tucker_pair(p, b.best.positions[i]);
    chosen[i] = index[pair.row], chosen[p.topk + i] = index[p.candidates + pair.column];
    for (int64_t r = 0; r < p.rank; ++r) {
      sub_scores[r * p.topk + i] = b.rows[r * p.candidates + pair.row];
      sub_scores[(p.rank + r) * p.topk + i] = b.columns[r * p.candidates + pair.column];
    }
  }
}

template <class T, class E>
constexpr TuckerSelectCpuKernels kKernels = {scratch_bytes<T>, select<T, E>};

}  // namespace

const TuckerSelectCpuKernels& tucker_select_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
