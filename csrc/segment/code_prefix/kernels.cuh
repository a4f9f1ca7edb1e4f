// Running sums of values per code, and their gradient.
//
//   idx [B, H, T]   v, dv [B, H, T, D]   mean, d_mean [B, H, N, S, D]
//
// A CTA owns CHANNELS channels of one row of B * H; the sums [S, CHANNELS] stay in shared memory while the chunks pass,
// forward from the left, backward from the right. Forward, the threads of a group own the codes equal to the group's
// number modulo the groups, so that a sum has one writer and its tokens come in order; counts are integers, whose order
// does not matter. Backward, a token only reads.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "segment/code_prefix/params.h"

namespace remora {

constexpr int kCodePrefixThreads = 256;

/// Tokens of every code so far [S], and what is summed up for it [S, CHANNELS].
template <int CHANNELS>
struct CodeSums {
  int* counts;
  float* sums;

  __device__ __forceinline__ CodeSums(uint8_t* smem, const CodePrefixShape& shape)
      : counts(reinterpret_cast<int*>(smem)), sums(reinterpret_cast<float*>(smem) + shape.codes) {}
};

/// Calls f(code, channel in the block) for this thread's part of [S, CHANNELS].
template <int CHANNELS, typename F>
__device__ __forceinline__ void for_each_sum(const CodePrefixShape& shape, int64_t first, const F& f) {
  const int channel = threadIdx.x % CHANNELS;
  if (first + channel >= shape.channels) return;
  for (int64_t code = threadIdx.x / CHANNELS; code < shape.codes; code += kCodePrefixThreads / CHANNELS) {
    f(code, channel);
  }
}

template <typename T, int CHANNELS>
__global__ void __launch_bounds__(kCodePrefixThreads, 3)
    code_prefix_fwd_kernel(const __grid_constant__ CodePrefixFwdParams p, int64_t num_channel_blocks) {
  constexpr int kGroups = kCodePrefixThreads / CHANNELS;
  const CodePrefixShape& shape = p.shape;
  const int64_t row = blockIdx.x / num_channel_blocks, first = blockIdx.x % num_channel_blocks * CHANNELS;
  const int64_t S = shape.codes, D = shape.channels, num_borders = shape.borders();
  const float* initial_count = static_cast<const float*>(p.initial_count) + row * S;
  const float* initial_mean = static_cast<const float*>(p.initial_mean) + row * S * D + first;
  const bool has_initial = p.initial_count != nullptr;
  extern __shared__ uint8_t smem[];
  const CodeSums<CHANNELS> kept(smem, shape);
  const auto count_of = [&](int64_t code) {
    return (has_initial ? initial_count[code] : 0.f) + static_cast<float>(kept.counts[code]);
  };
  for (int64_t code = threadIdx.x; code < S; code += kCodePrefixThreads) kept.counts[code] = 0;
  for_each_sum<CHANNELS>(shape, first, [&](int64_t code, int channel) {
    kept.sums[code * CHANNELS + channel] = has_initial ? initial_mean[code * D + channel] * initial_count[code] : 0.f;
  });
  __syncthreads();

  for (int64_t border = 0; border <= num_borders; ++border) {
    const int64_t at = row * num_borders + border;
    for_each_sum<CHANNELS>(shape, first, [&](int64_t code, int channel) {
      const float count = count_of(code);
      const float mean = count > 0.f ? kept.sums[code * CHANNELS + channel] / count : 0.f;
      if (border < num_borders) {
        static_cast<T*>(p.mean)[(at * S + code) * D + first + channel] = static_cast<T>(mean);
      } else {
        static_cast<float*>(p.final_mean)[(row * S + code) * D + first + channel] = mean;
      }
    });
    for (int64_t code = threadIdx.x; first == 0 && code < S; code += kCodePrefixThreads) {
      if (border < num_borders) {
        static_cast<float*>(p.log_count)[at * S + code] = logf(count_of(code));
      } else {
        static_cast<float*>(p.final_count)[row * S + code] = count_of(code);
      }
    }
    __syncthreads();  // counts and sums are read

    const int64_t begin = border * shape.chunk, end = min(begin + shape.chunk, shape.tokens);
    const int group = threadIdx.x / CHANNELS, channel = threadIdx.x % CHANNELS;
    for (int64_t token = begin; token < end; ++token) {
      const int code = p.idx[row * shape.tokens + token];
      if (code < 0 || code >= S || code % kGroups != group) continue;
      if (channel == 0) ++kept.counts[code];
      if (first + channel < D) {
        kept.sums[code * CHANNELS + channel] +=
            static_cast<float>(static_cast<const T*>(p.v)[shape.v_offset(row, token) + first + channel]);
      }
    }
    __syncthreads();
  }
}

template <typename T, int CHANNELS>
__global__ void __launch_bounds__(kCodePrefixThreads, 3)
    code_prefix_bwd_kernel(const __grid_constant__ CodePrefixBwdParams p, int64_t num_channel_blocks) {
  const CodePrefixShape& shape = p.shape;
  const int64_t row = blockIdx.x / num_channel_blocks, first = blockIdx.x % num_channel_blocks * CHANNELS;
  const int64_t S = shape.codes, D = shape.channels, num_borders = shape.borders();
  const float* final_count = static_cast<const float*>(p.final_count) + row * S;
  extern __shared__ uint8_t smem[];
  const CodeSums<CHANNELS> kept(smem, shape);  // counts: tokens that were walked
  for (int64_t code = threadIdx.x; code < S; code += kCodePrefixThreads) kept.counts[code] = 0;
  for_each_sum<CHANNELS>(shape, first, [&](int64_t code, int channel) {
    const float count = final_count[code];
    const bool counts = p.d_final_mean != nullptr && count > 0.f;
    kept.sums[code * CHANNELS + channel] =
        counts ? static_cast<const float*>(p.d_final_mean)[(row * S + code) * D + first + channel] / count : 0.f;
  });
  __syncthreads();

  const int channel = threadIdx.x % CHANNELS;
  for (int64_t border = num_borders - 1; border >= 0; --border) {
    const int64_t begin = border * shape.chunk, end = min(begin + shape.chunk, shape.tokens);
    for (int64_t token = begin + threadIdx.x / CHANNELS; token < end; token += kCodePrefixThreads / CHANNELS) {
      const int code = p.idx[row * shape.tokens + token];
      const bool has_code = code >= 0 && code < S;
      if (channel == 0 && has_code) atomicAdd(kept.counts + code, 1);
      if (first + channel < D) {
        static_cast<T*>(p.dv)[(row * shape.tokens + token) * D + first + channel] =
            static_cast<T>(has_code ? kept.sums[code * CHANNELS + channel] : 0.f);
      }
    }
    __syncthreads();
    const T* d_mean = static_cast<const T*>(p.d_mean) + (row * num_borders + border) * S * D + first;
    for_each_sum<CHANNELS>(shape, first, [&](int64_t code, int sum_channel) {
      const float count = final_count[code] - static_cast<float>(kept.counts[code]);
      if (count > 0.f) {
        kept.sums[code * CHANNELS + sum_channel] += static_cast<float>(d_mean[code * D + sum_channel]) / count;
      }
    });
    __syncthreads();
  }
  if (p.d_initial_mean == nullptr) return;
  for_each_sum<CHANNELS>(shape, first, [&](int64_t code, int sum_channel) {
    static_cast<float*>(p.d_initial_mean)[(row * S + code) * D + first + sum_channel] =
        kept.sums[code * CHANNELS + sum_channel] * static_cast<const float*>(p.initial_count)[row * S + code];
  });
}

}  // namespace remora
