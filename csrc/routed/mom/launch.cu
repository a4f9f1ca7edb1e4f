// CUDA entry points of Mixture-of-Memories. No launch depends on the number of memories or sequences.
#include "routed/mom/launch.h"

#include <algorithm>

#include "routed/mom/combine_kernel.cuh"
#include "routed/mom/plan_kernel.cuh"
#include "routed/mom/route_kernel.cuh"

namespace remora {
namespace {

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

/// Calls body(element{}) for the dtype; float64 has no CUDA kernels.
template <class Body>
Error dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      body(float{});
      break;
    case DType::kBFloat16:
      body(__nv_bfloat16{});
      break;
    case DType::kFloat16:
      body(__half{});
      break;
    default:
      return "Mixture-of-Memories on CUDA: float64 is not supported";
  }
  return message_of(cudaGetLastError());
}

}  // namespace

int64_t mom_route_workspace(const MomRouteParams& params) {
  return int64_t{4} * ceil_div(params.rows, kLossRows) * (params.num_memories * 2 + 2);
}

Error mom_route_fwd(const MomRouteParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return dispatch(params.dtype, [&](auto element) {
    using E = decltype(element);
    mom_route_fwd_kernel<E><<<ceil_div(params.rows, kRouteWarps), 32 * kRouteWarps, 0, stream>>>(params);
    if (!params.with_losses) return;
    mom_route_partial_kernel<E><<<ceil_div(params.rows, kLossRows), kLossThreads, 0, stream>>>(params);
    mom_route_losses_kernel<<<1, kLossThreads, 0, stream>>>(params, ceil_div(params.rows, kLossRows));
  });
}

Error mom_route_bwd(const MomRouteParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return dispatch(params.dtype, [&](auto element) {
    mom_route_bwd_kernel<decltype(element)>
        <<<ceil_div(params.rows, kRouteWarps), 32 * kRouteWarps, 0, stream>>>(params);
  });
}

int64_t route_plan_workspace(const RoutePlanParams& params) {
  return 4 * (params.segments() + 1) * (plan_chunks(params) + 2);
}

Error route_plan(const RoutePlanParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const unsigned num_chunks = static_cast<unsigned>(plan_chunks(params));
  route_plan_count_kernel<<<num_chunks, 32, 0, stream>>>(params);
  route_plan_chunks_kernel<<<ceil_div(params.segments() + 1, kPlanThreads), kPlanThreads, 0, stream>>>(params);
  route_plan_offsets_kernel<<<1, kPlanThreads, 0, stream>>>(params);
  route_plan_scatter_kernel<<<num_chunks, 32, 0, stream>>>(params);
  return message_of(cudaGetLastError());
}

Error mom_combine_fwd(const MomCombineParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return dispatch(params.dtype, [&](auto element) {
    mom_combine_fwd_kernel<decltype(element)>
        <<<static_cast<unsigned>(params.rows), kCombineThreads, 0, stream>>>(params);
  });
}

Error mom_combine_bwd(const MomCombineParams& params, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return dispatch(params.dtype, [&](auto element) {
    mom_combine_bwd_kernel<decltype(element)>
        <<<static_cast<unsigned>(params.rows), kCombineThreads, 0, stream>>>(params);
  });
}

}  // namespace remora
