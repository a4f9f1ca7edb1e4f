// CUDA entry points of attention to chosen blocks.
#include "segment/gather_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "segment/gather_attention/kernels_launch.h"
#include "segment/pieces.cuh"

namespace remora {
namespace {

/// Calls body(kernels) for the dtype; float64 has no CUDA kernels.
template <class Body>
Error dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(GatherKernels<float>{});
    case DType::kBFloat16:
      return body(GatherKernels<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(GatherKernels<__half>{});
    default:
      return "gather_attention on CUDA: float64 is not supported";
  }
}

}  // namespace

Error gather_attention_fwd(const GatherAttentionFwdParams& params, const Launch& launch) {
  return dispatch(params.in.dtype, [&](auto kernels) { return kernels.fwd(params, launch); });
}

int64_t gather_attention_bwd_workspace(const GatherAttentionBwdParams& params) {
  const GatherAttentionInputs& in = params.in;
  const PlanPieces<kGatherLookups> pieces{nullptr, params.max_rows, in.num_lookups()};
  return 4 * (num_gather_losses(in) + pieces.num_slots() * in.heads_of_row() * in.block * 2 * in.dim);
}

Error gather_attention_bwd(const GatherAttentionBwdParams& params, const Launch& launch) {
  return dispatch(params.in.dtype, [&](auto kernels) { return kernels.bwd(params, launch); });
}

}  // namespace remora
