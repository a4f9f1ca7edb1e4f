// Forward: one result of every window and channel.
//
//   x, gate [B, T, H, C]   slot_bias [size, H, C]   y, arg, lse [B, S, H, D]
//
// A thread owns VEC channels. Short windows: of one window, whose entries it takes in order; neighbouring threads have
// neighbouring channels. Long ones (kSplit): kPoolLanes threads share a window, lane l takes entries l, l + kPoolLanes,
// ..., and their results are joined in the order of the lanes.
#pragma once
#include "segment/segment_pool/pool_vector.cuh"

namespace remora {

constexpr int kPoolLanes = 8;
constexpr int kPoolSplitVectors = kPoolThreads / kPoolLanes;

/// What a thread keeps of a window.
template <PoolKind KIND, int VEC>
struct Pooled {
  float sum[VEC];      // of values; of kMax the largest
  float largest[VEC];  // logit, of kSoftmax
  float weights[VEC];  // sum of exp(logit - largest), of kSoftmax
  int arg[VEC];        // of kMax

  __device__ __forceinline__ Pooled() {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      sum[i] = KIND == PoolKind::kMax ? -INFINITY : 0.f;
      largest[i] = -INFINITY, weights[i] = 0.f, arg[i] = -1;
    }
  }

  __device__ __forceinline__ void add(const float (&x)[VEC], const float (&logit)[VEC], int token) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if constexpr (KIND == PoolKind::kLinear) {
        sum[i] += x[i];
      } else if constexpr (KIND == PoolKind::kWeighted) {
        sum[i] = fmaf(logit[i], x[i], sum[i]);
      } else if constexpr (KIND == PoolKind::kMax) {
        take(i, x[i], token);
      } else {
        // One exponential: either the entry or what is kept has the larger logit.
        const float d = logit[i] == -INFINITY ? logit[i] : logit[i] - largest[i];
        const bool is_larger = d > 0.f;
        const float e = expf(is_larger ? -d : d);
        const float weight = is_larger ? 1.f : e, decay = is_larger ? e : 1.f;
        largest[i] = is_larger ? logit[i] : largest[i];
        weights[i] = fmaf(weights[i], decay, weight);
        sum[i] = fmaf(sum[i], decay, weight * x[i]);
      }
    }
  }

  /// Joins the result of other entries.
  __device__ __forceinline__ void join(int i, float other_sum, float other_largest, float other_weights,
                                       int other_arg) {
    if constexpr (KIND == PoolKind::kMax) {
      // Lanes interleave: of equals the earlier token.
      const bool is_same = other_sum == sum[i] || (other_sum != other_sum && sum[i] != sum[i]);
      if (other_arg >= 0 && is_same && arg[i] >= 0) {
        arg[i] = min(arg[i], other_arg);
      } else if (other_arg >= 0) {
        take(i, other_sum, other_arg);
      }
    } else if constexpr (KIND == PoolKind::kSoftmax) {
      const float both = fmaxf(largest[i], other_largest);
      const float own = largest[i] == -INFINITY ? 1.f : expf(largest[i] - both);
      const float others = other_largest == -INFINITY ? 1.f : expf(other_largest - both);
      largest[i] = both;
      weights[i] = fmaf(weights[i], own, other_weights * others);
      sum[i] = fmaf(sum[i], own, other_sum * others);
    } else {
      sum[i] += other_sum;
    }
  }

 private:
  __device__ __forceinline__ void take(int i, float x, int token) {
    const bool is_larger = arg[i] < 0 || x > sum[i] || (x != x && sum[i] == sum[i]);
    sum[i] = is_larger ? x : sum[i];
    arg[i] = is_larger ? token : arg[i];
  }
};

template <typename T, PoolKind KIND, int VEC, bool kSplit>
__global__ void __launch_bounds__(kPoolThreads)
    segment_pool_fwd_kernel(const __grid_constant__ SegmentPoolFwdParams p) {
  const PoolShape& shape = p.shape;
  const int64_t num_vectors = shape.heads * (shape.channels / VEC), num_rows = shape.batch * shape.num_windows;
  int64_t row, vector;
  int lane = 0;
  if constexpr (kSplit) {
    const int64_t blocks = (num_vectors + kPoolSplitVectors - 1) / kPoolSplitVectors;
    row = blockIdx.x / blocks;
    vector = blockIdx.x % blocks * kPoolSplitVectors + threadIdx.x % kPoolSplitVectors;
    lane = threadIdx.x / kPoolSplitVectors;
  } else {
    const int64_t index = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
    row = index / num_vectors, vector = index % num_vectors;
  }
  const bool is_active = row < num_rows && vector < num_vectors;
  const int64_t batch = is_active ? row / shape.num_windows : 0;
  const PoolLane at = PoolLane::at<VEC>(is_active ? vector : 0, shape.channels);
  PoolWindow window{};
  if (is_active) window = shape.window(batch, row % shape.num_windows);
  const int before = window.has_previous ? static_cast<int>(window.count) : 0;
  const int total = before + static_cast<int>(window.count);
  const int64_t input_channels = shape.input_channels();

  Pooled<KIND, VEC> kept;
#pragma unroll 4
  for (int i = (p.mode == PoolMode::kLast ? max(total - 1, 0) : 0) + lane; i < total; i += kSplit ? kPoolLanes : 1) {
    const bool is_previous = i < before;
    const int64_t token = window.first - before + i;
    const int64_t half = shape.dual && !is_previous ? shape.channels : 0;
    float x[VEC], logit[VEC] = {};
    load_vector<T, VEC>(x, static_cast<const T*>(p.x) + at.in(p.x_stride, batch, token) + half);
    if constexpr (KIND == PoolKind::kSoftmax || KIND == PoolKind::kWeighted) {
      if (p.gate != nullptr) {
        load_vector<T, VEC>(logit, static_cast<const T*>(p.gate) + at.in(p.gate_stride, batch, token) + half);
      }
      if (p.slot_bias != nullptr) {
        const int64_t slot = is_previous ? i : i - before;
        float bias[VEC];
        load_words<float, VEC>(bias, static_cast<const float*>(p.slot_bias) +
                                         (slot * shape.heads + at.head) * input_channels + at.channel + half);
#pragma unroll
        for (int j = 0; j < VEC; ++j) logit[j] += bias[j];
      }
    }
    kept.add(x, logit, static_cast<int>(token));
  }

  if constexpr (kSplit) {
    __shared__ float smem_sum[kPoolLanes][VEC][kPoolSplitVectors];
    __shared__ float smem_largest[KIND == PoolKind::kSoftmax ? kPoolLanes : 1][VEC][kPoolSplitVectors];
    __shared__ float smem_weights[KIND == PoolKind::kSoftmax ? kPoolLanes : 1][VEC][kPoolSplitVectors];
    __shared__ int smem_arg[KIND == PoolKind::kMax ? kPoolLanes : 1][VEC][kPoolSplitVectors];
    const int column = threadIdx.x % kPoolSplitVectors;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      smem_sum[lane][i][column] = kept.sum[i];
      if constexpr (KIND == PoolKind::kSoftmax) {
        smem_largest[lane][i][column] = kept.largest[i], smem_weights[lane][i][column] = kept.weights[i];
      }
      if constexpr (KIND == PoolKind::kMax) smem_arg[lane][i][column] = kept.arg[i];
    }
    __syncthreads();
    if (lane != 0) return;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
#pragma unroll
      for (int other = 1; other < kPoolLanes; ++other) {
        kept.join(i, smem_sum[other][i][column],
                  KIND == PoolKind::kSoftmax ? smem_largest[KIND == PoolKind::kSoftmax ? other : 0][i][column] : 0.f,
                  KIND == PoolKind::kSoftmax ? smem_weights[KIND == PoolKind::kSoftmax ? other : 0][i][column] : 0.f,
                  KIND == PoolKind::kMax ? smem_arg[KIND == PoolKind::kMax ? other : 0][i][column] : 0);
      }
    }
  }
  if (!is_active) return;

  const int64_t to = (row * shape.heads + at.head) * shape.channels + at.channel;
  float y[VEC], lse[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    y[i] = kept.sum[i];
    if constexpr (KIND == PoolKind::kSoftmax) {
      y[i] = kept.sum[i] / kept.weights[i];
      // Without a finite logit both are NaN, as those of torch.softmax.
      lse[i] = kept.weights[i] > 0.f ? kept.largest[i] + logf(kept.weights[i]) : y[i];
    }
    if (p.mode == PoolMode::kMean) y[i] /= static_cast<float>(total);
    if (total == 0) y[i] = 0.f, lse[i] = 0.f;
  }
  store_vector<T, VEC>(static_cast<T*>(p.y) + to, y);
  if constexpr (KIND == PoolKind::kSoftmax) {
    if (p.lse != nullptr) store_words<float, VEC>(static_cast<float*>(p.lse) + to, lse);
  }
  if constexpr (KIND == PoolKind::kMax) {
    if (p.arg != nullptr) store_words<int, VEC>(p.arg + to, kept.arg);
  }
}

}  // namespace remora
