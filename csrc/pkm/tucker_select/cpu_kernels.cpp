// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "common/cpu/select.h"
#include "pkm/tucker_select/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kMaxRank = 8;

template <class T>
struct Buffers {
  T* columns;  // [r][m], and a vector behind
  Key<T>* keys;
  Ranking<T> best;
  Selector<T> selector;

  Buffers(const TuckerSelectParams& p, Arena& arena)
      : columns(arena.take<T>(p.rank * p.candidates + kWidth<T>)),
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

template <class T>
void select(const TuckerSelectParams& p, int64_t row, void* scratch) {
  Arena arena(scratch);
  const Buffers<T> b(p, arena);
  const int64_t size = p.rank * p.candidates;
  const T* sub_scores = static_cast<const T*>(p.sub_scores) + row * 2 * size;
  const T* core = static_cast<const T*>(p.core) + row % p.heads * p.rank * p.rank;
  std::copy(sub_scores + size, sub_scores + 2 * size, b.columns);
  std::fill(b.columns + size, b.columns + size + kWidth<T>, T{0});
  score_group(p, sub_scores, core, 0, p.positive, b.columns, b.keys);
  if (p.positive < p.candidates) {
    score_group(p, sub_scores, core, p.positive, p.candidates, b.columns, b.keys + p.num_first_pairs());
  }
  b.selector(b.keys, p.num_pairs(), p.topk, b.best);
  for (int64_t i = 0; i < p.topk; ++i) p.pairs[row * p.topk + i] = tucker_pair(p, b.best.positions[i]);
}

template <class T>
constexpr TuckerSelectCpuKernels kKernels = {scratch_bytes<T>, select<T>};

}  // namespace

const TuckerSelectCpuKernels& tucker_select_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? kKernels<double> : kKernels<float>;
}

}  // namespace remora::REMORA_CPU_ISA
