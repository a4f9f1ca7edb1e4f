// Backward pass of the selective scan. With dy = d_out silu(z) and L_t the gradient of x_t:
//
//   L_t = dy_t C_t + exp(dt_{t+1} A) L_{t+1}          e_t = L_t x_{t-1} exp(dt_t A)
//   du = D dy + dt <L, B>     d dt = <e, A> + u <L, B>     dA = sum e dt     dB = sum_d L dt u     dC = sum_d dy x
//
// As the forward pass, over the same intervals:
//   1. selective_scan_bwd_summary_kernel: the gradient that an interval hands to the left if nothing comes from the
//   right;
//   2. selective_scan_bwd_combine_kernel: the gradients of the states between intervals, from the right;
//   3. selective_scan_bwd_kernel, from the saved state on the left and the gradient on the right: everything else. A
//   CTA
//      runs forward to the states between its tiles of kTileTokens tokens, then takes the tiles from the right; a
//      tile's states and decays rest in registers.
//   4. Two kernels add the shares of the CTAs: dB and dC over the channel blocks of a group, dA, dD and ddelta_bias
//   over
//      the intervals, in order.
#pragma once
#include "recurrence/selective_scan/scan_tile.cuh"

namespace remora {

/// In the workspace, in this order; S = num_scan_slots, R = B * T, blocks of channels.
struct ScanGradients {
  float* states;       // [S, D, N] gradients of the states between intervals
  float* steps;        // [S, D] sums of steps
  float* db;           // [blocks, R, N]
  float* dc;           // [blocks, R, N]
  float* da;           // [S, D, N]
  float* dskip;        // [S, D]
  float* ddelta_bias;  // [S, D]
};

template <typename T, int LANES>
__global__ void __launch_bounds__(kScanThreads, 6)
    selective_scan_bwd_summary_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                                      const int64_t num_channel_blocks) {
  using Traits = ScanTraits<LANES>;
  const SelectiveScanInputs& in = p.in;
  __shared__ float smem_delta[kTileTokens * Traits::LD], smem_dt[kTileTokens * Traits::LD],
      smem_z[kTileTokens * Traits::LD], smem_dy[kTileTokens * Traits::LD];
  __shared__ __align__(16) float smem_c[kTileTokens * Traits::LD_STATES];

  const ScanInterval interval = find_interval(in, blockIdx.x / num_channel_blocks);
  if (interval.num_tokens == 0 || interval.chunk_idx == 0) return;
  const ScanChannelBlock channels = find_channel_block<LANES>(in.shape, blockIdx.x % num_channel_blocks);
  const ScanBlock<T, LANES> block(in, interval, channels);

  float carried[kStatesPerLane] = {}, steps = 0.f;
  for (int first = (interval.num_tokens - 1) / kTileTokens * kTileTokens; first >= 0; first -= kTileTokens) {
    __syncthreads();
    block.load_channels(in.delta, in.delta_stride, first, smem_delta);
    block.load_channels(p.d_out, p.d_out_stride, first, smem_dy);
    if (in.z != nullptr) block.load_channels(in.z, in.z_stride, first, smem_z);
    block.load_map(in.c, in.c_stride, first, smem_c);
    __syncthreads();
    block.make_steps(first, smem_delta, smem_dt);
    __syncthreads();
#pragma unroll 4
    for (int t = kTileTokens - 1; t >= 0; --t) {
      const int at = t * Traits::LD + block.channel;
      const float dt = smem_dt[at];
      float dy = smem_dy[at];
      if (in.z != nullptr) dy *= smem_z[at] * scan_sigmoid(smem_z[at]);
      const float4 c = *reinterpret_cast<const float4*>(smem_c + t * Traits::LD_STATES + block.first_state);
      const float c_of[kStatesPerLane] = {c.x, c.y, c.z, c.w};
      steps += dt;
#pragma unroll
      for (int j = 0; j < kStatesPerLane; ++j) carried[j] = exp2f(dt * block.rate[j]) * (carried[j] + dy * c_of[j]);
    }
  }
  block.store_state(carried, gradients.states, interval.slot);
  if (block.is_valid && threadIdx.x % LANES == 0) {
    gradients.steps[interval.slot * in.shape.num_channels + channels.first + block.channel] = steps;
  }
}

/// Replaces what intervals hand to the left by the gradients of the states that leave them. A CTA
/// works on one sequence.
static __global__ void __launch_bounds__(kScanThreads)
    selective_scan_bwd_combine_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients) {
  const SelectiveScanShape& shape = p.in.shape;
  const ScanStateThread at(shape);
  const Sequence seq = find_sequence(shape.sequences, p.in.cu_seqlens, at.seq_idx);
  if (!at.is_valid) return;
  const float rate = static_cast<const float*>(p.in.a)[at.offset] * kLog2e;
  float carried = p.d_final_state != nullptr ? static_cast<const float*>(p.d_final_state)[at.index] : 0.f;
  if (seq.num_tokens == 0 && p.d_initial_state != nullptr) static_cast<float*>(p.d_initial_state)[at.index] = carried;

  const int64_t first_slot = first_scan_slot(seq.first_token, at.seq_idx);
  for (int64_t i = (seq.num_tokens + kScanInterval - 1) / kScanInterval - 1; i >= 0; --i) {
    float* state = gradients.states + (first_slot + i) * at.per_seq + at.offset;
    const float added = i == 0 ? 0.f : *state;
    const float steps = i == 0 ? 0.f : gradients.steps[(first_slot + i) * shape.num_channels + at.channel];
    *state = carried;
    carried = exp2f(steps * rate) * carried + added;
  }
}

/// Sums of 2 * kStatesPerLane values over the channels of a warp: lanes trade halves of their values until each holds
/// the sums of the few that `first` begins with.
template <int LANES>
struct ChannelSums {
  static constexpr int COUNT = 2 * kStatesPerLane * LANES / 32 > 0 ? 2 * kStatesPerLane * LANES / 32 : 1;
  int first;

  __device__ __forceinline__ explicit ChannelSums(float (&v)[2 * kStatesPerLane]) : first(0) {
    int count = 2 * kStatesPerLane;
#pragma unroll
    for (int mask = 16; mask >= LANES; mask /= 2) {
      count /= 2;
      const bool is_upper = (threadIdx.x & mask) != 0;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float sent = is_upper ? v[i] : v[i + count], kept = is_upper ? v[i + count] : v[i];
        v[i] = kept + __shfl_xor_sync(kFullWarp, sent, mask);
      }
      first += is_upper ? count : 0;
    }
  }
};

template <typename T, int LANES>
__global__ void __launch_bounds__(kScanThreads, 2)
    selective_scan_bwd_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                              const int64_t num_channel_blocks) {
  using Traits = ScanTraits<LANES>;
  constexpr int LD = Traits::LD, LD_STATES = Traits::LD_STATES;
  constexpr int kNumTiles = kScanInterval / kTileTokens, kNumWarps = kScanThreads / 32;
  const SelectiveScanInputs& in = p.in;
  const int state_dim = static_cast<int>(in.shape.state_dim);
  __shared__ float smem_u[kTileTokens * LD], smem_delta[kTileTokens * LD], smem_dt[kTileTokens * LD],
      smem_z[kTileTokens * LD], smem_dy[kTileTokens * LD], smem_out[kTileTokens * LD];
  __shared__ __align__(16) float smem_b[kTileTokens * LD_STATES], smem_c[kTileTokens * LD_STATES];
  __shared__ float smem_entering[kNumTiles][kStatesPerLane][kScanThreads];  // states that enter the tiles
  constexpr int kSumTokens =
      LANES == 32 ? 4 : 8;  // whose sums over channels are in shared memory together, 48 KB in all
  __shared__ float smem_sums[kNumWarps][kSumTokens][2 * Traits::STATES];

  const ScanInterval interval = find_interval(in, blockIdx.x / num_channel_blocks);
  const ScanChannelBlock channels = find_channel_block<LANES>(in.shape, blockIdx.x % num_channel_blocks);
  const ScanBlock<T, LANES> block(in, interval, channels);
  const int64_t total_rows = in.shape.sequences.batch * in.shape.sequences.seqlen;
  const float skip = block.channel_value(in.skip);
  float da[kStatesPerLane] = {}, dskip = 0.f, dbias = 0.f;

  // The states that enter the tiles.
  float x[kStatesPerLane] = {}, carried[kStatesPerLane] = {};
  if (interval.num_tokens > 0) {
    block.load_state(p.saved_states, interval.slot, x);
    block.load_state(gradients.states, interval.slot, carried);
  }
#pragma unroll 1
  for (int first = 0; first < interval.num_tokens; first += kTileTokens) {
#pragma unroll
    for (int j = 0; j < kStatesPerLane; ++j) smem_entering[first / kTileTokens][j][threadIdx.x] = x[j];
    if (first + kTileTokens >= interval.num_tokens) break;
    __syncthreads();
    block.load_channels(in.u, in.u_stride, first, smem_u);
    block.load_channels(in.delta, in.delta_stride, first, smem_delta);
    block.load_map(in.b, in.b_stride, first, smem_b);
    __syncthreads();
    block.make_steps(first, smem_delta, smem_dt);
    __syncthreads();
#pragma unroll 4
    for (int t = 0; t < kTileTokens; ++t) {
      const float dt = smem_dt[t * LD + block.channel], du = dt * smem_u[t * LD + block.channel];
#pragma unroll
      for (int j = 0; j < kStatesPerLane; ++j) {
        x[j] = exp2f(dt * block.rate[j]) * x[j] + du * smem_b[t * LD_STATES + block.first_state + j];
      }
    }
  }

#pragma unroll 1
  for (int first = (interval.num_tokens - 1) / kTileTokens * kTileTokens; first >= 0 && interval.num_tokens > 0;
       first -= kTileTokens) {
    __syncthreads();
    block.load_channels(in.u, in.u_stride, first, smem_u);
    block.load_channels(in.delta, in.delta_stride, first, smem_delta);
    block.load_channels(p.d_out, p.d_out_stride, first, smem_dy);
    if (in.z != nullptr) block.load_channels(in.z, in.z_stride, first, smem_z);
    block.load_map(in.b, in.b_stride, first, smem_b);
    block.load_map(in.c, in.c_stride, first, smem_c);
    __syncthreads();
    block.make_steps(first, smem_delta, smem_dt);
    __syncthreads();

    // Left to right: states in front of the tokens, decays, and with a gate what it multiplied.
    float before[kTileTokens][kStatesPerLane];
#pragma unroll
    for (int j = 0; j < kStatesPerLane; ++j) x[j] = smem_entering[first / kTileTokens][j][threadIdx.x];
#pragma unroll
    for (int t = 0; t < kTileTokens; ++t) {
      const int at = t * LD + block.channel;
      const float u = smem_u[at], dt = smem_dt[at], du = dt * u;
      float y = 0.f;
#pragma unroll
      for (int j = 0; j < kStatesPerLane; ++j) {
        before[t][j] = x[j];
        x[j] = exp2f(dt * block.rate[j]) * x[j] + du * smem_b[t * LD_STATES + block.first_state + j];
        y += x[j] * smem_c[t * LD_STATES + block.first_state + j];
      }
      if (in.z == nullptr) continue;
      y = warp_sum<LANES>(y) + skip * u;
      if (threadIdx.x % LANES == 0) {
        const float z = smem_z[at], gate = scan_sigmoid(z), d_out = smem_dy[at];
        smem_out[at] = d_out * y * gate * (1.f + z * (1.f - gate));
        smem_dy[at] = d_out * z * gate;
      }
    }
    if (in.z != nullptr) {
      __syncthreads();
      block.store_channels(smem_out, first, p.dz, p.d_stride);
      __syncthreads();
    }

    // Right to left. smem_dy takes du, and smem_delta ddelta.
#pragma unroll
    for (int first_t = kTileTokens - kSumTokens; first_t >= 0; first_t -= kSumTokens) {
#pragma unroll
      for (int t = first_t + kSumTokens - 1; t >= first_t; --t) {
        const int at = t * LD + block.channel;
        const float u = smem_u[at], dt = smem_dt[at], dy = smem_dy[at], du = dt * u, logit = smem_delta[at];
        float write = 0.f, decays = 0.f, sums[2 * kStatesPerLane];
#pragma unroll
        for (int j = 0; j < kStatesPerLane; ++j) {
          const float b = smem_b[t * LD_STATES + block.first_state + j];
          const float decay = exp2f(dt * block.rate[j]);
          const float lambda = carried[j] + dy * smem_c[t * LD_STATES + block.first_state + j];
          carried[j] = lambda * decay;
          const float d_log = carried[j] * before[t][j];
          write += lambda * b;
          decays += d_log * block.rate[j];
          da[j] += d_log * dt;
          sums[j] = lambda * du;
          sums[kStatesPerLane + j] = dy * (decay * before[t][j] + du * b);
        }
        write = warp_sum<LANES>(write), decays = warp_sum<LANES>(decays);
        float ddelta = decays * kLn2 + u * write;
        if (in.delta_softplus && logit <= 20.f) ddelta *= scan_sigmoid(logit);
        dskip += dy * u, dbias += t < block.num_rows(first) ? ddelta : 0.f;
        __syncwarp();
        if (threadIdx.x % LANES == 0) {
          smem_dy[at] = skip * dy + dt * write;
          smem_delta[at] = ddelta;
        }
        const ChannelSums<LANES> held(sums);
#pragma unroll
        for (int i = 0; i < ChannelSums<LANES>::COUNT; ++i) {
          const int value = held.first + i;
          smem_sums[threadIdx.x / 32][t - first_t]
                   [value / kStatesPerLane * Traits::STATES + block.first_state + value % kStatesPerLane] = sums[i];
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kSumTokens * 2 * Traits::STATES; i += kScanThreads) {
        const int t = i / (2 * Traits::STATES), value = i % (2 * Traits::STATES), state = value % Traits::STATES;
        if (first_t + t >= block.num_rows(first) || state >= state_dim) continue;
        float total = 0.f;
#pragma unroll
        for (int warp = 0; warp < kNumWarps; ++warp) total += smem_sums[warp][t][value];
        const int64_t row = interval.batch * in.shape.sequences.seqlen + interval.token(first + first_t + t);
        float* share = value < Traits::STATES ? gradients.db : gradients.dc;
        share[(channels.index * total_rows + row) * state_dim + state] = total;
      }
      __syncthreads();
    }
    block.store_channels(smem_dy, first, p.du, p.d_stride);
    block.store_channels(smem_delta, first, p.ddelta, p.d_stride);
  }

  if (interval.num_tokens > 0 && interval.chunk_idx == 0 && p.d_initial_state != nullptr) {
    block.store_state(carried, p.d_initial_state, interval.seq_idx);
  }
  // A slot without tokens adds zeros.
  block.store_state(da, gradients.da, interval.slot);
  if (block.is_valid && threadIdx.x % LANES == 0) {
    const int64_t at = interval.slot * in.shape.num_channels + channels.first + block.channel;
    gradients.dskip[at] = dskip;
    gradients.ddelta_bias[at] = dbias;
  }
}

/// Adds the blocks' shares of dB and dC; tokens outside every sequence get zeros. One thread per row, group and state.
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_bwd_map_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                                  const int64_t blocks_per_group) {
  const SelectiveScanShape& shape = p.in.shape;
  const int64_t total_rows = shape.sequences.batch * shape.sequences.seqlen;
  const int64_t index = int64_t{blockIdx.x} * kScanThreads + threadIdx.x;
  const int64_t state = index % shape.state_dim, group = index / shape.state_dim % shape.num_groups;
  const int64_t row = index / shape.state_dim / shape.num_groups;
  bool is_covered = true;
  if (p.in.cu_seqlens != nullptr) {
    const Sequence last = find_sequence(shape.sequences, p.in.cu_seqlens, shape.sequences.num_seqs - 1);
    is_covered = row >= find_sequence(shape.sequences, p.in.cu_seqlens, 0).first_token &&
                 row < last.first_token + last.num_tokens;
  }
  if (row >= total_rows) return;
  float db = 0.f, dc = 0.f;
  for (int64_t i = 0; i < blocks_per_group && is_covered; ++i) {
    const int64_t at = ((group * blocks_per_group + i) * total_rows + row) * shape.state_dim + state;
    db += gradients.db[at], dc += gradients.dc[at];
  }
  static_cast<T*>(p.db)[index] = static_cast<T>(db);
  static_cast<T*>(p.dc)[index] = static_cast<T>(dc);
}

/// Adds the intervals' shares of dA, dD and ddelta_bias. One thread per entry of the three.
static __global__ void __launch_bounds__(kScanThreads)
    selective_scan_bwd_channel_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                                      const int64_t num_slots) {
  const int64_t num_channels = p.in.shape.num_channels, num_rates = num_channels * p.in.shape.state_dim;
  int64_t index = int64_t{blockIdx.x} * kScanThreads + threadIdx.x, stride = num_rates;
  const float* share = gradients.da;
  void* out = p.da;
  if (index >= num_rates) {
    index -= num_rates, stride = num_channels;
    share = index < num_channels ? gradients.dskip : gradients.ddelta_bias;
    out = index < num_channels ? p.dskip : p.ddelta_bias;
    if (index >= num_channels) index -= num_channels;
    if (index >= num_channels) return;
  }
  if (out == nullptr) return;
  float total = 0.f;
  for (int64_t slot = 0; slot < num_slots; ++slot) total += share[slot * stride + index];
  static_cast<float*>(out)[index] = total;
}

}  // namespace remora
