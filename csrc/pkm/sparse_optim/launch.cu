// CUDA entry points of the sparse optimizers. The grids depend on sizes that the host knows; how many rows have a
// gradient is read on the device.
#include "pkm/sparse_optim/launch.h"

#include "pkm/sparse_optim/kernels.cuh"

namespace remora {
namespace {

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename E, typename G, SparseRule RULE>
Error launch_update(const SparseUpdateParams& p, const Launch& launch) {
  const int64_t rows = p.mode == SparseMode::kDense ? p.num_slots : p.gradient.capacity;
  const int64_t num_ctas = (rows + kSparseCtaRows - 1) / kSparseCtaRows;
  if (num_ctas > INT32_MAX) return "sparse optimizers on CUDA: too many rows";
  const bool is_aligned = p.dim() % kSparseColumns == 0 && is_aligned_16(p.table) && is_aligned_16(p.moment) &&
                          is_aligned_16(p.second) && is_aligned_16(p.gradient.values);
  sparse_update_kernel<E, G, RULE>
      <<<static_cast<unsigned>(num_ctas), kSparseThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(p, is_aligned);
  return message_of(cudaGetLastError());
}

template <typename E, typename G>
Error update(const SparseUpdateParams& params, const Launch& launch) {
  switch (params.rule) {
    case SparseRule::kAdam:
      return launch_update<E, G, SparseRule::kAdam>(params, launch);
    case SparseRule::kRowwiseAdam:
      return launch_update<E, G, SparseRule::kRowwiseAdam>(params, launch);
    default:
      return launch_update<E, G, SparseRule::kRowwiseAdagrad>(params, launch);
  }
}

int64_t num_norm_blocks(const RowNormParams& params) {
  return (params.gradient.capacity + kNormCtaRows - 1) / kNormCtaRows;
}

template <typename G>
Error norm(const RowNormParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const int64_t num_blocks = num_norm_blocks(params);
  const bool is_aligned = params.gradient.dim % kSparseColumns == 0 && is_aligned_16(params.gradient.values);
  if (num_blocks > INT32_MAX) return "row_norm on CUDA: too many rows";
  row_norm_partial_kernel<G><<<static_cast<unsigned>(num_blocks), kSparseThreads, 0, stream>>>(params, is_aligned);
  row_norm_kernel<<<1, kSparseThreads, 0, stream>>>(params, num_blocks);
  return message_of(cudaGetLastError());
}

}  // namespace

Error sparse_update(const SparseUpdateParams& params, const Launch& launch) {
  const bool is_wide = params.gradient.dtype == DType::kFloat32;
  switch (params.dtype) {
    case DType::kFloat32:
      return update<float, float>(params, launch);
    case DType::kBFloat16:
      return is_wide ? update<__nv_bfloat16, float>(params, launch)
                     : update<__nv_bfloat16, __nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return is_wide ? update<__half, float>(params, launch) : update<__half, __half>(params, launch);
    default:
      return "sparse optimizers on CUDA: float64 is not supported";
  }
}

int64_t row_norm_workspace(const RowNormParams& params) { return num_norm_blocks(params) * 8; }

Error row_norm(const RowNormParams& params, const Launch& launch) {
  switch (params.gradient.dtype) {
    case DType::kFloat32:
      return norm<float>(params, launch);
    case DType::kBFloat16:
      return norm<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return norm<__half>(params, launch);
    default:
      return "row_norm on CUDA: float64 is not supported";
  }
}

}  // namespace remora
