// Backward pass of the selective scan. With dy = d_out silu(z) and L_t the gradient of x_t:
//
//   L_t = dy_t C_t + exp(dt_{t+1} A) L_{t+1}          e_t = L_t x_{t-1} exp(dt_t A)
//   du = D dy + dt <L, B>     d dt = <e, A> + u <L, B>     dA = sum e dt     dB = sum_d L dt u     dC = sum_d dy x
//
// Over the intervals of the forward pass:
//   1. selective_scan_bwd_summary_kernel: the gradient that an interval hands to the left if nothing comes from the
//      right;
//   2. selective_scan_bwd_combine_kernel: the gradients of the states between intervals, from the right;
//   3. selective_scan_bwd_kernel, from the saved state on the left and the gradient on the right: everything else;
//   4. two kernels add the shares of the CTAs: dB and dC over the channel blocks of a group, dA, dD and ddelta_bias
//      over the intervals, in order.
//
// In kernel 3 a lane holds a run of kRunTokens tokens of kRunChannels channels, and takes one state after the other:
// the decays and states of its run, in registers, from one exponential each; where the run begins, from the left and
// from the right, by scans of the lanes of a channel. Sums over states (du, d dt, dz) stay in registers for the whole
// kernel; sums over channels (dB, dC) leave them after every state.
#pragma once
#include "recurrence/selective_scan/scan_tile.cuh"

namespace remora {

/// In the workspace, in this order; S = num_scan_slots, R = B * T, blocks of kBwdChannels channels.
struct ScanGradients {
  float* states;       // [S, D, N] gradients of the states between intervals
  float* steps;        // [S, D] sums of steps
  float* db;           // [blocks, R, N]
  float* dc;           // [blocks, R, N]
  float* da;           // [S, D, N]
  float* dskip;        // [S, D]
  float* ddelta_bias;  // [S, D]
};

template <typename T, class Traits>
__global__ void __launch_bounds__(kScanThreads, Traits::FWD_CTAS)
    selective_scan_bwd_summary_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                                      const int64_t num_channel_blocks) {
  constexpr int LD = Traits::LD, LANE_STATES = Traits::LANE_STATES;
  const SelectiveScanInputs& in = p.in;
  __shared__ float smem_delta[kTileTokens * LD], smem_z[kTileTokens * LD], smem_dy[kTileTokens * LD];
  __shared__ __align__(16) float smem_c[kTileTokens * Traits::STATES];

  __shared__ ScanPlace smem_place;
  smem_place.find<Traits::CHANNELS>(in, num_channel_blocks);
  const ScanInterval& interval = smem_place.interval;
  const ScanChannelBlock& channels = smem_place.block;
  if (interval.num_tokens == 0 || interval.chunk_idx == 0) return;
  const ScanBlock<T, Traits> block(in, interval, channels);
  const bool is_vector = block.has_token_vectors(in.delta, in.delta_stride) &&
                         block.has_token_vectors(p.d_out, p.d_out_stride) &&
                         block.has_token_vectors(in.z, in.z_stride) && block.has_token_vectors(in.c, in.c_stride);

  float carried[LANE_STATES] = {}, steps = 0.f;
#pragma unroll 1
  for (int first = (interval.num_tokens - 1) / kTileTokens * kTileTokens; first >= 0; first -= kTileTokens) {
    if (is_vector && first + kTileTokens <= interval.num_tokens) {
      const auto delta = block.fetch(in.delta, in.delta_stride, first);
      const auto d_out = block.fetch(p.d_out, p.d_out_stride, first), z = block.fetch(in.z, in.z_stride, first);
      const auto c = block.fetch_map(in.c, in.c_stride, first);
      __syncthreads();
      delta.store(smem_delta, LD), d_out.store(smem_dy, LD), z.store(smem_z, LD), c.store(smem_c, Traits::STATES);
    } else {
      __syncthreads();
      block.load(in.delta, in.delta_stride, first, smem_delta);
      block.load(p.d_out, p.d_out_stride, first, smem_dy);
      if (in.z != nullptr) block.load(in.z, in.z_stride, first, smem_z);
      block.load_map(in.c, in.c_stride, first, smem_c);
    }
    __syncthreads();
    block.make_steps(smem_delta, interval.num_tokens - first);
    if (in.z != nullptr) {
      block.make_gates(smem_z);
      block.for_own_tokens(smem_dy, [&](int t, float d_out) { return d_out * smem_z[t * LD + block.channel]; });
      __syncwarp();
    }
#pragma unroll Traits::UNROLL
    for (int t = kTileTokens - 1; t >= 0; --t) {
      const int at = t * LD + block.channel;
      const float dt = smem_delta[at], dy = smem_dy[at];
      float c[LANE_STATES];
      block.read_map(smem_c, t, c);
      steps += dt;
#pragma unroll
      for (int j = 0; j < LANE_STATES; ++j) carried[j] = exp2_approx(dt * block.rate[j]) * (carried[j] + dy * c[j]);
    }
  }
  block.store_state(carried, gradients.states, interval.slot);
  if (block.is_first_lane()) {
    gradients.steps[interval.slot * in.shape.num_channels + channels.first + block.channel] = steps;
  }
}

/// Replaces what intervals hand to the left by the gradients of the states that leave them. A CTA works on one
/// sequence.
static __global__ void __launch_bounds__(kScanThreads)
    selective_scan_bwd_combine_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients) {
  const SelectiveScanShape& shape = p.in.shape;
  const ScanStateThread at(shape);
  const Sequence seq = find_sequence(shape.sequences, p.in.cu_seqlens, at.seq_idx);
  if (!at.is_valid) return;
  const float carried = p.d_final_state != nullptr ? static_cast<const float*>(p.d_final_state)[at.index] : 0.f;
  if (seq.num_tokens == 0 && p.d_initial_state != nullptr) static_cast<float*>(p.d_initial_state)[at.index] = carried;
  const int64_t first_slot = first_scan_slot(seq.first_token, at.seq_idx);
  const int64_t num_intervals = (seq.num_tokens + kScanInterval - 1) / kScanInterval;
  combine_intervals(at, shape, static_cast<const float*>(p.in.a), first_slot, num_intervals, -1, gradients.states,
                    gradients.steps, carried);
}

struct ScanBwdSmem {
  static constexpr int LD = kBwdChannels + 1;
  // Keep rows 16-byte aligned.
  static constexpr int LD_MAP = kScanInterval + 4, LD_SUMS = 2 * kScanInterval + 4;

  // Rows of a state, tokens in the order of run_position; sums are over the channels of a warp, of dB, then dC.
  alignas(16) float b[kStageStates * LD_MAP];
  alignas(16) float c[kStageStates * LD_MAP];
  alignas(16) float sums[kScanThreads / 32][kStageStates * LD_SUMS];
  // Rows of a token
  float u[kScanInterval * LD], delta[kScanInterval * LD], dy[kScanInterval * LD], z[kScanInterval * LD];
  // Rows of a state
  float rate[kStageStates * LD], entering[kStageStates * LD], carried[kStageStates * LD], da[kStageStates * LD];
  float skip[kBwdChannels], bias[kBwdChannels];
  ScanPlace place;
};

/// Where token t of an interval lies in a row whose lanes read their runs four tokens at a time, without conflicts.
__device__ __forceinline__ int run_position(int t) {
  return t % kRunTokens / 4 * (4 * kRunLanes) + t / kRunTokens * 4 + t % 4;
}

__device__ __forceinline__ void load_run(const float* smem_row, int lane, float (&v)[kRunTokens]) {
  static_assert(kRunTokens == 8);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 four = *reinterpret_cast<const float4*>(smem_row + half * 4 * kRunLanes + lane * 4);
    v[4 * half] = four.x, v[4 * half + 1] = four.y, v[4 * half + 2] = four.z, v[4 * half + 3] = four.w;
  }
}

/// A lane's run maps what enters it to decay * x + added. Given what enters the first lane of a channel (the last, if
/// FROM_RIGHT), returns what enters this one.
template <bool FROM_RIGHT>
__device__ __forceinline__ float enter_run(float decay, float added, float first) {
  const int lane = threadIdx.x % kRunLanes, rank = FROM_RIGHT ? kRunLanes - 1 - lane : lane;
  const auto before = [](float x, int distance) {
    return FROM_RIGHT ? __shfl_down_sync(kFullWarp, x, distance, kRunLanes)
                      : __shfl_up_sync(kFullWarp, x, distance, kRunLanes);
  };
  added = rank == 0 ? decay * first + added : added;
#pragma unroll
  for (int distance = 1; distance < kRunLanes; distance *= 2) {
    const float left = before(added, distance), left_decay = before(decay, distance);
    added = rank >= distance ? decay * left + added : added;
    decay = rank >= distance ? decay * left_decay : decay;
  }
  const float entered = before(added, 1);
  return rank == 0 ? first : entered;
}

template <typename T>
__global__ void __launch_bounds__(kScanThreads, 3)
    selective_scan_bwd_kernel(const __grid_constant__ SelectiveScanBwdParams p, const ScanGradients gradients,
                              const int64_t num_channel_blocks) {
  constexpr int LD = ScanBwdSmem::LD, LD_MAP = ScanBwdSmem::LD_MAP, LD_SUMS = ScanBwdSmem::LD_SUMS;
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  ScanBwdSmem& smem = *reinterpret_cast<ScanBwdSmem*>(smem_bytes);
  const SelectiveScanInputs& in = p.in;
  const int64_t num_channels = in.shape.num_channels;
  const int state_dim = static_cast<int>(in.shape.state_dim);
  smem.place.find<kBwdChannels>(in, num_channel_blocks);
  const ScanInterval& interval = smem.place.interval;
  const ScanChannelBlock& block = smem.place.block;
  const auto first_row = [&] { return interval.slot * num_channels + block.first; };  // of [S, D]

  // A slot without tokens adds zeros.
  if (interval.num_tokens == 0) {
    for (int64_t i = threadIdx.x; i < block.num_channels * state_dim; i += kScanThreads) {
      gradients.da[first_row() * state_dim + i] = 0.f;
    }
    for (int i = threadIdx.x; i < block.num_channels; i += kScanThreads) {
      gradients.dskip[first_row() + i] = gradients.ddelta_bias[first_row() + i] = 0.f;
    }
    return;
  }

  const auto has_vectors = [&](const void* data, const auto& stride) {
    return interval.num_tokens == kScanInterval && has_token_vectors<T>(data, stride, interval, block);
  };
  if (has_vectors(in.u, in.u_stride) && has_vectors(in.delta, in.delta_stride) &&
      has_vectors(p.d_out, p.d_out_stride) && has_vectors(in.z, in.z_stride)) {
    const auto fetch = [&](const void* data, const ScanStrides& stride) {
      return fetch_channels<kScanInterval, kBwdChannels, T>(data, stride, interval, block, 0);
    };
    const auto u = fetch(in.u, in.u_stride), delta = fetch(in.delta, in.delta_stride);
    const auto d_out = fetch(p.d_out, p.d_out_stride), z = fetch(in.z, in.z_stride);
    u.store(smem.u, LD), delta.store(smem.delta, LD), d_out.store(smem.dy, LD), z.store(smem.z, LD);
  } else {
    const auto load = [&](const void* data, const ScanStrides& stride, float* smem_tile) {
      load_channels<kScanInterval, kBwdChannels, T>(data, stride, interval, block, 0, smem_tile);
    };
    load(in.u, in.u_stride, smem.u);
    load(in.delta, in.delta_stride, smem.delta);
    load(p.d_out, p.d_out_stride, smem.dy);
    if (in.z != nullptr) load(in.z, in.z_stride, smem.z);
  }
  if (threadIdx.x < kBwdChannels) {
    const auto value = [&](const void* values) {
      const bool exists = values != nullptr && threadIdx.x < block.num_channels;
      return exists ? static_cast<const float*>(values)[block.first + threadIdx.x] : 0.f;
    };
    smem.skip[threadIdx.x] = value(in.skip), smem.bias[threadIdx.x] = value(in.delta_bias);
  }
  __syncthreads();

  const int lane = threadIdx.x % kRunLanes, first_channel = threadIdx.x / kRunLanes * kRunChannels;
  const auto channel_of = [&](int i) { return first_channel + i; };
  const auto tile_index = [&](int i, int j) { return (lane * kRunTokens + j) * LD + channel_of(i); };

  // Of the lane's tokens: the step, what it multiplies B by, the gradient of y; then sums over states.
  float dt[kRunChannels][kRunTokens], du[kRunChannels][kRunTokens], dy[kRunChannels][kRunTokens];
  float write[kRunChannels][kRunTokens] = {}, decays[kRunChannels][kRunTokens] = {}, y[kRunChannels][kRunTokens] = {};
  float steps[kRunChannels] = {};
  const auto for_each_token = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i) {
#pragma unroll
      for (int j = 0; j < kRunTokens; ++j) f(i, j, tile_index(i, j));
    }
  };
  const auto logit = [&](int i, int at) { return smem.delta[at] + smem.bias[channel_of(i)]; };
  const auto exists = [&](int j) { return lane * kRunTokens + j < interval.num_tokens; };
  if (in.delta_softplus) {
    for_each_token([&](int i, int j, int at) { dt[i][j] = scan_softplus(logit(i, at)); });
  } else {
    for_each_token([&](int i, int j, int at) { dt[i][j] = logit(i, at); });
  }
  for_each_token([&](int i, int j, int at) {
    // Behind the last token a step of zero keeps the state and its gradient.
    dt[i][j] = exists(j) ? dt[i][j] : 0.f;
    du[i][j] = dt[i][j] * smem.u[at];
    dy[i][j] = smem.dy[at];
    steps[i] += dt[i][j];
  });
  if (in.z != nullptr) for_each_token([&](int i, int j, int at) { dy[i][j] *= smem.z[at] * sigmoid(smem.z[at]); });

#pragma unroll 1
  for (int first_state = 0; first_state < state_dim; first_state += kStageStates) {
    const int num_states = min(state_dim - first_state, kStageStates);
    // Of [rows, N] from row `first`, one for each channel.
    const auto for_each_state = [&](auto* gmem, int64_t first, auto visit) {
      for_each_element<kBwdChannels, kStageStates, false>(gmem + first * state_dim + first_state, state_dim, 1,
                                                          block.num_channels, num_states, visit);
    };
    struct ThreadStates {
      float of[kBwdChannels * kStageStates / kScanThreads];
    };
    const auto fetch_states = [&](const void* src, int64_t first) {
      ThreadStates states = {};
      int i = 0;
      for_each_state(static_cast<const float*>(src), first, [&](int, int, bool exists, const float* gmem) {
        if (exists) states.of[i] = *gmem;
        ++i;
      });
      return states;
    };
    const auto keep_states = [&](const ThreadStates& states, float* smem_states, float factor) {
      const int thread_idx = read_thread_idx();
      float* to = smem_states + thread_idx % kStageStates * LD + thread_idx / kStageStates;
#pragma unroll
      for (int i = 0; i < kBwdChannels * kStageStates / kScanThreads; ++i) {
        to[i * (kScanThreads / kStageStates)] = states.of[i] * factor;
      }
    };
    const auto store_states = [&](float* dst, int64_t first, const float* smem_states) {
      for_each_state(dst, first, [&](int channel, int n, bool exists, float* gmem) {
        if (exists) *gmem = smem_states[n * LD + channel];
      });
    };
    {
      const auto to_map = [&](float* smem_map) {
        return [smem_map](int t, int n, float value) { smem_map[n * LD_MAP + run_position(t)] = value; };
      };
      if (has_vectors(in.b, in.b_stride) && has_vectors(in.c, in.c_stride)) {
        const auto fetch = [&](const void* data, const ScanGroupStrides& stride) {
          return FetchedTile<kScanInterval, kStageStates, T>(map_tokens<T>(data, stride, interval, block, first_state),
                                                             stride.state, num_states);
        };
        const auto b = fetch(in.b, in.b_stride), c = fetch(in.c, in.c_stride);
        __syncthreads();
        b.store(to_map(smem.b)), c.store(to_map(smem.c));
      } else {
        __syncthreads();
        const auto load = [&](const void* data, const ScanGroupStrides& stride, auto visit) {
          for_each_element<kScanInterval, kStageStates>(
              map_tokens<T>(data, stride, interval, block, first_state), interval.token_step * stride.token,
              stride.state, interval.num_tokens, num_states, [&](int t, int n, bool exists, const T* gmem) {
                visit(t, n, static_cast<float>(exists ? *gmem : T(0.f)));
              });
        };
        load(in.b, in.b_stride, to_map(smem.b));
        load(in.c, in.c_stride, to_map(smem.c));
      }
      const ThreadStates rate = fetch_states(in.a, block.first), entering = fetch_states(p.saved_states, first_row());
      const ThreadStates carried = fetch_states(gradients.states, first_row());
      keep_states(rate, smem.rate, kLog2e);
      keep_states(entering, smem.entering, 1.f);
      keep_states(carried, smem.carried, 1.f);
    }
    __syncthreads();

#pragma unroll 1
    for (int n = 0; n < num_states; ++n) {
      float b[kRunTokens], c[kRunTokens], sums[2 * kRunTokens] = {};  // of dB, then dC
      load_run(smem.b + n * LD_MAP, lane, b);
      load_run(smem.c + n * LD_MAP, lane, c);
#pragma unroll
      for (int i = 0; i < kRunChannels; ++i) {
        const int at = n * LD + channel_of(i);
        const float rate = smem.rate[at], run_decay = exp2_approx(steps[i] * rate);
        float decay[kRunTokens], x[kRunTokens], added = 0.f, carried = 0.f;
#pragma unroll
        for (int j = 0; j < kRunTokens; ++j) {
          decay[j] = exp2_approx(dt[i][j] * rate);
          x[j] = du[i][j] * b[j];
          added = decay[j] * added + x[j];
        }
#pragma unroll
        for (int j = kRunTokens - 1; j >= 0; --j) carried = decay[j] * (dy[i][j] * c[j] + carried);
        const float entering = enter_run<false>(run_decay, added, smem.entering[at]);
        carried = enter_run<true>(run_decay, carried, smem.carried[at]);
#pragma unroll
        for (int j = 0; j < kRunTokens; ++j) {
          x[j] = decay[j] * (j == 0 ? entering : x[j - 1]) + x[j];
          y[i][j] += x[j] * c[j];
          sums[kRunTokens + j] += dy[i][j] * x[j];
        }
        float da = 0.f;
#pragma unroll
        for (int j = kRunTokens - 1; j >= 0; --j) {
          const float lambda = dy[i][j] * c[j] + carried;
          carried = decay[j] * lambda;
          const float d_log = carried * (j == 0 ? entering : x[j - 1]);
          write[i][j] += lambda * b[j];
          decays[i][j] += d_log * rate;
          da += d_log * dt[i][j];
          sums[j] += lambda * du[i][j];
        }
        da = warp_sum<kRunLanes>(da);
        if (lane == 0) smem.da[at] = da, smem.carried[at] = carried;
      }
      // Lanes that hold the same tokens of other channels trade halves of their sums until each has four tokens'.
      const auto trade = [&](int count, int mask) {
        const bool is_upper = (threadIdx.x & mask) != 0;
#pragma unroll
        for (int k = 0; k < count; ++k) {
          const float sent = is_upper ? sums[k] : sums[k + count], kept = is_upper ? sums[k + count] : sums[k];
          sums[k] = kept + __shfl_xor_sync(kFullWarp, sent, mask);
        }
      };
      trade(kRunTokens, 16);
      trade(kRunTokens / 2, 8);
      *reinterpret_cast<float4*>(smem.sums[threadIdx.x / 32] + n * LD_SUMS + threadIdx.x % 32 * 4) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
    __syncthreads();

    // Over the warps, in order.
    const auto store_map = [&](int first_sum, float* share) {
      const RecurrenceShape& shape = in.shape.sequences;
      const int64_t row = (block.index * shape.batch + interval.batch) * shape.seqlen + interval.token(0);
      share += row * state_dim + first_state;
      for_each_element<kScanInterval, kStageStates, false>(
          share, interval.token_step * state_dim, 1, interval.num_tokens, num_states,
          [&](int t, int n, bool exists, float* gmem) {
            float total = 0.f;
#pragma unroll
            for (int warp = 0; warp < kScanThreads / 32; ++warp) {
              total += smem.sums[warp][n * LD_SUMS + first_sum + run_position(t)];
            }
            if (exists) *gmem = total;
          });
    };
    store_map(0, gradients.db);
    store_map(kScanInterval, gradients.dc);
    store_states(gradients.da, first_row(), smem.da);
    if (p.d_initial_state != nullptr && interval.chunk_idx == 0) {
      store_states(static_cast<float*>(p.d_initial_state), interval.seq_idx * num_channels + block.first, smem.carried);
    }
  }

  // smem.u takes du, smem.delta ddelta, smem.z dz.
  if (in.z != nullptr) {
    for_each_token([&](int i, int j, int at) {
      const float z = smem.z[at], gate = sigmoid(z);
      smem.z[at] = smem.dy[at] * (y[i][j] + smem.skip[channel_of(i)] * smem.u[at]) * gate * (1.f + z * (1.f - gate));
    });
  }
  for_each_token([&](int i, int j, int at) { decays[i][j] = decays[i][j] * kLn2 + smem.u[at] * write[i][j]; });
  if (in.delta_softplus) {
    for_each_token([&](int i, int j, int at) { decays[i][j] *= sigmoid(logit(i, at)); });
  }
  float dskip[kRunChannels] = {}, dbias[kRunChannels] = {};
  for_each_token([&](int i, int j, int at) {
    dskip[i] += dy[i][j] * smem.u[at];
    dbias[i] += exists(j) ? decays[i][j] : 0.f;
    smem.u[at] = smem.skip[channel_of(i)] * dy[i][j] + dt[i][j] * write[i][j];
    smem.delta[at] = decays[i][j];
  });
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    const float skip_sum = warp_sum<kRunLanes>(dskip[i]), bias_sum = warp_sum<kRunLanes>(dbias[i]);
    if (lane == 0 && channel_of(i) < block.num_channels) {
      gradients.dskip[first_row() + channel_of(i)] = skip_sum;
      gradients.ddelta_bias[first_row() + channel_of(i)] = bias_sum;
    }
  }
  __syncthreads();
  const auto store = [&](const float* smem_tile, void* data) {
    store_channels<kScanInterval, kBwdChannels, T>(smem_tile, interval, block, 0, data, p.d_stride);
  };
  store(smem.u, p.du);
  store(smem.delta, p.ddelta);
  if (in.z != nullptr) store(smem.z, p.dz);
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
