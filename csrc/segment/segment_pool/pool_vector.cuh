// Neighbouring channels of one thread, and where its head and channels lie.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "segment/segment_pool/params.h"

namespace remora {

enum class PoolKind { kLinear, kMax, kSoftmax, kWeighted };

constexpr int kPoolThreads = 128;

/// VEC elements as floats: 16 bytes at once, or one element of tensors that do not allow it.
template <typename T, int VEC>
__device__ __forceinline__ void load_vector(float (&x)[VEC], const T* src) {
  if constexpr (VEC == 1) {
    x[0] = static_cast<float>(*src);
  } else {
    static_assert(VEC * sizeof(T) == 16);
    union {
      uint4 bits;
      T element[VEC];
    } loaded;
    loaded.bits = *reinterpret_cast<const uint4*>(src);
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = static_cast<float>(loaded.element[i]);
  }
}

/// VEC floats or integers; 16-byte aligned if VEC is not 1.
template <typename T, int VEC>
__device__ __forceinline__ void load_words(T (&x)[VEC], const T* src) {
  if constexpr (VEC == 1) {
    x[0] = *src;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i += 4) {
      union {
        uint4 bits;
        T element[4];
      } loaded;
      loaded.bits = *reinterpret_cast<const uint4*>(src + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = loaded.element[j];
    }
  }
}

template <typename T, int VEC>
__device__ __forceinline__ void store_words(T* dst, const T (&x)[VEC]) {
  if constexpr (VEC == 1) {
    *dst = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i += 4) {
      union {
        uint4 bits;
        T element[4];
      } stored;
#pragma unroll
      for (int j = 0; j < 4; ++j) stored.element[j] = x[i + j];
      *reinterpret_cast<uint4*>(dst + i) = stored.bits;
    }
  }
}

template <typename T, int VEC>
__device__ __forceinline__ void store_vector(T* dst, const float (&x)[VEC]) {
  if constexpr (VEC == 1) {
    *dst = static_cast<T>(x[0]);
  } else {
    union {
      uint4 bits;
      T element[VEC];
    } stored;
#pragma unroll
    for (int i = 0; i < VEC; ++i) stored.element[i] = static_cast<T>(x[i]);
    *reinterpret_cast<uint4*>(dst) = stored.bits;
  }
}

/// Vector `index` of the heads' channels.
struct PoolLane {
  int64_t head, channel;

  template <int VEC>
  __device__ static __forceinline__ PoolLane at(int64_t index, int64_t channels) {
    const int64_t per_head = channels / VEC;
    return {index / per_head, index % per_head * VEC};
  }
  __device__ __forceinline__ int64_t in(const PoolStrides& stride, int64_t batch, int64_t token) const {
    return batch * stride.batch + token * stride.token + head * stride.head + channel;
  }
};

}  // namespace remora
