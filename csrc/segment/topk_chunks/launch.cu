// CUDA entry points of the selection of chunks.
#include "segment/topk_chunks/launch.h"

#include <algorithm>

#include "segment/topk_chunks/scores_kernels.cuh"
#include "segment/topk_chunks/topk_kernel.cuh"

namespace remora {
namespace {

constexpr Error kNoFloat64 = "topk_chunks on CUDA: float64 is not supported";
constexpr Error kTooLarge = "topk_chunks: too many tokens";

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls body(T{}) for the dtype; float64 has no CUDA kernels.
template <class Body>
Error dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
    default:
      return kNoFloat64;
  }
}

/// Whether every row of q and k_sum begins at, and is a multiple of, 16 bytes.
bool is_aligned(const ChunkScoreShape& shape) {
  const HeadStrides &q = shape.q_stride, &k = shape.k_stride;
  const int64_t elements = shape.dim | q.batch | q.token | q.head | k.batch | k.token | k.head;
  const auto address = reinterpret_cast<uintptr_t>(shape.q) | reinterpret_cast<uintptr_t>(shape.k_sum);
  return (address | static_cast<uintptr_t>(elements * size_of(shape.dtype))) % 16 == 0;
}

template <typename T>
Error topk(const TopkChunksParams& p, const Launch& launch) {
  int device = 0, max_smem = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return message_of(error);
  const TopkChunksKernelParams params{
      .p = p, .config = plan_topk_chunks(static_cast<int>(p.k), max_smem), .is_aligned = is_aligned(p.shape)};
  if (params.config.warp_queries == 0) return "topk_chunks: this device has too little shared memory for k";
  const int64_t num_ctas =
      ceil_div(p.shape.packed.seqlen, params.config.block_queries()) * p.shape.num_lists * p.shape.packed.batch;
  if (num_ctas > INT32_MAX) return kTooLarge;
  const auto kernel = p.shape.is_relu ? topk_chunks_fwd_kernel<T, true> : topk_chunks_fwd_kernel<T, false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, params.config.smem_size);
  if (error != cudaSuccess) return message_of(error);
  kernel<<<static_cast<unsigned>(num_ctas), kChunkThreads, params.config.smem_size,
           static_cast<cudaStream_t>(launch.stream)>>>(params);
  return message_of(cudaGetLastError());
}

int64_t num_rows(const ChunkScoresParams& p) {
  return p.shape.packed.batch * p.shape.packed.seqlen * p.shape.num_lists;
}

/// Key heads that a lookup reads.
int64_t heads_of_row(const ChunkScoresParams& p) {
  return p.shape.num_key_heads / std::min(p.shape.num_lists, p.shape.num_key_heads);
}

int64_t num_factors(const ChunkScoresParams& p) { return p.shape.is_relu ? p.num_lookups() * p.shape.list_heads() : 0; }

}  // namespace

int64_t topk_chunks_workspace(const TopkChunksParams&) { return 0; }

Error topk_chunks_fwd(const TopkChunksParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto zero) { return topk<decltype(zero)>(params, launch); });
}

Error chunk_scores_fwd(const ChunkScoresParams& p, const Launch& launch) {
  const int64_t num_ctas = ceil_div(num_rows(p), kScoreWarps);
  if (num_ctas > INT32_MAX) return kTooLarge;
  return dispatch(p.shape.dtype, [&](auto zero) {
    const ChunkScoresKernelParams params{.p = p, .is_aligned = is_aligned(p.shape)};
    chunk_scores_fwd_kernel<decltype(zero)>
        <<<static_cast<unsigned>(num_ctas), 32 * kScoreWarps, 0, static_cast<cudaStream_t>(launch.stream)>>>(params);
    return message_of(cudaGetLastError());
  });
}

int64_t chunk_scores_bwd_workspace(const ChunkScoresParams& p) {
  const ScorePieces pieces{nullptr, p.max_rows, p.num_lookups()};
  return 4 * (num_factors(p) + pieces.num_slots() * heads_of_row(p) * p.shape.dim);
}

Error chunk_scores_bwd(const ChunkScoresParams& p, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const ScorePieces pieces{p.starts, p.max_rows, p.num_lookups()};
  const int64_t num_row_ctas = ceil_div(num_rows(p), kScoreWarps);
  const int64_t num_piece_ctas = ceil_div(pieces.num_numbers(), kScoreWarps);
  if (std::max(num_row_ctas, num_piece_ctas) > INT32_MAX || heads_of_row(p) > 65535) return kTooLarge;
  float* workspace = static_cast<float*>(p.workspace);
  const ChunkScoresKernelParams params{
      .p = p, .is_aligned = is_aligned(p.shape), .factors = workspace, .partial = workspace + num_factors(p)};
  const unsigned heads = static_cast<unsigned>(heads_of_row(p));
  return dispatch(p.shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    chunk_scores_bwd_query_kernel<T><<<static_cast<unsigned>(num_row_ctas), 32 * kScoreWarps, 0, stream>>>(params);
    if (p.max_rows > 0) {
      chunk_scores_bwd_keys_kernel<T>
          <<<dim3(static_cast<unsigned>(num_piece_ctas), heads), 32 * kScoreWarps, 0, stream>>>(params);
      chunk_scores_bwd_add_kernel<T>
          <<<dim3(static_cast<unsigned>(pieces.num_windows()), heads), 32, 0, stream>>>(params);
    }
    return message_of(cudaGetLastError());
  });
}

}  // namespace remora
