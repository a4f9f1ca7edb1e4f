// CUDA entry points of linear attention with scalar decay: which walks an operator takes, and the small kernels around
// them.
#include "recurrence/simple_gla/launch.h"

#include <algorithm>

#include "recurrence/sequence.cuh"
#include "recurrence/simple_gla/walk.h"
#include "recurrence/step_launch.h"

namespace remora {
namespace {

constexpr int64_t kMaxCtas = INT32_MAX;
constexpr int kThreads = 256;

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_256(int64_t size) { return divide_up(size, 256) * 256; }

/// Sequences are cut into spans where the heads alone leave most of the device idle. Depends on neither the batch nor
/// the lengths, so that a sequence's bits do not.
int64_t span_tokens_of(const RecurrenceShape& shape, int64_t num_x_tiles, int num_sms) {
  return shape.num_value_heads * num_x_tiles * 2 < num_sms ? 1024 : shape.batch * shape.seqlen + kStateInterval;
}

struct SpanPlan {
  int64_t span_tokens, num_spans;  // spans of the longest sequence possible
  int64_t states_size, decays_size;

  SpanPlan(const RecurrenceShape& shape, int64_t num_x_tiles, bool is_routed, int num_sms) {
    const int64_t total = shape.batch * shape.seqlen;
    span_tokens = divide_up(span_tokens_of(shape, num_x_tiles, num_sms), kStateInterval) * kStateInterval;
    num_spans = std::max<int64_t>(divide_up(is_routed ? total : shape.seqlen, span_tokens), 1);
    const int64_t num_slots = num_spans == 1 ? 0 : total / span_tokens + shape.num_seqs;
    states_size = align_256(num_slots * shape.num_value_heads * shape.head_dim * shape.value_dim * 4);
    decays_size = align_256(num_slots * shape.num_value_heads * 4);
  }
};

int64_t num_tiles(int64_t channels) { return divide_up(channels, kWalkBlockX); }

/// Turns the sums of spans into the states that enter them, in walking order. Grid: (sequence, value head, 256 elements
/// of the state).
__global__ void __launch_bounds__(kThreads)
    simple_gla_combine_kernel(const __grid_constant__ WalkParams params, const int64_t head_dim,
                              const int64_t value_dim, const bool is_reverse, const float* entry, const bool v_first) {
  const RecurrenceShape& shape = params.shape;
  const int64_t state_size = head_dim * value_dim, num_parts = (state_size + kThreads - 1) / kThreads;
  const int64_t element = blockIdx.x % num_parts * kThreads + threadIdx.x, index = blockIdx.x / num_parts;
  const int64_t head = index % shape.num_value_heads, seq_idx = index / shape.num_value_heads;
  const Sequence seq = find_sequence(shape, params.cu_seqlens, seq_idx);
  if (element >= state_size) return;
  const int64_t num_spans = (seq.num_tokens + params.span_tokens - 1) / params.span_tokens;
  const int64_t first_slot = seq.first_token / params.span_tokens + seq_idx;
  const int64_t k = element / value_dim, v = element % value_dim;
  float state = 0.f;
  if (entry != nullptr) {
    state = entry[(seq_idx * shape.num_value_heads + head) * state_size + (v_first ? v * head_dim + k : element)];
  }
  for (int64_t i = 0; i < num_spans; ++i) {
    const int64_t slot = (first_slot + (is_reverse ? num_spans - 1 - i : i)) * shape.num_value_heads + head;
    float& place = params.span_states[slot * state_size + element];
    const float sum = place;
    place = state;
    // The sum of the span walked first already holds what enters it.
    state = i == 0 ? sum : fmaf(params.span_decays[slot], state, sum);
  }
}

/// Gradients of a key head from those of its value heads. Grid: one thread an element of the sums.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    simple_gla_group_sum_kernel(const float* __restrict__ partial, T* __restrict__ sums, const int64_t num_elements,
                                const int64_t head_dim, const int group_size) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= num_elements) return;
  const float* src = partial + i / head_dim * group_size * head_dim + i % head_dim;
  float sum = 0.f;
  for (int j = 0; j < group_size; ++j) sum += src[j * head_dim];
  sums[i] = static_cast<T>(sum);
}

/// dg from the shares of the tiles of K of both walks. Grid: one thread an element.
__global__ void __launch_bounds__(kThreads)
    simple_gla_gate_kernel(const float* __restrict__ dots, float* __restrict__ dg, const int64_t num_elements,
                           const int num_parts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= num_elements) return;
  float sum = 0.f;
  for (int part = 0; part < num_parts; ++part) sum += dots[part * num_elements + i];
  dg[i] = sum;
}

struct ClearParams {
  RecurrenceShape shape;
  const int32_t *cu_seqlens, *rows;
  char* data[6];
  int64_t row_size[6];
};

/// Zeroes the rows of tensors that no sequence covers. Grid: one warp a packed position.
__global__ void __launch_bounds__(kThreads) simple_gla_clear_kernel(const __grid_constant__ ClearParams params) {
  const RecurrenceShape& shape = params.shape;
  const int64_t total = shape.batch * shape.seqlen;
  const int64_t position = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (position >= total) return;
  const bool is_covered = position >= find_offset(shape, params.cu_seqlens, 0) &&
                          position < find_offset(shape, params.cu_seqlens, shape.num_seqs);
  if (is_covered) return;
  const int64_t row = row_at(shape, params.rows, position).row;
  for (int t = 0; t < 6; ++t) {
    if (params.data[t] == nullptr) continue;
    auto* dst = reinterpret_cast<uint16_t*>(params.data[t] + row * params.row_size[t]);
    for (int64_t i = threadIdx.x % 32; i < params.row_size[t] / 2; i += 32) dst[i] = 0;
  }
}

cudaError_t clear_uncovered(const ClearParams& params, cudaStream_t stream) {
  const int64_t num_ctas = divide_up(params.shape.batch * params.shape.seqlen, kThreads / 32);
  if (params.cu_seqlens == nullptr || num_ctas == 0) return cudaSuccess;
  simple_gla_clear_kernel<<<static_cast<unsigned>(num_ctas), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_walk_of(DType dtype, const WalkParams& walk, bool is_reverse, bool has_dots, const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const int dim = walk_dim(walk.write.num_channels);
  switch (dtype) {
    case DType::kBFloat16:
      return launch_walk<__nv_bfloat16>(walk, dim, is_reverse, has_dots, launch.arch, stream);
    case DType::kFloat16:
      return launch_walk<__half>(walk, dim, is_reverse, has_dots, launch.arch, stream);
    default:
      return launch_walk<float>(walk, dim, is_reverse, has_dots, launch.arch, stream);
  }
}

/// The states that enter the spans of a walk, if there are several: their sums, then a fold.
cudaError_t run_summary(DType dtype, const WalkParams& walk, bool is_reverse, bool v_first, const Launch& launch) {
  if (walk.num_spans == 1) return cudaSuccess;
  WalkParams summary = walk;
  summary.out = nullptr, summary.exit = nullptr;
  summary.saved_use = WalkParams::kNone;
  cudaError_t error = launch_walk_of(dtype, summary, is_reverse, false, launch);
  if (error != cudaSuccess) return error;
  const RecurrenceShape& shape = walk.shape;
  const int64_t num_ctas =
      shape.num_seqs * shape.num_value_heads * divide_up(shape.head_dim * shape.value_dim, kThreads);
  simple_gla_combine_kernel<<<static_cast<unsigned>(num_ctas), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(
      walk, shape.head_dim, shape.value_dim, is_reverse, walk.entry, v_first);
  return cudaGetLastError();
}

bool is_aligned_16(const WalkTensor& x, int64_t element_size) {
  return (reinterpret_cast<uintptr_t>(x.data) | ((x.stride.batch | x.stride.token | x.stride.head) * element_size) |
          (x.num_channels * element_size)) %
             16 ==
         0;
}

int64_t num_walk_ctas(const WalkParams& walk) {
  return walk.shape.num_seqs * walk.num_spans * walk.shape.num_value_heads * walk.num_x_tiles;
}

WalkTensor tensor_of(const void* data, const TokenStrides& stride, int64_t channels, int64_t group_size) {
  return {data, stride, static_cast<int>(channels), static_cast<int>(group_size)};
}
WalkTensor dense_tensor_of(const void* data, const RecurrenceShape& shape, int64_t channels) {
  const int64_t token = shape.num_value_heads * channels;
  return tensor_of(data, {shape.seqlen * token, token, channels}, channels, 1);
}

struct BwdPlan {
  SpanPlan spans;
  int64_t num_chunk_slots, chunk_states_size, group_size, dots_size;

  BwdPlan(const SimpleGlaBwdParams& p, const Launch& launch)
      : spans(p.shape, num_tiles(std::max(p.shape.head_dim, p.shape.value_dim)), p.rows != nullptr, launch.num_sms) {
    const RecurrenceShape& shape = p.shape;
    const int64_t total = shape.batch * shape.seqlen, heads = shape.num_value_heads;
    num_chunk_slots = total / walk_block_t(size_of(p.dtype)) + shape.num_seqs;
    chunk_states_size = p.dg == nullptr
                            ? 0
                            : align_256(num_chunk_slots * heads * num_tiles(shape.head_dim) *
                                        walk_state_size(walk_dim(shape.value_dim)) * size_of(p.saved_dtype));
    group_size = heads > shape.num_heads ? align_256(total * heads * shape.head_dim * 4) : 0;
    dots_size = p.dg == nullptr ? 0 : align_256(2 * num_tiles(shape.head_dim) * total * heads * 4);
  }
  int64_t size() const { return spans.states_size + spans.decays_size + chunk_states_size + group_size + dots_size; }
};

}  // namespace

int64_t simple_gla_fwd_workspace(const SimpleGlaFwdParams& params, const Launch& launch) {
  const SpanPlan plan(params.shape, num_tiles(params.shape.value_dim), params.rows != nullptr, launch.num_sms);
  return plan.states_size + plan.decays_size;
}

Error simple_gla_fwd(const SimpleGlaFwdParams& p, const Launch& launch) {
  const RecurrenceShape& shape = p.shape;
  const int64_t size = size_of(p.dtype), group = shape.num_value_heads / std::max<int64_t>(shape.num_heads, 1);
  if (p.dtype == DType::kFloat64 || shape.head_dim > 128) {
    return "simple_gla_fwd on CUDA: head_dim must be at most 128, dtype not float64";
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (shape.num_seqs == 0) {
    const int64_t num_elements = shape.batch * shape.seqlen * shape.num_value_heads * shape.value_dim;
    return message_of(cudaMemsetAsync(p.o, 0, num_elements * size, stream));
  }
  const SpanPlan plan(shape, num_tiles(shape.value_dim), p.rows != nullptr, launch.num_sms);
  WalkParams walk{};
  walk.shape = shape;
  walk.g = static_cast<const float*>(p.g), walk.cu_seqlens = p.cu_seqlens, walk.rows = p.rows;
  walk.scale = static_cast<float>(p.scale);
  walk.x = tensor_of(p.v, p.v_stride, shape.value_dim, 1);
  walk.write = tensor_of(p.k, p.k_stride, shape.head_dim, group);
  walk.read = tensor_of(p.q, p.q_stride, shape.head_dim, group);
  walk.out = p.o;
  walk.is_aligned = is_aligned_16(walk.x, size) && is_aligned_16(walk.write, size) && is_aligned_16(walk.read, size) &&
                    reinterpret_cast<uintptr_t>(p.o) % 16 == 0;
  walk.entry = static_cast<const float*>(p.initial_state), walk.exit = static_cast<float*>(p.final_state);
  walk.entry_stride_x = p.state_v_first ? shape.head_dim : 1,
  walk.entry_stride_d = p.state_v_first ? 1 : shape.value_dim;
  walk.saved_stride_x = 1, walk.saved_stride_d = shape.value_dim;
  walk.saved_states = p.saved_states;
  walk.has_saved_pairs = shape.value_dim % 2 == 0 && reinterpret_cast<uintptr_t>(p.saved_states) % 4 == 0;
  walk.saved_use = p.saved_states != nullptr ? WalkParams::kWrite : WalkParams::kNone;
  walk.num_x_tiles = num_tiles(shape.value_dim);
  walk.num_spans = plan.num_spans, walk.span_tokens = plan.span_tokens;
  walk.span_states = static_cast<float*>(p.workspace);
  walk.span_decays = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.states_size);
  if (num_walk_ctas(walk) == 0) return nullptr;
  if (num_walk_ctas(walk) > kMaxCtas) return "simple_gla_fwd on CUDA: too many sequences and heads";
  ClearParams clear{
      shape, p.cu_seqlens, p.rows, {static_cast<char*>(p.o)}, {walk.shape.num_value_heads * shape.value_dim * size}};
  cudaError_t error = clear_uncovered(clear, stream);
  if (error == cudaSuccess) error = run_summary(p.dtype, walk, false, p.state_v_first, launch);
  if (error == cudaSuccess) error = launch_walk_of(p.dtype, walk, false, false, launch);
  return message_of(error);
}

int64_t simple_gla_bwd_workspace(const SimpleGlaBwdParams& params, const Launch& launch) {
  return BwdPlan(params, launch).size();
}

Error simple_gla_bwd(const SimpleGlaBwdParams& p, const Launch& launch) {
  const RecurrenceShape& shape = p.shape;
  const int64_t size = size_of(p.dtype), group = shape.num_value_heads / std::max<int64_t>(shape.num_heads, 1);
  const int64_t total = shape.batch * shape.seqlen;
  if (p.dtype == DType::kFloat64 || shape.head_dim > 128 || shape.value_dim > 128) {
    return "simple_gla_bwd on CUDA: head_dim and value_dim must be at most 128, dtype not float64";
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const BwdPlan plan(p, launch);
  char* workspace = static_cast<char*>(p.workspace);
  const auto take = [&](int64_t bytes) {
    char* part = workspace;
    workspace += bytes;
    return part;
  };
  WalkParams walk{};
  walk.shape = shape;
  walk.g = static_cast<const float*>(p.g), walk.cu_seqlens = p.cu_seqlens, walk.rows = p.rows;
  walk.scale = static_cast<float>(p.scale);
  walk.num_spans = plan.spans.num_spans, walk.span_tokens = plan.spans.span_tokens;
  walk.span_states = reinterpret_cast<float*>(take(plan.spans.states_size));
  walk.span_decays = reinterpret_cast<float*>(take(plan.spans.decays_size));
  walk.saved_states = const_cast<void*>(p.saved_states);
  walk.chunk_states = p.dg == nullptr ? nullptr : take(plan.chunk_states_size);
  auto* partial = reinterpret_cast<float*>(take(plan.group_size));
  auto* dots = p.dg == nullptr ? nullptr : reinterpret_cast<float*>(take(plan.dots_size));
  const WalkTensor q = tensor_of(p.q, p.q_stride, shape.head_dim, group);
  const WalkTensor k = tensor_of(p.k, p.k_stride, shape.head_dim, group);
  const WalkTensor v = tensor_of(p.v, p.v_stride, shape.value_dim, 1);
  const WalkTensor d_o = dense_tensor_of(p.d_o, shape, shape.value_dim);
  walk.is_aligned =
      is_aligned_16(q, size) && is_aligned_16(k, size) && is_aligned_16(v, size) && is_aligned_16(d_o, size) &&
      (reinterpret_cast<uintptr_t>(p.dq) | reinterpret_cast<uintptr_t>(p.dk) | reinterpret_cast<uintptr_t>(p.dv)) %
              16 ==
          0;
  const int64_t k_tiles = num_tiles(shape.head_dim);
  if (shape.num_seqs * walk.num_spans * shape.num_value_heads * std::max(k_tiles, num_tiles(shape.value_dim)) >
          kMaxCtas ||
      total * shape.num_value_heads * shape.head_dim / kThreads >= kMaxCtas) {
    return "simple_gla_bwd on CUDA: too many sequences, tokens and heads";
  }
  ClearParams clear{shape,
                    p.cu_seqlens,
                    p.rows,
                    {static_cast<char*>(p.dq), static_cast<char*>(p.dk), static_cast<char*>(p.dv),
                     reinterpret_cast<char*>(group > 1 ? partial : nullptr)},
                    {shape.num_heads * shape.head_dim * size, shape.num_heads * shape.head_dim * size,
                     shape.num_value_heads * shape.value_dim * size, shape.num_value_heads * shape.head_dim * 4}};
  for (int part = 0; part < 2 * k_tiles && dots != nullptr; ++part) {
    ClearParams clear_dots{shape,
                           p.cu_seqlens,
                           p.rows,
                           {reinterpret_cast<char*>(dots + part * total * shape.num_value_heads)},
                           {shape.num_value_heads * 4}};
    if (const cudaError_t error = clear_uncovered(clear_dots, stream); error != cudaSuccess) return message_of(error);
  }
  if (const cudaError_t error = clear_uncovered(clear, stream); error != cudaSuccess) return message_of(error);
  if (shape.num_seqs == 0 || total == 0) return nullptr;
  if (p.rows != nullptr && plan.group_size + plan.dots_size > 0) {
    // Rows that a defective permutation leaves out must be readable.
    void* first = group > 1 ? static_cast<void*>(partial) : dots;
    const cudaError_t error = cudaMemsetAsync(first, 0, plan.group_size + plan.dots_size, stream);
    if (error != cudaSuccess) return message_of(error);
  }

  const auto sum_groups = [&](void* to) {
    if (group == 1) return cudaSuccess;
    const int64_t num_elements = total * shape.num_heads * shape.head_dim;
    const auto sum = [&](auto* sums) {
      simple_gla_group_sum_kernel<<<static_cast<unsigned>(divide_up(num_elements, kThreads)), kThreads, 0, stream>>>(
          partial, sums, num_elements, shape.head_dim, static_cast<int>(group));
      return cudaGetLastError();
    };
    switch (p.dtype) {
      case DType::kBFloat16:
        return sum(static_cast<__nv_bfloat16*>(to));
      case DType::kFloat16:
        return sum(static_cast<__half*>(to));
      default:
        return sum(static_cast<float*>(to));
    }
  };

  // dq: spans start from saved states, a sequence from what its first one holds rounded. The columns are K.
  WalkParams dq = walk;
  dq.x = k, dq.write = v, dq.read = d_o, dq.y = q;
  dq.out = group > 1 ? static_cast<void*>(partial) : p.dq, dq.is_out_float = group > 1;
  dq.saved_stride_x = shape.value_dim, dq.saved_stride_d = 1;
  dq.saved_use = WalkParams::kStartFrom, dq.num_x_tiles = k_tiles;
  dq.entry = static_cast<const float*>(p.initial_state);
  dq.entry_stride_x = p.state_v_first ? 1 : shape.value_dim, dq.entry_stride_d = p.state_v_first ? shape.head_dim : 1;
  dq.dots = dots;
  cudaError_t error = launch_walk_of(p.dtype, dq, false, dots != nullptr, launch);
  if (error == cudaSuccess) error = sum_groups(p.dq);
  if (error != cudaSuccess) return message_of(error);

  // dv, and the sums of spans in reverse. The columns are V.
  WalkParams dv = walk;
  dv.x = d_o, dv.write = q, dv.read = k, dv.out = p.dv;
  dv.entry = static_cast<const float*>(p.d_final_state), dv.exit = static_cast<float*>(p.d_initial_state);
  dv.entry_stride_x = p.state_v_first ? shape.head_dim : 1, dv.entry_stride_d = p.state_v_first ? 1 : shape.value_dim;
  dv.saved_stride_x = 1, dv.saved_stride_d = shape.value_dim;
  dv.num_x_tiles = num_tiles(shape.value_dim);
  error = run_summary(p.dtype, dv, true, p.state_v_first, launch);
  if (error == cudaSuccess) error = launch_walk_of(p.dtype, dv, true, false, launch);
  if (error != cudaSuccess) return message_of(error);

  // dk
  WalkParams dk = walk;
  dk.x = q, dk.write = d_o, dk.read = v, dk.y = k;
  dk.out = group > 1 ? static_cast<void*>(partial) : p.dk, dk.is_out_float = group > 1;
  dk.entry = dv.entry, dk.entry_stride_x = dv.entry_stride_d, dk.entry_stride_d = dv.entry_stride_x;
  dk.saved_stride_x = shape.value_dim, dk.saved_stride_d = 1;
  dk.num_x_tiles = k_tiles;
  dk.dots = dots == nullptr ? nullptr : dots + k_tiles * total * shape.num_value_heads;
  error = launch_walk_of(p.dtype, dk, true, dots != nullptr, launch);
  if (error == cudaSuccess) error = sum_groups(p.dk);
  if (error == cudaSuccess && dots != nullptr) {
    const int64_t num_elements = total * shape.num_value_heads;
    simple_gla_gate_kernel<<<static_cast<unsigned>(divide_up(num_elements, kThreads)), kThreads, 0, stream>>>(
        dots, static_cast<float*>(p.dg), num_elements, static_cast<int>(2 * k_tiles));
    error = cudaGetLastError();
  }
  return message_of(error);
}

Error simple_gla_step(const SimpleGlaStepParams& params, const Launch& launch) { return run_step(params, launch); }

}  // namespace remora
