// Arguments of the assignment to codes, shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

struct VqAssignParams {
  DType dtype;                                // of x and codebook; err2 is float32, or float64 if dtype is
  int64_t batch, heads, tokens, dims, codes;  // B, H, T, D, S
  const void* x;                              // [B, H, T, D] with contiguous rows
  int64_t x_stride_batch, x_stride_head, x_stride_token;
  const void* codebook;  // [H, S, D]
  const uint8_t* mask;   // [B, T] or null; 0: no code

  int32_t* idx;  // [B, H, T]; -1 without a code
  void* err2;    // [B, H, T] squared distance to the code

  void* workspace;  // vq_assign_workspace() bytes, uninitialised

  constexpr int64_t x_offset(int64_t b, int64_t h, int64_t t) const {
    return b * x_stride_batch + h * x_stride_head + t * x_stride_token;
  }
};

}  // namespace remora
