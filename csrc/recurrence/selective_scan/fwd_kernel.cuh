// Forward pass and step of the selective scan.
//
//   x_t = exp(dt_t A) x_{t-1} + dt_t u_t B_t      out_t = (C_t x_t + D u_t) silu(z_t)
//   u, delta, z, out [B, T, D] of any strides   B, C [B, T, G, N]   A [D, N]   states [rows, D, N]
//
// Sequences are cut into intervals of kScanInterval tokens, so that short batches fill the device:
//   1. selective_scan_summary_kernel, a CTA per interval and block of channels: the state an interval leaves if it
//   starts
//      from zero, and the sum of its steps, whose product with A is the log of its decay;
//   2. selective_scan_combine_kernel, a thread per sequence, channel and state: the states between intervals, in order;
//   3. selective_scan_fwd_kernel, as 1, from the exact state: outputs.
// A sequence's intervals begin with it, so its results do not depend on its neighbours. Each exponential is computed
// twice. Figures: README.md.
#pragma once
#include "recurrence/selective_scan/scan_tile.cuh"

namespace remora {

/// States between intervals and sums of steps, [num_scan_slots, D, N] and [num_scan_slots, D].
struct ScanSummaries {
  float* states;
  float* steps;
};

template <typename T, int LANES>
__global__ void __launch_bounds__(kScanThreads, 6)
    selective_scan_summary_kernel(const __grid_constant__ SelectiveScanInputs in, const ScanSummaries summaries,
                                  const int64_t num_channel_blocks) {
  using Block = ScanBlock<T, LANES>;
  using Traits = ScanTraits<LANES>;
  __shared__ float smem_u[kTileTokens * Traits::LD], smem_delta[kTileTokens * Traits::LD],
      smem_dt[kTileTokens * Traits::LD];
  __shared__ __align__(16) float smem_b[kTileTokens * Traits::LD_STATES];

  const ScanInterval interval = find_interval(in, blockIdx.x / num_channel_blocks);
  if (interval.num_tokens == 0 || interval.is_last) return;
  const ScanChannelBlock channels = find_channel_block<LANES>(in.shape, blockIdx.x % num_channel_blocks);
  const Block block(in, interval, channels);

  float x[kStatesPerLane] = {}, steps = 0.f;
  for (int first = 0; first < interval.num_tokens; first += kTileTokens) {
    __syncthreads();
    block.load_channels(in.u, in.u_stride, first, smem_u);
    block.load_channels(in.delta, in.delta_stride, first, smem_delta);
    block.load_map(in.b, in.b_stride, first, smem_b);
    __syncthreads();
    block.make_steps(first, smem_delta, smem_dt);
    __syncthreads();
#pragma unroll 4
    for (int t = 0; t < kTileTokens; ++t) {
      const float dt = smem_dt[t * Traits::LD + block.channel], du = dt * smem_u[t * Traits::LD + block.channel];
      const float4 b = *reinterpret_cast<const float4*>(smem_b + t * Traits::LD_STATES + block.first_state);
      const float b_of[kStatesPerLane] = {b.x, b.y, b.z, b.w};
      steps += dt;
#pragma unroll
      for (int j = 0; j < kStatesPerLane; ++j) x[j] = exp2f(dt * block.rate[j]) * x[j] + du * b_of[j];
    }
  }
  block.store_state(x, summaries.states, interval.slot);
  if (block.is_valid && threadIdx.x % LANES == 0) {
    summaries.steps[interval.slot * in.shape.num_channels + channels.first + block.channel] = steps;
  }
}

/// Replaces what intervals add by the states that enter them. Sequences without tokens pass their state on. A CTA works
/// on one sequence.
static __global__ void __launch_bounds__(kScanThreads)
    selective_scan_combine_kernel(const __grid_constant__ SelectiveScanFwdParams p, const ScanSummaries summaries) {
  const SelectiveScanShape& shape = p.in.shape;
  const ScanStateThread at(shape);
  const Sequence seq = find_sequence(shape.sequences, p.in.cu_seqlens, at.seq_idx);
  if (!at.is_valid) return;
  const float rate = static_cast<const float*>(p.in.a)[at.offset] * kLog2e;
  float x = p.initial_state != nullptr ? static_cast<const float*>(p.initial_state)[at.index] : 0.f;
  if (seq.num_tokens == 0 && p.final_state != nullptr) static_cast<float*>(p.final_state)[at.index] = x;

  const int64_t first_slot = first_scan_slot(seq.first_token, at.seq_idx);
  const int64_t num_intervals = (seq.num_tokens + kScanInterval - 1) / kScanInterval;
  for (int64_t i = 0; i < num_intervals; ++i) {
    float* state = summaries.states + (first_slot + i) * at.per_seq + at.offset;
    const bool is_last = i == num_intervals - 1;
    const float added = is_last ? 0.f : *state;
    const float steps = is_last ? 0.f : summaries.steps[(first_slot + i) * shape.num_channels + at.channel];
    *state = x;
    x = exp2f(steps * rate) * x + added;
  }
}

template <typename T, int LANES>
__global__ void __launch_bounds__(kScanThreads, 4)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p, const float* gmem_states,
                              const int64_t num_channel_blocks) {
  using Block = ScanBlock<T, LANES>;
  using Traits = ScanTraits<LANES>;
  const SelectiveScanInputs& in = p.in;
  __shared__ float smem_u[kTileTokens * Traits::LD], smem_delta[kTileTokens * Traits::LD],
      smem_dt[kTileTokens * Traits::LD], smem_z[kTileTokens * Traits::LD], smem_y[kTileTokens * Traits::LD];
  __shared__ __align__(16) float smem_b[kTileTokens * Traits::LD_STATES], smem_c[kTileTokens * Traits::LD_STATES];

  const ScanInterval interval = find_interval(in, blockIdx.x / num_channel_blocks);
  if (interval.num_tokens == 0) return;
  const ScanChannelBlock channels = find_channel_block<LANES>(in.shape, blockIdx.x % num_channel_blocks);
  const Block block(in, interval, channels);
  const float skip = block.channel_value(in.skip);

  float x[kStatesPerLane];
  if (interval.chunk_idx == 0) {
    block.load_state(p.initial_state, interval.seq_idx, x);
    if (p.saved_states != nullptr) block.store_state(x, p.saved_states, interval.slot);
  } else {
    block.load_state(gmem_states, interval.slot, x);
  }
  for (int first = 0; first < interval.num_tokens; first += kTileTokens) {
    __syncthreads();
    block.load_channels(in.u, in.u_stride, first, smem_u);
    block.load_channels(in.delta, in.delta_stride, first, smem_delta);
    if (in.z != nullptr) block.load_channels(in.z, in.z_stride, first, smem_z);
    block.load_map(in.b, in.b_stride, first, smem_b);
    block.load_map(in.c, in.c_stride, first, smem_c);
    __syncthreads();
    block.make_steps(first, smem_delta, smem_dt);
    __syncthreads();
#pragma unroll 4
    for (int t = 0; t < kTileTokens; ++t) {
      const int at = t * Traits::LD + block.channel;
      const float u = smem_u[at], dt = smem_dt[at], du = dt * u;
      const float4 b = *reinterpret_cast<const float4*>(smem_b + t * Traits::LD_STATES + block.first_state);
      const float4 c = *reinterpret_cast<const float4*>(smem_c + t * Traits::LD_STATES + block.first_state);
      const float b_of[kStatesPerLane] = {b.x, b.y, b.z, b.w}, c_of[kStatesPerLane] = {c.x, c.y, c.z, c.w};
      float y = 0.f;
#pragma unroll
      for (int j = 0; j < kStatesPerLane; ++j) {
        x[j] = exp2f(dt * block.rate[j]) * x[j] + du * b_of[j];
        y += x[j] * c_of[j];
      }
      y = warp_sum<LANES>(y) + skip * u;
      if (threadIdx.x % LANES == 0) {
        if (in.z != nullptr) {
          const float z = smem_z[at];
          y *= z * scan_sigmoid(z);
        }
        smem_y[at] = y;
      }
    }
    __syncthreads();
    block.store_channels(smem_y, first, p.out, p.out_stride);
  }
  if (interval.is_last && p.final_state != nullptr) block.store_state(x, p.final_state, interval.seq_idx);
}

/// Zeroes the tokens in front of the first sequence and behind the last, [T, D] of any strides.
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_clear_kernel(const __grid_constant__ SelectiveScanInputs in, T* gmem_out, const ScanStrides stride) {
  const RecurrenceShape& shape = in.shape.sequences;
  const int64_t begin = find_sequence(shape, in.cu_seqlens, 0).first_token;
  const Sequence last = find_sequence(shape, in.cu_seqlens, shape.num_seqs - 1);
  const int64_t end = last.first_token + last.num_tokens, num_uncovered = begin + max(shape.seqlen - end, int64_t{0});
  for (int64_t i = int64_t{blockIdx.x} * kScanThreads + threadIdx.x; i < num_uncovered * in.shape.num_channels;
       i += int64_t{gridDim.x} * kScanThreads) {
    const int64_t token = i / in.shape.num_channels, channel = i % in.shape.num_channels;
    gmem_out[(token < begin ? token : token - begin + end) * stride.token + channel * stride.channel] = T(0.f);
  }
}

/// One token of a sequence and block of channels.
template <typename T, int LANES>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_step_kernel(const __grid_constant__ SelectiveScanStepParams p, const int64_t num_channel_blocks) {
  const SelectiveScanInputs& in = p.in;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const ScanInterval interval{seq_idx, seq_idx, 0, seq_idx, 0, 1, 1, true};
  const ScanChannelBlock channels = find_channel_block<LANES>(in.shape, blockIdx.x % num_channel_blocks);
  const ScanBlock<T, LANES> block(in, interval, channels);
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[seq_idx] : seq_idx;
  const bool is_skipped = slot < 0 || slot >= p.num_slots;

  const auto channel_input = [&](const void* data, const ScanStrides& stride) {
    const T* src = block.channel_rows(static_cast<const T*>(data), stride, 0);
    return data != nullptr && block.is_valid ? static_cast<float>(src[block.channel * stride.channel]) : 0.f;
  };
  const auto map_input = [&](const void* data, const ScanGroupStrides& stride, int j) {
    const T* src = static_cast<const T*>(data) + seq_idx * stride.batch + channels.group * stride.group;
    return block.has_state(j) ? static_cast<float>(src[(block.first_state + j) * stride.state]) : 0.f;
  };
  const float u = channel_input(in.u, in.u_stride);
  float dt = channel_input(in.delta, in.delta_stride) + block.channel_value(in.delta_bias);
  dt = in.delta_softplus ? scan_softplus(dt) : dt;

  float x[kStatesPerLane], y = 0.f;
  block.load_state(is_skipped ? nullptr : p.state, slot, x);
#pragma unroll
  for (int j = 0; j < kStatesPerLane; ++j) {
    x[j] = exp2f(dt * block.rate[j]) * x[j] + dt * u * map_input(in.b, in.b_stride, j);
    y += x[j] * map_input(in.c, in.c_stride, j);
  }
  y = warp_sum<LANES>(y) + block.channel_value(in.skip) * u;
  if (in.z != nullptr) {
    const float z = channel_input(in.z, in.z_stride);
    y *= z * scan_sigmoid(z);
  }
  if (!is_skipped) block.store_state(x, p.state, slot);
  if (block.is_valid && threadIdx.x % LANES == 0) {
    static_cast<T*>(p.out)[seq_idx * in.shape.num_channels + channels.first + block.channel] =
        static_cast<T>(is_skipped ? 0.f : y);
  }
}

}  // namespace remora
