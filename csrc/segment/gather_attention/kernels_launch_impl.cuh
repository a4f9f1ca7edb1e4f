// Turns run-time values into template arguments and launches.
#pragma once
#include <algorithm>
#include <type_traits>

#include "segment/gather_attention/kernels.cuh"
#include "segment/gather_attention/kernels_launch.h"

namespace remora {
namespace gather {

constexpr Error kTooLarge = "gather_attention: too many tokens";

inline Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

/// Whether all rows begin at, and are a multiple of, 16 bytes.
inline bool is_aligned(const GatherAttentionInputs& in, const void* d_o, const HeadStrides& d_o_stride) {
  int64_t elements = in.dim;
  for (const HeadStrides& stride : {in.q_stride, in.k_stride, in.v_stride, d_o_stride}) {
    elements |= stride.batch | stride.token | stride.head;
  }
  uintptr_t address = static_cast<uintptr_t>(elements * size_of(in.dtype));
  for (const void* x : {in.q, in.k, in.v, d_o}) address |= reinterpret_cast<uintptr_t>(x);
  return address % 16 == 0;
}

/// Calls body(std::integral_constant) for the smallest tile that holds the channels.
template <class Body>
Error with_head_dim(int64_t dim, const Body& body) {
  if (dim <= 64) return body(std::integral_constant<int, 64>{});
  if (dim <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

template <typename Kernel, typename Params>
Error launch_kernel(Kernel kernel, dim3 grid, int num_threads, int smem_size, cudaStream_t stream,
                    const Params& params) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_size);
  if (error != cudaSuccess) return message_of(error);
  kernel<<<grid, num_threads, smem_size, stream>>>(params);
  return message_of(cudaGetLastError());
}

inline int64_t num_query_ctas(const GatherAttentionInputs& in) {
  return in.packed.batch * in.packed.seqlen * in.num_units() * in.parts_of_unit();
}

}  // namespace gather

template <typename T>
Error GatherKernels<T>::fwd(const GatherAttentionFwdParams& p, const Launch& launch) {
  const GatherFwdKernelParams params{.p = p, .is_aligned = gather::is_aligned(p.in, nullptr, {})};
  const int64_t num_ctas = gather::num_query_ctas(p.in);
  if (num_ctas > INT32_MAX) return gather::kTooLarge;
  return gather::with_head_dim(p.in.dim, [&](auto head_dim) {
    using Traits = GatherTraits<T, head_dim()>;
    return gather::launch_kernel(gather_attention_fwd_kernel<T, head_dim()>,
                                 dim3(static_cast<unsigned>(num_ctas), head_dim() / Traits::QUERY_DIM),
                                 32 * Traits::kWarps, Traits::query_smem(1), static_cast<cudaStream_t>(launch.stream),
                                 params);
  });
}

template <typename T>
Error GatherKernels<T>::bwd(const GatherAttentionBwdParams& p, const Launch& launch) {
  const GatherAttentionInputs& in = p.in;
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const GatherPieces pieces{p.starts, p.max_rows, in.num_lookups()};
  float* workspace = static_cast<float*>(p.workspace);
  const GatherBwdKernelParams params{.p = p,
                                     .is_aligned = gather::is_aligned(in, p.d_o, p.d_o_stride),
                                     .losses = workspace,
                                     .partial = workspace + num_gather_losses(in)};
  const int64_t num_ctas = gather::num_query_ctas(in);
  if (std::max(num_ctas, pieces.num_numbers()) > INT32_MAX) return gather::kTooLarge;
  return gather::with_head_dim(in.dim, [&](auto head_dim) {
    using Traits = GatherTraits<T, head_dim()>;
    const Error error = gather::launch_kernel(gather_attention_bwd_query_kernel<T, head_dim()>,
                                              dim3(static_cast<unsigned>(num_ctas), head_dim() / Traits::QUERY_DIM),
                                              32 * Traits::kWarps, Traits::query_smem(2), stream, params);
    if (error != nullptr || p.max_rows == 0) return error;
    const int64_t num_parts = (in.block + Traits::KEYS - 1) / Traits::KEYS;
    const int64_t grid_y = in.heads_of_row() * num_parts * (head_dim() / Traits::KEY_DIM);
    if (grid_y > 65535) return gather::kTooLarge;
    const int num_warps = static_cast<int>((std::min<int64_t>(in.block, Traits::KEYS) + 15) / 16);
    const dim3 grid(static_cast<unsigned>(pieces.num_numbers()), static_cast<unsigned>(grid_y));
    const Error keys_error = gather::launch_kernel(gather_attention_bwd_keys_kernel<T, head_dim()>, grid,
                                                   32 * num_warps, Traits::keys_smem(num_warps), stream, params);
    if (keys_error != nullptr) return keys_error;
    const dim3 windows(static_cast<unsigned>(pieces.num_windows()), static_cast<unsigned>(in.heads_of_row()));
    gather_attention_bwd_add_kernel<T><<<windows, 128, 0, stream>>>(params);
    return gather::message_of(cudaGetLastError());
  });
}

}  // namespace remora
