// The step kernel behind a function that launch.cu can call; step_*.cu instantiate it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace remora {

struct StepKernelParams;

template <typename T>
cudaError_t launch_step(const StepKernelParams& params, cudaStream_t stream);

}  // namespace remora
