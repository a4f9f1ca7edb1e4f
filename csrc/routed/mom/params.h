// Arguments of Mixture-of-Memories, shared by the CPU and CUDA kernels. Tokens are rows of a flattened [B * T] = [R].
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

/// The router: k of M memories for every token, and its losses.
struct MomRouteParams {
  DType dtype;                 // of logits; everything else is float32, or float64 if dtype is
  int64_t rows, num_memories;  // R, M
  int64_t topk;                // k, 1 ... M
  bool renormalize, with_losses;
  const void* logits;   // [R, M]
  const uint8_t* mask;  // [R] or null; 0: padding

  void* weights;     // [R, k]
  int32_t* indices;  // [R, k]; -1 for padding
  void* lse;         // [R] log of the sum of exp(logits)
  void* losses;      // [2] balance, z
  int32_t* counts;   // [M + 1]: tokens that chose a memory; tokens that are no padding

  void* workspace;  // mom_route_workspace() bytes

  // Backward: reads all of the above but losses.
  const void* d_weights;  // [R, k]
  const void* d_losses;   // [2]
  void* d_logits;         // [R, M]
};

/// The plan: a stable counting sort of J * R choices by segment n * memories + m, memories = M + shared.
struct RoutePlanParams {
  int64_t seqlen;  // T; sequence of a token without offsets: token / T
  int64_t tokens, topk, num_seqs, num_memories;
  bool shared_memory;  // choice topk of every token is memory M
  int64_t capacity;    // choices a segment keeps, not of the shared memory; negative: all
  bool drop_oldest;
  const int32_t* indices;     // [R, k]; outside [0, M): dropped
  const int32_t* cu_seqlens;  // [N + 1] or null
  const uint8_t* mask;        // [R] or null

  int32_t* rows;       // [J * R]
  int32_t* positions;  // [J * R], inverse of rows
  int32_t* offsets;    // [S + 1], S = N * memories
  int32_t* counts;     // [S] before capacity
  void* workspace;     // route_plan_workspace() bytes

  constexpr int64_t memories() const { return num_memories + shared_memory; }
  constexpr int64_t segments() const { return num_seqs * memories(); }
  constexpr int64_t choices() const { return topk + shared_memory; }
  constexpr int64_t items() const { return tokens * choices(); }
};

/// o_t = sum_j w_tj o_jt, the shared memory last with weight one.
struct MomCombineParams {
  DType dtype;             // of o, out; weights are float32, or float64 if dtype is
  int64_t choices, topk;   // J = k or k + 1
  int64_t rows, channels;  // R, D
  const void* o;           // [J, R, D]
  const void* weights;     // [R, k]
  void* out;               // [R, D]
  const void* d_out;       // [R, D]
  void* d_o;               // [J, R, D]
  void* d_weights;         // [R, k]
};

}  // namespace remora
