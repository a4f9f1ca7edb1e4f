// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu/element_types.h"
#include "common/cpu/simd.h"
#include "routed/mom/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

/// Rank of a logit: NaN ranks as -inf.
template <class T>
T rank_of(T x) {
  return x == x ? x : -std::numeric_limits<T>::infinity();
}

template <class T, class E>
void route_fwd(const MomRouteParams& p, int64_t begin, int64_t end) {
  const int64_t M = p.num_memories;
  for (int64_t row = begin; row < end; ++row) {
    const E* logits = static_cast<const E*>(p.logits) + row * M;
    T* weights = static_cast<T*>(p.weights) + row * p.topk;
    int32_t* indices = p.indices + row * p.topk;
    T* lse = static_cast<T*>(p.lse) + row;
    if (p.mask && !p.mask[row]) {
      for (int64_t j = 0; j < p.topk; ++j) weights[j] = 0, indices[j] = -1;
      *lse = 0;
      continue;
    }
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t e = 0; e < M; ++e) largest = std::max(largest, rank_of(load_one<T>(logits + e)));
    T sum = 0;
    for (int64_t e = 0; e < M; ++e) sum += std::exp(load_one<T>(logits + e) - largest);
    *lse = largest + std::log(sum);

    T last = std::numeric_limits<T>::infinity(), chosen = *lse - *lse;  // zero, or NaN if a logit is
    int64_t last_index = -1;
    for (int64_t j = 0; j < p.topk; ++j) {
      T best = 0;
      int64_t index = -1;
      for (int64_t e = 0; e < M; ++e) {
        const T x = rank_of(load_one<T>(logits + e));
        if (x < last || (x == last && e > last_index)) {
          if (index < 0 || x > best) best = x, index = e;
        }
      }
      indices[j] = static_cast<int32_t>(index);
      weights[j] = std::exp(load_one<T>(logits + index) - (p.renormalize ? largest : *lse));
      chosen += weights[j];
      last = best, last_index = index;
    }
    for (int64_t j = 0; p.renormalize && j < p.topk; ++j) weights[j] /= chosen;
  }
}

/// Sums of a block of tokens: of the probabilities [M] and of lse^2; how many chose each memory [M], and how many are
/// no padding.
template <class T>
struct LossSums {
  T* sums;
  int64_t* counts;

  LossSums(const MomRouteParams& p, int64_t block) {
    const int64_t size = p.num_memories + 1;
    int64_t* const words = static_cast<int64_t*>(p.workspace) + 2 * block * size;
    counts = words, sums = reinterpret_cast<T*>(words + size);
  }
};

template <class T, class E>
void route_partial(const MomRouteParams& p, int64_t block) {
  const int64_t M = p.num_memories;
  const LossSums<T> of(p, block);
  std::fill(of.sums, of.sums + M + 1, T{0});
  std::fill(of.counts, of.counts + M + 1, 0);
  for (int64_t row = block * kLossRows; row < std::min(p.rows, (block + 1) * kLossRows); ++row) {
    if (p.mask && !p.mask[row]) continue;
    const T lse = static_cast<const T*>(p.lse)[row];
    for (int64_t e = 0; e < M; ++e)
      of.sums[e] += std::exp(load_one<T>(static_cast<const E*>(p.logits) + row * M + e) - lse);
    for (int64_t j = 0; j < p.topk; ++j) ++of.counts[p.indices[row * p.topk + j]];
    of.sums[M] += lse * lse;
    ++of.counts[M];
  }
}

template <class T>
void route_losses(const MomRouteParams& p) {
  const int64_t M = p.num_memories;
  const LossSums<T> all(p, 0);
  for (int64_t block = 1; block < loss_blocks(p); ++block) {
    const LossSums<T> of(p, block);
    for (int64_t e = 0; e <= M; ++e) all.sums[e] += of.sums[e], all.counts[e] += of.counts[e];
  }
  const T n = static_cast<T>(std::max<int64_t>(1, all.counts[M]));
  T balance = 0;
  for (int64_t e = 0; e < M; ++e) balance += static_cast<T>(all.counts[e]) / n * (all.sums[e] / n);
  for (int64_t e = 0; e <= M; ++e) p.counts[e] = static_cast<int32_t>(all.counts[e]);
  static_cast<T*>(p.losses)[0] = static_cast<T>(M) * balance;
  static_cast<T*>(p.losses)[1] = all.sums[M] / n;
}

template <class T, class E>
void route_bwd(const MomRouteParams& p, int64_t begin, int64_t end) {
  const int64_t M = p.num_memories;
  const T n = p.with_losses ? static_cast<T>(std::max<int64_t>(1, p.counts[M])) : T{1};
  const T d_balance = p.with_losses ? static_cast<const T*>(p.d_losses)[0] * static_cast<T>(M) / n / n : T{0};
  const T d_z = p.with_losses ? static_cast<const T*>(p.d_losses)[1] * 2 / n : T{0};
  for (int64_t row = begin; row < end; ++row) {
    const E* logits = static_cast<const E*>(p.logits) + row * M;
    E* d_logits = static_cast<E*>(p.d_logits) + row * M;
    if (p.mask && !p.mask[row]) {
      for (int64_t e = 0; e < M; ++e) store_one(d_logits + e, T{0});
      continue;
    }
    const T* weights = static_cast<const T*>(p.weights) + row * p.topk;
    const T* d_weights = static_cast<const T*>(p.d_weights) + row * p.topk;
    const int32_t* indices = p.indices + row * p.topk;
    const T lse = static_cast<const T*>(p.lse)[row];
    T dot = 0, d_mean = 0;
    for (int64_t j = 0; j < p.topk; ++j) dot += weights[j] * d_weights[j];
    for (int64_t e = 0; p.with_losses && e < M; ++e) {
      d_mean += std::exp(load_one<T>(logits + e) - lse) * static_cast<T>(p.counts[e]);
    }
    for (int64_t e = 0; e < M; ++e) {
      const T probability = std::exp(load_one<T>(logits + e) - lse);
      T d = p.renormalize ? T{0} : -probability * dot;
      for (int64_t j = 0; j < p.topk; ++j) {
        if (indices[j] == e) d += weights[j] * (d_weights[j] - (p.renormalize ? dot : T{0}));
      }
      if (p.with_losses) d += probability * (d_balance * (static_cast<T>(p.counts[e]) - d_mean) + d_z * lse);
      store_one(d_logits + e, d);
    }
  }
}

template <class T, class E>
void combine_fwd(const MomCombineParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* weights = static_cast<const T*>(p.weights) + row * p.topk;
    E* out = static_cast<E*>(p.out) + row * p.channels;
    for (int64_t c = 0; c < p.channels; c += kWidth<T>) {
      const int64_t lanes = std::min<int64_t>(kWidth<T>, p.channels - c);
      Vec<T> sum{};
      for (int64_t j = 0; j < p.choices; ++j) {
        const T weight = j < p.topk ? weights[j] : T{1};
        sum += broadcast<T>(weight) *
               load_first<T>(static_cast<const E*>(p.o) + (j * p.rows + row) * p.channels + c, lanes);
      }
      store_first<T>(out + c, sum, lanes);
    }
  }
}

template <class T, class E>
void combine_bwd(const MomCombineParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const E* d_out = static_cast<const E*>(p.d_out) + row * p.channels;
    for (int64_t j = 0; j < p.choices; ++j) {
      const int64_t base = (j * p.rows + row) * p.channels;
      const T weight = j < p.topk ? static_cast<const T*>(p.weights)[row * p.topk + j] : T{1};
      Vec<T> dots{};
      for (int64_t c = 0; c < p.channels; c += kWidth<T>) {
        const int64_t lanes = std::min<int64_t>(kWidth<T>, p.channels - c);
        const Vec<T> d = load_first<T>(d_out + c, lanes);
        store_first<T>(static_cast<E*>(p.d_o) + base + c, broadcast<T>(weight) * d, lanes);
        dots += d * load_first<T>(static_cast<const E*>(p.o) + base + c, lanes);
      }
      T dot = 0;
      for (int lane = 0; lane < kWidth<T>; ++lane) dot += dots[lane];
      if (j < p.topk) static_cast<T*>(p.d_weights)[row * p.topk + j] = dot;
    }
  }
}

template <class T, class E>
constexpr MomCpuKernels kKernels = {route_fwd<T, E>, route_partial<T, E>, route_losses<T>,
                                    route_bwd<T, E>, combine_fwd<T, E>,   combine_bwd<T, E>};

}  // namespace

const MomCpuKernels& mom_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
