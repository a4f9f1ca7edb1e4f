// The step behind a function that launch.cu can call; step_*.cu instantiate it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "recurrence/simple_gla/params.h"

namespace remora {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = 32 * kStepWarps;
constexpr int kStepColsPerWarp = 8;
constexpr int kStepBlockV = kStepWarps * kStepColsPerWarp;

template <typename T>
cudaError_t launch_step(const SimpleGlaStepParams& params, cudaStream_t stream);

}  // namespace remora
