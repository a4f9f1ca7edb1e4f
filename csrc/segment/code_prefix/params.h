// Arguments of the running sums of values per code, shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

/// Border n of N = ceil(T / chunk): the tokens before token n * chunk, and what `initial` says came before them all.
struct CodePrefixShape {
  int64_t rows;                     // B * H
  int64_t heads, tokens, channels;  // H, T, D
  int64_t codes, chunk;             // S
  int64_t v_stride_batch, v_stride_head, v_stride_token;

  constexpr int64_t borders() const { return (tokens + chunk - 1) / chunk; }
  constexpr int64_t v_offset(int64_t row, int64_t token) const {
    return row / heads * v_stride_batch + row % heads * v_stride_head + token * v_stride_token;
  }
};

struct CodePrefixFwdParams {
  CodePrefixShape shape;
  DType dtype;                // of v and mean; all else is float32, or float64 if dtype is
  const int32_t* idx;         // [B, H, T]; outside [0, S): no code
  const void* v;              // [B, H, T, D]
  const void* initial_count;  // [B, H, S] or null: zero
  const void* initial_mean;   // [B, H, S, D], with initial_count

  void* log_count;    // [B, H, N, S]
  void* mean;         // [B, H, N, S, D]; zero without tokens
  void* final_count;  // [B, H, S]
  void* final_mean;   // [B, H, S, D]
};

struct CodePrefixBwdParams {
  CodePrefixShape shape;
  DType dtype;
  const int32_t* idx;
  const void* initial_count;  // [B, H, S] or null
  const void* final_count;    // [B, H, S]
  const void* d_mean;         // [B, H, N, S, D]
  const void* d_final_mean;   // [B, H, S, D] or null: zero

  void* dv;              // [B, H, T, D] contiguous
  void* d_initial_mean;  // [B, H, S, D] or null
};

}  // namespace remora
