// Arguments of the causal depthwise convolution, shared by the CPU and CUDA kernels. Sequences and routed rows:
// recurrence/shape.h; the D channels are one head of K = V = D there.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "recurrence/shape.h"

namespace remora {

/// Taps of the widest filter.
constexpr int kConvMaxWidth = 8;

/// Element strides of a [B, T, D] tensor whose last dimension is contiguous.
struct ChannelStrides {
  int64_t batch, token;
};

struct CausalConv1dShape {
  RecurrenceShape sequences;
  int64_t num_channels;  // D
  int width;             // W, 1 ... kConvMaxWidth
};

struct CausalConv1dFwdParams {
  CausalConv1dShape shape;
  DType dtype;  // of x, y and the states; weight and bias are float32 (float64 if dtype is)
  bool use_silu;

  const void* x;  // [B, T, D], x_stride
  ChannelStrides x_stride;
  const void* weight;         // [D, W], the newest token last
  const void* bias;           // [D] or null
  const void* initial_state;  // [N, W - 1, D], the inputs before each sequence, oldest first, or null: zeros
  const int32_t* cu_seqlens;  // [N + 1] or null
  const int32_t* rows;        // [B * T] or null

  void* y;            // [B, T, D]
  void* final_state;  // [N, W - 1, D] or null
};

struct CausalConv1dBwdParams {
  CausalConv1dShape shape;
  DType dtype;
  bool use_silu;

  const void* x;  // [B, T, D], x_stride
  ChannelStrides x_stride;
  const void* weight;         // [D, W]
  const void* bias;           // [D] or null
  const void* initial_state;  // [N, W - 1, D] or null
  const int32_t* cu_seqlens;  // [N + 1] or null
  const int32_t* rows;        // [B * T] or null
  const void* d_y;            // [B, T, D] contiguous
  const void* d_final_state;  // [N, W - 1, D] or null: zero

  void* dx;               // [B, T, D]
  void* dweight;          // [D, W]
  void* dbias;            // [D] or null
  void* d_initial_state;  // [N, W - 1, D] or null

  void* workspace;  // causal_conv1d_bwd_workspace() bytes, uninitialised
};

/// One token of each sequence; the states, a pool of W - 1 last inputs, are updated in place.
struct CausalConv1dStepParams {
  CausalConv1dShape shape;  // T == 1 and N == B, or N == B * T with memories
  DType dtype;
  bool use_silu;

  const void* x;  // [B, T, D], x_stride
  ChannelStrides x_stride;
  const void* weight;            // [D, W]
  const void* bias;              // [D] or null
  const int32_t* state_indices;  // as in gated_delta_rule/params.h: [N] ([T] with memories) or null
  const int32_t* memories;       // [B, T] or null
  int64_t num_memories;

  void* state;        // [num_slots, W - 1, D]
  int64_t num_slots;  // a multiple of num_memories

  void* y;  // [B, T, D]; zero where the slot is outside the pool
};

}  // namespace remora
