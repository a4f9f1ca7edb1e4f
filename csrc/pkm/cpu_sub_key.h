// A sub-key against a query half: rows of ds elements, the query's padded with zeros to whole vectors of T.
#pragma once
#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

template <class T>
constexpr int64_t padded_dims(int64_t dims) {
  return (dims + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

template <class T, class E>
REMORA_INLINE Vec<T> load_part(const E* row, int64_t d, int64_t dims) {
  return d + kWidth<T> <= dims ? load<T>(row + d) : load_first<T>(row + d, dims - d);
}

template <class T, class E>
void widen(const E* row, int64_t dims, T* to) {
  for (int64_t d = 0; d < dims; d += kWidth<T>) store<T>(to + d, load_part<T>(row, d, dims));
}

template <class T>
struct Products {
  T product, key_square, distance;
};

/// <q, K>, <K, K> and |q - K|^2.
template <class T, class E>
REMORA_INLINE Products<T> multiply(const T* query, const E* key, int64_t dims) {
  Vec<T> product{}, square{}, distance{};
  for (int64_t d = 0; d < dims; d += kWidth<T>) {
    const Vec<T> q = load<T>(query + d), k = load_part<T>(key, d, dims);
    product += q * k, square += k * k, distance += (q - k) * (q - k);
  }
  return {sum<T>(product), sum<T>(square), sum<T>(distance)};
}

}  // namespace remora::REMORA_CPU_ISA
