// Turns shapes into instantiations of the bag kernels; included by one .cu file per element type.
#pragma once
#include <utility>

#include "pkm/memory_bag/bag_kernels.cuh"
#include "pkm/memory_bag/bag_launch.h"
#include "pkm/memory_bag/peer_kernels.cuh"

namespace remora {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether rows of these tensors can be read 16 bytes at a time, `stride` elements apart.
template <typename T>
bool has_vectors(const BagShape& shape, int64_t stride, std::initializer_list<const void*> tensors) {
  constexpr int64_t kVector = 16 / sizeof(T);
  bool is_aligned = shape.width / shape.heads % kVector == 0 && stride % kVector == 0;
  for (const void* tensor : tensors) is_aligned = is_aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  return is_aligned;
}

template <class... Arguments>
Error launch_kernel(void (*kernel)(Arguments...), int64_t num_blocks, int num_threads, int64_t smem_bytes,
                    const Launch& launch, const std::type_identity_t<Arguments>&... arguments) {
  if (num_blocks > INT32_MAX) return "memory_bag on CUDA: too many lookups and columns";
  kernel<<<static_cast<unsigned>(num_blocks), num_threads, smem_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
Error BagKernels<T>::fwd(const MemoryBagFwdParams& params, const Launch& launch) {
  constexpr int kVector = 16 / sizeof(T);
  const BagShape& shape = params.shape;
  const bool vectors = has_vectors<T>(shape, shape.width, {params.table, params.out});
  const int64_t num_tiles = ceil_div(shape.width / shape.heads, 32 * (vectors ? kVector : 1));
  const int64_t num_tasks = shape.tokens * shape.out_groups * shape.heads * num_tiles;
  // Below two blocks for every multiprocessor, the pieces of a token go to the warps of a block.
  if (shape.lookups > kFwdPiece && num_tasks < int64_t{2} * kBagWarps * launch.num_sms) {
    return launch_kernel(vectors ? memory_bag_fwd_kernel<T, kVector, true> : memory_bag_fwd_kernel<T, 1, true>,
                         num_tasks, kBagThreads, 0, launch, params, num_tasks);
  }
  return launch_kernel(vectors ? memory_bag_fwd_kernel<T, kVector, false> : memory_bag_fwd_kernel<T, 1, false>,
                       ceil_div(num_tasks, kBagWarps), kBagThreads, 0, launch, params, num_tasks);
}

template <typename T>
Error BagKernels<T>::bwd_weights(const MemoryBagWeightsParams& params, const Launch& launch) {
  constexpr int kVector = 16 / sizeof(T);
  const BagShape& shape = params.shape;
  const bool vectors = has_vectors<T>(shape, shape.width, {params.table, params.d_out});
  const int64_t num_tasks = shape.tokens * ceil_div(shape.lookups, kWeightsLookups) * shape.heads;
  return launch_kernel(vectors ? memory_bag_bwd_weights_kernel<T, kVector> : memory_bag_bwd_weights_kernel<T, 1>,
                       ceil_div(num_tasks, kBagWarps), kBagThreads, 0, launch, params, num_tasks);
}

template <typename T, bool kDots>
auto bwd_kernel(int64_t width, bool vectors) {
  constexpr int kVector = 16 / sizeof(T);
  if (!vectors) return memory_bag_bwd_kernel<T, 1, 4, kDots>;
  if (width <= 32 * kVector) return memory_bag_bwd_kernel<T, kVector, 1, kDots>;
  if (width <= 64 * kVector) return memory_bag_bwd_kernel<T, kVector, 2, kDots>;
  return memory_bag_bwd_kernel<T, kVector, 4, kDots>;
}

template <typename T>
Error BagKernels<T>::bwd(const MemoryBagBwdParams& params, const Launch& launch) {
  constexpr int kVector = 16 / sizeof(T);
  const BagShape& shape = params.shape;
  const int64_t width = shape.width / shape.heads;
  const bool vectors = has_vectors<T>(shape, shape.width, {params.table, params.d_out, params.workspace}) &&
                       has_vectors<T>(shape, params.d_table_stride, {params.d_table});
  const int64_t num_tasks = ceil_div(shape.num_lookups(), kBwdWindow) * shape.heads;
  const auto kernel =
      params.d_weights != nullptr ? bwd_kernel<T, true>(width, vectors) : bwd_kernel<T, false>(width, vectors);
  if (const Error error =
          launch_kernel(kernel, ceil_div(num_tasks, kBagWarps), kBagThreads, 0, launch, params, num_tasks)) {
    return error;
  }
  const int64_t num_column_blocks = ceil_div(shape.width, kBagThreads);
  if (const Error error = launch_kernel(memory_bag_combine_kernel<T>, params.num_windows() * num_column_blocks,
                                        kBagThreads, 0, launch, params, num_column_blocks)) {
    return error;
  }
  if (params.kind == RowGradient::kAccumulate) return nullptr;
  const int64_t num_rows = params.kind == RowGradient::kDense ? shape.map.num_rows : params.max_rows;
  return launch_kernel(vectors ? memory_bag_zero_kernel<T, kVector> : memory_bag_zero_kernel<T, 1>,
                       ceil_div(num_rows, kZeroWindow * kBagWarps), kBagThreads, 0, launch, params, num_rows);
}

/// Whether rows [u | v] can be read 16 bytes at a time.
template <typename T, class Params>
bool peer_has_vectors(const Params& params) {
  return has_vectors<T>(params.shape, params.query_width, {params.table, params.x});
}

constexpr Error kTooManyPeers = "peer_bag on CUDA: a token may have 6144 lookups at most";

template <typename T>
Error BagKernels<T>::peer_fwd(const PeerBagFwdParams& params, const Launch& launch) {
  const int64_t smem_bytes = peer_smem_bytes(params.shape.lookups);
  if (smem_bytes > 48 * 1024) return kTooManyPeers;
  const bool vectors = peer_has_vectors<T>(params) && has_vectors<T>(params.shape, params.query_width, {params.out});
  return launch_kernel(vectors ? peer_bag_fwd_kernel<T, 16 / sizeof(T)> : peer_bag_fwd_kernel<T, 1>,
                       params.shape.tokens, kPeerThreads, smem_bytes, launch, params);
}

template <typename T>
Error BagKernels<T>::peer_bwd(const PeerBagBwdParams& params, const Launch& launch) {
  const int64_t smem_bytes = peer_smem_bytes(params.shape.lookups);
  if (smem_bytes > 48 * 1024) return kTooManyPeers;
  const bool vectors =
      peer_has_vectors<T>(params) && has_vectors<T>(params.shape, params.query_width, {params.d_out, params.d_x});
  return launch_kernel(vectors ? peer_bag_bwd_kernel<T, 16 / sizeof(T)> : peer_bag_bwd_kernel<T, 1>,
                       params.shape.tokens, kPeerThreads, smem_bytes, launch, params);
}

}  // namespace remora
