// CUDA entry points of weighted bags.
#include "pkm/memory_bag/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pkm/memory_bag/bag_launch.h"
#include "pkm/memory_bag/plan_kernels.cuh"

namespace remora {
namespace {

/// Calls body(kernels) for the dtype; float64 has no CUDA kernels.
template <class Body>
Error dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(BagKernels<float>{});
    case DType::kBFloat16:
      return body(BagKernels<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(BagKernels<__half>{});
    default:
      return "memory_bag on CUDA supports float32, bfloat16 and float16";
  }
}

}  // namespace

int64_t slot_plan_workspace(const SlotPlanParams& params) { return PlanWorkspace(params, nullptr).bytes; }

Error slot_plan(const SlotPlanParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const PlanWorkspace workspace(params, params.workspace);
  const unsigned num_tiles = static_cast<unsigned>(workspace.num_tiles);
  const int num_passes = (params.num_key_bits() + kDigitBits - 1) / kDigitBits;
  int32_t* const lookups[2] = {workspace.lookups, params.order};
  for (int n = 0; n < num_passes; ++n) {
    const int to = 1 - (num_passes - 1 - n) % 2;  // the last pass writes order
    const PlanPass pass = {.keys = n == 0 ? nullptr : workspace.keys[1 - to],
                           .lookups = lookups[1 - to],
                           .keys_out = workspace.keys[to],
                           .lookups_out = lookups[to],
                           .shift = n * kDigitBits};
    slot_plan_count_kernel<<<num_tiles, kPlanThreads, 0, stream>>>(params, pass);
    slot_plan_scan_kernel<<<kNumDigits, kPlanThreads, 0, stream>>>(params);
    slot_plan_scatter_kernel<<<num_tiles, kPlanThreads, 0, stream>>>(params, pass);
  }
  slot_plan_heads_kernel<<<num_tiles, kPlanThreads, 0, stream>>>(params, workspace.keys[1]);
  slot_plan_offsets_kernel<<<1, kPlanThreads, 0, stream>>>(params);
  slot_plan_segments_kernel<<<num_tiles, kPlanThreads, 0, stream>>>(params, workspace.keys[1]);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

Error memory_bag_fwd(const MemoryBagFwdParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto kernels) { return kernels.fwd(params, launch); });
}

Error memory_bag_bwd_weights(const MemoryBagWeightsParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto kernels) { return kernels.bwd_weights(params, launch); });
}

int64_t memory_bag_bwd_workspace(const MemoryBagBwdParams& params) {
  return 2 * params.num_windows() * params.shape.width * int64_t{sizeof(float)};
}

Error memory_bag_bwd(const MemoryBagBwdParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto kernels) { return kernels.bwd(params, launch); });
}

Error peer_bag_fwd(const PeerBagFwdParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto kernels) { return kernels.peer_fwd(params, launch); });
}

Error peer_bag_bwd(const PeerBagBwdParams& params, const Launch& launch) {
  return dispatch(params.shape.dtype, [&](auto kernels) { return kernels.peer_bwd(params, launch); });
}

}  // namespace remora
