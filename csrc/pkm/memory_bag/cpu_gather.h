// The inner loop of every bag: K rows from anywhere, added up with weights, multiplied with a fixed row, or both.
#pragma once
#include <cstdint>

#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

/// Rows that are read together.
constexpr int kGatherRows = 4;

template <class T, class E>
REMORA_INLINE Vec<T> load_lanes(const E* p, int64_t lanes) {
  return lanes >= kWidth<T> ? load<T>(p) : load_first<T>(p, lanes);
}
template <class T, class E>
REMORA_INLINE void store_lanes(E* p, int64_t lanes, Vec<T> x) {
  if (lanes >= kWidth<T>) {
    store<T>(p, x);
  } else {
    store_first<T>(p, x, lanes);
  }
}

/// sum[c] (+)= weights[0] rows[0][c] + ... + weights[K-1] rows[K-1][c] if kSum, in this order; dots[k] =
/// sum over c of fixed[c] rows[k][c] if kDots, in an order that K does not change; c from 0 to width - 1. Meanwhile the
/// rows of `next` are fetched.
template <int K, bool kSum, bool kDots, class T, class E>
REMORA_INLINE void gather(const E* const* rows, const E* const* next, int64_t width, bool is_first, const T* weights,
                          T* sum, const E* fixed, T* dots) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(E));
  Vec<T> dot[K][2] = {}, weight[K];
  unroll<K>([&](auto k) REMORA_ALWAYS_INLINE {
    if constexpr (kSum) weight[k] = broadcast(weights[k]);
  });
  const auto step = [&](int64_t c, int part, int64_t lanes) REMORA_ALWAYS_INLINE {
    Vec<T> other{}, total{};
    if constexpr (kDots) other = load_lanes<T>(fixed + c, lanes);
    if constexpr (kSum) total = is_first ? Vec<T>{} : load_lanes<T>(sum + c, lanes);
    unroll<K>([&](auto k) REMORA_ALWAYS_INLINE {
      const Vec<T> x = load_lanes<T>(rows[k] + c, lanes);
      if constexpr (kSum) total += weight[k] * x;
      if constexpr (kDots) dot[k][part] += other * x;
    });
    if constexpr (kSum) store_lanes<T>(sum + c, lanes, total);
  };
  int64_t c = 0;
  for (; c + kLine <= width; c += kLine) {
    unroll<K>([&](auto k) REMORA_ALWAYS_INLINE { __builtin_prefetch(next[k] + c, 0, 3); });
    unroll<kLine / kWidth<T>>([&](auto i) REMORA_ALWAYS_INLINE { step(c + i * kWidth<T>, i % 2, kWidth<T>); });
  }
  for (; c < width; c += kWidth<T>) step(c, 0, width - c);
  if constexpr (kDots)
    unroll<K>([&](auto k) REMORA_ALWAYS_INLINE { dots[k] = remora::REMORA_CPU_ISA::sum<T>(dot[k][0] + dot[k][1]); });
}

/// As above for 1 ... kGatherRows rows.
template <bool kSum, bool kDots, class T, class E>
REMORA_INLINE void gather(int count, const E* const* rows, const E* const* next, int64_t width, bool is_first,
                          const T* weights, T* sum, const E* fixed, T* dots) {
  static_assert(kGatherRows == 4);
  switch (count) {
    case 1:
      return gather<1, kSum, kDots>(rows, next, width, is_first, weights, sum, fixed, dots);
    case 2:
      return gather<2, kSum, kDots>(rows, next, width, is_first, weights, sum, fixed, dots);
    case 3:
      return gather<3, kSum, kDots>(rows, next, width, is_first, weights, sum, fixed, dots);
    default:
      return gather<4, kSum, kDots>(rows, next, width, is_first, weights, sum, fixed, dots);
  }
}

}  // namespace remora::REMORA_CPU_ISA
