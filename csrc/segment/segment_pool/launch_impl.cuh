// Definitions of launch.cuh.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "segment/segment_pool/bwd_kernel.cuh"
#include "segment/segment_pool/fwd_kernel.cuh"
#include "segment/segment_pool/launch.cuh"

namespace remora {

constexpr Error kTooManyThreads = "segment_pool on CUDA: too many tokens and channels";

/// Windows this long, and ragged ones, are shared by the lanes of a CTA.
constexpr int64_t kPoolSplitSize = 64;

template <class Kernel, class Params>
Error launch_pool(Kernel kernel, int64_t num_ctas, const Params& params, const Launch& launch) {
  if (num_ctas > INT32_MAX) return kTooManyThreads;
  if (num_ctas > 0) {
    kernel<<<static_cast<unsigned>(num_ctas), kPoolThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(params);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
bool is_aligned(const PoolShape& shape, std::initializer_list<const void*> tensors,
                std::initializer_list<PoolStrides> strides) {
  constexpr int64_t kVector = 16 / sizeof(T);
  bool aligned = shape.channels % kVector == 0;
  for (const void* data : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const PoolStrides& s : strides) {
    aligned = aligned && s.batch % kVector == 0 && s.token % kVector == 0 && s.head % kVector == 0;
  }
  return aligned;
}

/// Calls f with the kind as a compile-time value.
template <class F>
Error with_kind(PoolMode mode, const F& f) {
  switch (mode) {
    case PoolMode::kMax:
      return f(std::integral_constant<PoolKind, PoolKind::kMax>{});
    case PoolMode::kSoftmax:
      return f(std::integral_constant<PoolKind, PoolKind::kSoftmax>{});
    case PoolMode::kWeighted:
      return f(std::integral_constant<PoolKind, PoolKind::kWeighted>{});
    default:
      return f(std::integral_constant<PoolKind, PoolKind::kLinear>{});
  }
}

template <typename T>
Error segment_pool_fwd_of(const SegmentPoolFwdParams& p, const Launch& launch) {
  const PoolShape& shape = p.shape;
  const bool aligned = is_aligned<T>(shape, {p.x, p.gate, p.slot_bias, p.y, p.arg, p.lse}, {p.x_stride, p.gate_stride});
  const bool is_split = p.mode != PoolMode::kLast && (shape.is_ragged() || shape.size >= kPoolSplitSize);
  const int64_t num_rows = shape.batch * shape.num_windows;
  return with_kind(p.mode, [&](auto kind) {
    const auto run = [&]<int VEC>(std::integral_constant<int, VEC>) {
      constexpr PoolKind KIND = decltype(kind)::value;
      const int64_t num_vectors = shape.heads * (shape.channels / VEC);
      if (is_split) {
        return launch_pool(segment_pool_fwd_kernel<T, KIND, VEC, true>,
                           num_rows * ceil_div(num_vectors, kPoolSplitVectors), p, launch);
      }
      return launch_pool(segment_pool_fwd_kernel<T, KIND, VEC, false>, ceil_div(num_rows * num_vectors, kPoolThreads),
                         p, launch);
    };
    constexpr int kVector = 16 / sizeof(T);
    return aligned ? run(std::integral_constant<int, kVector>{}) : run(std::integral_constant<int, 1>{});
  });
}

template <typename T>
Error segment_pool_bwd_of(const SegmentPoolBwdParams& p, const Launch& launch) {
  const PoolShape& shape = p.shape;
  const bool aligned =
      is_aligned<T>(shape, {p.x, p.gate, p.slot_bias, p.y, p.arg, p.lse, p.dy, p.dx, p.dgate, p.workspace},
                    {p.x_stride, p.gate_stride});
  const Error error = with_kind(p.mode, [&](auto kind) {
    const auto run = [&]<int VEC>(std::integral_constant<int, VEC>) {
      const int64_t num_vectors = shape.heads * (shape.input_channels() / VEC);
      return launch_pool(segment_pool_bwd_kernel<T, decltype(kind)::value, VEC>,
                         ceil_div(shape.num_blocks() * shape.stride * num_vectors, kPoolThreads), p, launch);
    };
    constexpr int kVector = 16 / sizeof(T);
    return aligned ? run(std::integral_constant<int, kVector>{}) : run(std::integral_constant<int, 1>{});
  });
  if (error != nullptr || p.dslot_bias == nullptr) return error;
  const int64_t entries = shape.size * shape.heads * shape.input_channels();
  return launch_pool(segment_pool_reduce_kernel, ceil_div(entries, kPoolThreads), p, launch);
}

}  // namespace remora

#define REMORA_SEGMENT_POOL_INSTANCE(T)                                                              \
  template remora::Error remora::segment_pool_fwd_of<T>(const SegmentPoolFwdParams&, const Launch&); \
  template remora::Error remora::segment_pool_bwd_of<T>(const SegmentPoolBwdParams&, const Launch&);
