// One instantiation of the forward kernel behind a function that launch.cu can call; fwd_*.cu instantiate it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "common/launch.h"

namespace remora {

struct FwdConfig;
struct FwdKernelParams;

/// The summary pass (is_summary) or the output pass. is_aligned: q, k, v, o, saved states, K and V allow 16-byte
/// pieces.
template <typename T, int HEAD_DIM, bool kIsRouted>
cudaError_t launch_fwd_pass(const FwdKernelParams& params, const FwdConfig& config, bool is_summary, bool is_aligned,
                            cudaStream_t stream);

}  // namespace remora
