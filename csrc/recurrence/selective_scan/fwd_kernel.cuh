// Forward pass and step of the selective scan.
//
//   x_t = exp(dt_t A) x_{t-1} + dt_t u_t B_t      out_t = (C_t x_t + D u_t) silu(z_t)
//   u, delta, z, out [B, T, D] of any strides   B, C [B, T, G, N]   A [D, N]   states [rows, D, N]
//
// Sequences are cut into intervals of kScanInterval tokens, so that short batches fill the device:
//   1. selective_scan_summary_kernel, a CTA per interval and block of channels: the state an interval leaves if it
//      starts from zero, and the sum of its steps, whose product with A is the log of its decay;
//   2. selective_scan_combine_kernel, a thread per sequence, channel and state: the states between intervals, in order;
//   3. selective_scan_fwd_kernel, as 1, from the exact state: outputs.
// A thread walks tokens with its states in registers: up to 16 states need no sum over lanes. A sequence's intervals
// begin with it, so its results do not depend on its neighbours. Each exponential is computed twice. Figures:
// README.md.
#pragma once
#include "recurrence/selective_scan/scan_tile.cuh"

namespace remora {

/// States between intervals and sums of steps, [num_scan_slots, D, N] and [num_scan_slots, D].
struct ScanSummaries {
  float* states;
  float* steps;
};

template <typename T, class Traits>
__global__ void __launch_bounds__(kScanThreads, Traits::SUMMARY_CTAS)
    selective_scan_summary_kernel(const __grid_constant__ SelectiveScanInputs in, const ScanSummaries summaries,
                                  const int64_t num_channel_blocks) {
  constexpr int LD = Traits::LD, LANE_STATES = Traits::LANE_STATES;
  __shared__ float smem_u[kTileTokens * LD], smem_delta[kTileTokens * LD];
  __shared__ __align__(16) float smem_b[kTileTokens * Traits::STATES];

  __shared__ ScanPlace smem_place;
  smem_place.find<Traits::CHANNELS>(in, num_channel_blocks);
  const ScanInterval& interval = smem_place.interval;
  const ScanChannelBlock& channels = smem_place.block;
  if (interval.num_tokens == 0 || interval.is_last) return;
  const ScanBlock<T, Traits> block(in, interval, channels);

  const bool is_vector = block.has_token_vectors(in.u, in.u_stride) &&
                         block.has_token_vectors(in.delta, in.delta_stride) &&
                         block.has_token_vectors(in.b, in.b_stride);
  // All intervals but a sequence's last are full.
  float x[LANE_STATES] = {}, steps = 0.f;
#pragma unroll 1
  for (int first = 0; first < kScanInterval; first += kTileTokens) {
    if (is_vector) {
      const auto u = block.fetch(in.u, in.u_stride, first), delta = block.fetch(in.delta, in.delta_stride, first);
      const auto b = block.fetch_map(in.b, in.b_stride, first);
      __syncthreads();
      u.store(smem_u, LD), delta.store(smem_delta, LD), b.store(smem_b, Traits::STATES);
    } else {
      __syncthreads();
      block.load(in.u, in.u_stride, first, smem_u);
      block.load(in.delta, in.delta_stride, first, smem_delta);
      block.load_map(in.b, in.b_stride, first, smem_b);
    }
    __syncthreads();
    block.make_steps(smem_delta, kTileTokens);
#pragma unroll Traits::UNROLL
    for (int t = 0; t < kTileTokens; ++t) {
      const float dt = smem_delta[t * LD + block.channel], du = dt * smem_u[t * LD + block.channel];
      float b[LANE_STATES];
      block.read_map(smem_b, t, b);
      steps += dt;
#pragma unroll
      for (int j = 0; j < LANE_STATES; ++j) x[j] = exp2_approx(dt * block.rate[j]) * x[j] + du * b[j];
    }
  }
  block.store_state(x, summaries.states, interval.slot);
  if (block.is_first_lane()) {
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
  float x = p.initial_state != nullptr ? static_cast<const float*>(p.initial_state)[at.index] : 0.f;
  if (seq.num_tokens == 0 && p.final_state != nullptr) static_cast<float*>(p.final_state)[at.index] = x;
  const int64_t first_slot = first_scan_slot(seq.first_token, at.seq_idx);
  const int64_t num_intervals = (seq.num_tokens + kScanInterval - 1) / kScanInterval;
  combine_intervals(at, shape, static_cast<const float*>(p.in.a), first_slot, num_intervals, 1, summaries.states,
                    summaries.steps, x);
}

template <typename T, class Traits>
__global__ void __launch_bounds__(kScanThreads, Traits::FWD_CTAS)
    selective_scan_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p, const float* gmem_states,
                              const int64_t num_channel_blocks) {
  constexpr int LD = Traits::LD, LANE_STATES = Traits::LANE_STATES;
  const SelectiveScanInputs& in = p.in;
  __shared__ float smem_u[kTileTokens * LD], smem_delta[kTileTokens * LD], smem_z[kTileTokens * LD];
  __shared__ __align__(16) float smem_b[kTileTokens * Traits::STATES], smem_c[kTileTokens * Traits::STATES];

  __shared__ ScanPlace smem_place;
  smem_place.find<Traits::CHANNELS>(in, num_channel_blocks);
  const ScanInterval& interval = smem_place.interval;
  const ScanChannelBlock& channels = smem_place.block;
  if (interval.num_tokens == 0) return;
  const ScanBlock<T, Traits> block(in, interval, channels);
  const float skip = block.channel_value(in.skip);
  const bool is_vector = block.has_token_vectors(in.u, in.u_stride) &&
                         block.has_token_vectors(in.delta, in.delta_stride) &&
                         block.has_token_vectors(in.z, in.z_stride) && block.has_token_vectors(in.b, in.b_stride) &&
                         block.has_token_vectors(in.c, in.c_stride);

  float x[LANE_STATES];
  if (interval.chunk_idx == 0) {
    block.load_state(p.initial_state, interval.seq_idx, x);
    if (p.saved_states != nullptr) block.store_state(x, p.saved_states, interval.slot);
  } else {
    block.load_state(gmem_states, interval.slot, x);
  }
#pragma unroll 1
  for (int first = 0; first < interval.num_tokens; first += kTileTokens) {
    if (is_vector && first + kTileTokens <= interval.num_tokens) {
      const auto u = block.fetch(in.u, in.u_stride, first), delta = block.fetch(in.delta, in.delta_stride, first);
      const auto z = block.fetch(in.z, in.z_stride, first);
      const auto b = block.fetch_map(in.b, in.b_stride, first), c = block.fetch_map(in.c, in.c_stride, first);
      __syncthreads();
      u.store(smem_u, LD), delta.store(smem_delta, LD), z.store(smem_z, LD);
      b.store(smem_b, Traits::STATES), c.store(smem_c, Traits::STATES);
    } else {
      __syncthreads();
      block.load(in.u, in.u_stride, first, smem_u);
      block.load(in.delta, in.delta_stride, first, smem_delta);
      if (in.z != nullptr) block.load(in.z, in.z_stride, first, smem_z);
      block.load_map(in.b, in.b_stride, first, smem_b);
      block.load_map(in.c, in.c_stride, first, smem_c);
    }
    __syncthreads();
    block.make_steps(smem_delta, interval.num_tokens - first);
    if (in.z != nullptr) block.make_gates(smem_z);
#pragma unroll Traits::UNROLL
    for (int t = 0; t < kTileTokens; ++t) {
      const int at = t * LD + block.channel;
      const float u = smem_u[at], dt = smem_delta[at], du = dt * u;
      float b[LANE_STATES], c[LANE_STATES], y = 0.f;
      block.read_map(smem_b, t, b);
      block.read_map(smem_c, t, c);
#pragma unroll
      for (int j = 0; j < LANE_STATES; ++j) {
        x[j] = exp2_approx(dt * block.rate[j]) * x[j] + du * b[j];
        y += x[j] * c[j];
      }
      y = warp_sum<Traits::LANES>(y) + skip * u;
      __syncwarp();
      if (threadIdx.x % Traits::LANES == 0) smem_u[at] = in.z != nullptr ? y * smem_z[at] : y;
    }
    __syncthreads();
    store_channels<kTileTokens, Traits::CHANNELS, T>(smem_u, interval, channels, first, p.out, p.out_stride);
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
template <typename T, class Traits>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_step_kernel(const __grid_constant__ SelectiveScanStepParams p, const int64_t num_channel_blocks) {
  const SelectiveScanInputs& in = p.in;
  const int64_t seq_idx = blockIdx.x / num_channel_blocks;
  const ScanInterval interval{seq_idx, seq_idx, 0, seq_idx, 0, 1, 1, true};
  const ScanChannelBlock channels = find_channel_block<Traits::CHANNELS>(in.shape, blockIdx.x % num_channel_blocks);
  const ScanBlock<T, Traits> block(in, interval, channels);
  const int64_t slot = p.state_indices != nullptr ? p.state_indices[seq_idx] : seq_idx;
  const bool is_skipped = slot < 0 || slot >= p.num_slots;

  const auto channel_input = [&](const void* data, const ScanStrides& stride) {
    const T* src = channel_tokens(static_cast<const T*>(data), stride, interval, channels, 0);
    return data != nullptr && block.is_valid ? static_cast<float>(src[block.channel * stride.channel]) : 0.f;
  };
  const auto map_input = [&](const void* data, const ScanGroupStrides& stride, int j) {
    const T* src = static_cast<const T*>(data) + seq_idx * stride.batch + channels.group * stride.group;
    return block.has_state(j) ? static_cast<float>(src[(block.first_state + j) * stride.state]) : 0.f;
  };
  const float u = channel_input(in.u, in.u_stride);
  const float dt = block.step_of(channel_input(in.delta, in.delta_stride));

  float x[Traits::LANE_STATES], y = 0.f;
  block.load_state(is_skipped ? nullptr : p.state, slot, x);
#pragma unroll
  for (int j = 0; j < Traits::LANE_STATES; ++j) {
    x[j] = exp2_approx(dt * block.rate[j]) * x[j] + dt * u * map_input(in.b, in.b_stride, j);
    y += x[j] * map_input(in.c, in.c_stride, j);
  }
  y = warp_sum<Traits::LANES>(y) + block.channel_value(in.skip) * u;
  if (in.z != nullptr) {
    const float z = channel_input(in.z, in.z_stride);
    y *= z * sigmoid(z);
  }
  if (!is_skipped) block.store_state(x, p.state, slot);
  if (block.is_first_lane()) {
    static_cast<T*>(p.out)[seq_idx * in.shape.num_channels + channels.first + block.channel] =
        static_cast<T>(is_skipped ? 0.f : y);
  }
}

}  // namespace remora
