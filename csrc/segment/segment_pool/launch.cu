// CUDA entry points of segment pooling.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "segment/segment_pool/launch.cuh"

namespace remora {
namespace {

template <class Params, class Bf16, class Fp16, class Fp32>
Error dispatch(const Params& params, const Launch& launch, Bf16 bf16, Fp16 fp16, Fp32 fp32) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return bf16(params, launch);
    case DType::kFloat16:
      return fp16(params, launch);
    case DType::kFloat32:
      return fp32(params, launch);
    default:
      return "segment_pool on CUDA supports float32, bfloat16 and float16";
  }
}

}  // namespace

Error segment_pool_fwd(const SegmentPoolFwdParams& params, const Launch& launch) {
  return dispatch(params, launch, segment_pool_fwd_of<__nv_bfloat16>, segment_pool_fwd_of<__half>,
                  segment_pool_fwd_of<float>);
}

Error segment_pool_bwd(const SegmentPoolBwdParams& params, const Launch& launch) {
  return dispatch(params, launch, segment_pool_bwd_of<__nv_bfloat16>, segment_pool_bwd_of<__half>,
                  segment_pool_bwd_of<float>);
}

}  // namespace remora
