// Four neighbouring elements of a tensor in one load or store.
#pragma once
#include <type_traits>

namespace remora {

/// As in memory: turning them into floats waits for them.
template <typename T>
union FourElements {
  std::conditional_t<sizeof(T) == 4, uint4, uint2> bits;
  T element[4];
  __device__ FourElements() : bits{} {}

  __device__ __forceinline__ void to_floats(float (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(element[i]);
  }
};

/// Zeros from element `num_valid` on. is_vector: src is aligned to its four elements, and all or none of them are
/// valid.
template <typename T>
__device__ __forceinline__ FourElements<T> load_4(const T* src, int num_valid, bool is_vector) {
  FourElements<T> x;
  if (is_vector) {
    if (num_valid > 0) x.bits = *reinterpret_cast<const decltype(x.bits)*>(src);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < num_valid) x.element[i] = src[i];
    }
  }
  return x;
}

template <typename T>
__device__ __forceinline__ void store_4(T* dst, const float (&value)[4], int num_valid, bool is_vector) {
  FourElements<T> x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.element[i] = static_cast<T>(value[i]);
  if (is_vector) {
    // Not an assignment: the compiler makes several stores of it.
    if (num_valid > 0) __stwb(reinterpret_cast<decltype(x.bits)*>(dst), x.bits);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < num_valid) dst[i] = x.element[i];
    }
  }
}

}  // namespace remora
