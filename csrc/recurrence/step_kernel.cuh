// Token by token, for every rule of the family: the decode step (one or a few tokens, states of a pool updated in
// place) and the recurrent forward pass. An operator says what one token does to the state,
//
//   template <int kRows, class Sum>
//   __device__ void step_token(const Params&, int64_t gate_offset, int64_t head, const float (&q)[kRows],
//                              const float (&k)[kRows], const float (&v)[4], Sum sum_rows, float (&state)[kRows][4],
//                              float (&o)[4]);
//
// where sum_rows(float (&x)[n]), called once, adds up n <= kStepSums numbers over all rows of K.
//
//   q, k [B, T, H, K]   v, o [B, T, HV, V]   states [slots, HV, K, V] or [slots, HV, V, K]
//
// Grid: (sequence, value head, 32 columns of V), flattened on x; with memories a sequence is one choice of a token.
// A thread holds 4 columns of HEAD_DIM / 16 rows of K, so that what a warp reads at once are whole 128-byte lines:
//   K-first  columns 4 (thread % 8) .. + 3, rows HEAD_DIM / 16 (thread / 8) + i; warps share the rows and add through
//            shared memory
//   V-first  columns 8 warp + 4 (lane % 2) .. + 3, rows 4 (lane / 2) + 64 (i / 4) + i % 4; a warp has all rows
// The state stays in registers over the tokens; everything is fp32. Bandwidth-bound: 8 K V bytes a step and head, so
// a CTA asks for its state as early as it can: divisions are of 32 bits, and tensors that cannot be read by 4 elements
// at a time have a kernel of their own (kVectors = false).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "recurrence/sequence.cuh"
#include "recurrence/step_launch.h"

namespace remora {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = 32 * kStepWarps;
constexpr int kStepSums = 11;

template <class Params>
struct StepKernelParams {
  Params op;
  uint32_t num_v_tiles;
};

/// Sums over the rows of K, in every thread that has a part of them. `partial` is free again two calls later.
template <bool kVFirst, int N>
__device__ __forceinline__ void sum_step_rows(float (&x)[N], float (&partial)[kStepWarps][kStepSums][8]) {
  static_assert(N <= kStepSums);
  constexpr int kLanesOverV = kVFirst ? 2 : 8;
#pragma unroll
  for (int mask = 16; mask >= kLanesOverV; mask /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(kFullWarp, x[n], mask);
  }
  if constexpr (kVFirst) return;
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  if (lane_idx < kLanesOverV) {
#pragma unroll
    for (int n = 0; n < N; ++n) partial[warp_idx][n][lane_idx] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = 0.f;
#pragma unroll
    for (int warp = 0; warp < kStepWarps; ++warp) x[n] += partial[warp][n][lane_idx % kLanesOverV];
  }
}

template <class Params, typename T, int HEAD_DIM, bool kVFirst, bool kVectors>
__global__ void __launch_bounds__(kStepThreads, HEAD_DIM > 128 ? 2 : 4)
    recurrent_step_kernel(const __grid_constant__ StepKernelParams<Params> params) {
  constexpr int kRows = HEAD_DIM / 16;
  const Params& op = params.op;
  const RecurrenceShape& shape = op.shape;
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  const int head_dim = static_cast<int>(shape.head_dim);

  // Sequence, head, columns
  const auto num_value_heads = static_cast<uint32_t>(shape.num_value_heads);
  const uint32_t unit = blockIdx.x / params.num_v_tiles, tile = blockIdx.x - unit * params.num_v_tiles;
  const int64_t col = int64_t{tile} * kStepBlockV + (kVFirst ? warp_idx * 8 + lane_idx % 2 * 4 : lane_idx % 8 * 4);
  const int64_t seq = unit / num_value_heads, head = unit % num_value_heads;
  const int64_t key_head = static_cast<uint32_t>(head) / (num_value_heads / static_cast<uint32_t>(shape.num_heads));
  const int num_cols = static_cast<int>(min(max(shape.value_dim - col, int64_t{0}), int64_t{4}));
  int64_t batch = seq, begin = 0, end = shape.seqlen;
  if (op.memories != nullptr) {
    const TokenRow choice = row_at(shape, nullptr, seq);
    batch = choice.batch, begin = choice.token, end = begin + 1;
  } else if (op.cu_seqlens != nullptr) {
    const Sequence tokens = find_sequence(shape, op.cu_seqlens, seq);
    batch = 0, begin = tokens.first_token, end = begin + tokens.num_tokens;
  }
  const int64_t slot = step_slot(shape, op.state_indices, op.memories, op.num_memories, op.num_slots, seq);
  // First of the rows 4 group .. 4 group + 3 of the thread, which are neighbours
  const auto row_of = [&](int group) {
    return kVFirst ? lane_idx / 2 * 4 + group * 64 : static_cast<int>(threadIdx.x / 8) * kRows + group * 4;
  };
  const bool stores_output = kVFirst ? lane_idx < 2 : threadIdx.x < 8;
  const auto store_output = [&](int64_t token, const float (&o)[4]) {
    T* dst = static_cast<T*>(op.o) + ((batch * shape.seqlen + token) * shape.num_value_heads + head) * shape.value_dim;
    if (stores_output) store_4(dst + col, o, num_cols, kVectors);
  };
  const float zeros[4] = {0.f, 0.f, 0.f, 0.f};

  for_each_uncovered(shape, op.cu_seqlens, seq, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) store_output(token, zeros);
  });
  if (slot < 0) {
    for (int64_t token = begin; token < end; ++token) store_output(token, zeros);
    return;
  }

  // State, in the rows that are contiguous in memory: those of four columns, or columns of four rows
  const int64_t state_base = (slot * shape.num_value_heads + head) * shape.head_dim * shape.value_dim;
  const auto for_each_line = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_of(i / 4) + (kVFirst ? 0 : i % 4), j = kVFirst ? i % 4 : 0;
      const int64_t offset = kVFirst ? (col + j) * shape.head_dim + row : row * shape.value_dim + col;
      const int num_valid = kVFirst ? (j < num_cols ? head_dim - row : 0) : (row < head_dim ? num_cols : 0);
      visit(i, state_base + offset, num_valid);
    }
  };
  float s[kRows][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = 0.f;
  }
  if (const float* src = static_cast<const float*>(op.initial_state); src != nullptr) {
    for_each_line([&](int i, int64_t offset, int num_valid) {
      float line[4];
      load_4(src + offset, num_valid, kVectors).to_floats(line);
#pragma unroll
      for (int n = 0; n < 4; ++n) (kVFirst ? s[i / 4 * 4 + n][i % 4] : s[i][n]) = line[n];
    });
  }

  // Tokens
  __shared__ float partial[2][kStepWarps][kStepSums][8];
  for (int64_t token = begin; token < end; ++token) {
    const T* gmem_k = static_cast<const T*>(op.k) + batch * op.k_stride.batch + token * op.k_stride.token +
                      key_head * op.k_stride.head;
    const T* gmem_q = static_cast<const T*>(op.q) + batch * op.q_stride.batch + token * op.q_stride.token +
                      key_head * op.q_stride.head;
    const T* gmem_v =
        static_cast<const T*>(op.v) + batch * op.v_stride.batch + token * op.v_stride.token + head * op.v_stride.head;
    float k[kRows], q[kRows], v[4];
#pragma unroll
    for (int group = 0; group < kRows / 4; ++group) {
      const int row = row_of(group);
      load_4(gmem_k + row, head_dim - row, kVectors).to_floats(reinterpret_cast<float (&)[4]>(k[group * 4]));
      load_4(gmem_q + row, head_dim - row, kVectors).to_floats(reinterpret_cast<float (&)[4]>(q[group * 4]));
    }
    load_4(gmem_v + col, num_cols, kVectors).to_floats(v);
    float o[4];
    const auto sum_rows = [&](auto& x) { sum_step_rows<kVFirst>(x, partial[token % 2]); };
    step_token(op, (batch * shape.seqlen + token) * shape.num_value_heads + head, head, q, k, v, sum_rows, s, o);
    store_output(token, o);
  }

  // State back
  float* dst = static_cast<float*>(op.final_state);
  if (dst == nullptr) return;
  for_each_line([&](int i, int64_t offset, int num_valid) {
    float line[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) line[n] = kVFirst ? s[i / 4 * 4 + n][i % 4] : s[i][n];
    store_4(dst + offset, line, num_valid, kVectors);
  });
}

template <typename T, class Params>
cudaError_t launch_step(const Params& op, cudaStream_t stream) {
  const RecurrenceShape& shape = op.shape;
  const StepKernelParams<Params> params{
      .op = op,
      .num_v_tiles = static_cast<uint32_t>(num_step_tiles(shape)),
  };
  const auto is_aligned = [](const void* p, size_t size) { return reinterpret_cast<uintptr_t>(p) % size == 0; };
  const auto has_stride = [](const TokenStrides& stride) {
    return (stride.batch | stride.token | stride.head) % 4 == 0;
  };
  const bool has_vectors = (shape.head_dim | shape.value_dim) % 4 == 0 && is_aligned(op.initial_state, 16) &&
                           is_aligned(op.final_state, 16) && has_stride(op.q_stride) && has_stride(op.k_stride) &&
                           has_stride(op.v_stride) && is_aligned(op.q, 4 * sizeof(T)) &&
                           is_aligned(op.k, 4 * sizeof(T)) && is_aligned(op.v, 4 * sizeof(T)) &&
                           is_aligned(op.o, 4 * sizeof(T));
  const int64_t num_ctas = shape.num_seqs * shape.num_value_heads * num_step_tiles(shape);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(num_ctas), kStepThreads, 0, stream>>>(params);
    return cudaGetLastError();
  };
  const auto launch_access = [&]<int HEAD_DIM, bool kVFirst>() {
    return has_vectors ? launch(recurrent_step_kernel<Params, T, HEAD_DIM, kVFirst, true>)
                       : launch(recurrent_step_kernel<Params, T, HEAD_DIM, kVFirst, false>);
  };
  const auto launch_layout = [&]<int HEAD_DIM>() {
    return op.state_v_first ? launch_access.template operator()<HEAD_DIM, true>()
                            : launch_access.template operator()<HEAD_DIM, false>();
  };
  if (shape.head_dim <= 64) return launch_layout.template operator()<64>();
  if (shape.head_dim <= 128) return launch_layout.template operator()<128>();
  return launch_layout.template operator()<256>();
}

}  // namespace remora
