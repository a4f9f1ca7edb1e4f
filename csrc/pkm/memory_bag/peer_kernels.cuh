// Kernels of bags of one-neuron experts.
//
//   table [N, dp + dv], row [u | v]   x [T, dp]   out, d_out [T, dv]   weights [T, P, h]
//
// A block owns a token. First its warps take kPeerLookups lookups in turn and multiply whole rows: <u, x>, and in the
// backward pass <v, d_out>; what the lookups weigh then stays in shared memory, and the warps take tiles of columns and
// sum lookups in order, in pieces of kFwdPiece as the forward bag does. Every element of a row is read once in the
// forward pass; the backward pass reads u a second time, soon after the first.
#pragma once
#include "pkm/memory_bag/bag_kernels.cuh"

namespace remora {

constexpr int kPeerWarps = 8;
constexpr int kPeerThreads = 32 * kPeerWarps;
constexpr int kPeerLookups = 4;  // rows a warp multiplies at once

/// act(x) and its derivative.
struct Activated {
  float value, slope;

  __device__ __forceinline__ Activated(Activation act, float x) {
    if (act == Activation::kIdentity) {
      value = x, slope = 1.f;
    } else if (act == Activation::kRelu) {
      value = x > 0.f || x != x ? x : 0.f, slope = x > 0.f ? 1.f : 0.f;
    } else if (act == Activation::kGelu) {
      const float below = 0.5f * erfcf(x * -0.70710678118654752f);  // of the normal distribution
      value = x * below, slope = below + x * 0.39894228040143268f * expf(x * x * -0.5f);
    } else {
      const float gate = 1.f / (1.f + expf(-x));
      value = x * gate, slope = gate * (1.f + x * (1.f - gate));
    }
  }
};

/// What a block keeps of its token's lookups: rows, -1 for what is none, and a factor of each.
struct PeerLookups {
  int* rows;       // [P]
  float* factors;  // [P]

  __device__ __forceinline__ explicit PeerLookups(int64_t num_lookups) {
    extern __shared__ int smem_lookups[];
    rows = smem_lookups, factors = reinterpret_cast<float*>(smem_lookups + num_lookups);
  }
};
constexpr int64_t peer_smem_bytes(int64_t num_lookups) { return num_lookups * 8; }

/// Columns [0, width) of out: the sum of table columns over the lookups, weighed by factors and, per head, by weights.
template <typename T, int VECTOR>
__device__ __forceinline__ void sum_lookups(const PeerLookups& lookups, int64_t num_lookups, const T* table,
                                            int64_t stride, int64_t width, const float* weights, int64_t heads,
                                            T* out) {
  const int lane_idx = threadIdx.x % 32;
  const int64_t block = width / heads, num_tiles = (block + 32 * VECTOR - 1) / (32 * VECTOR);
  for (int64_t task = threadIdx.x / 32; task < heads * num_tiles; task += kPeerWarps) {
    const int64_t head = task / num_tiles, in_head = task % num_tiles * 32 * VECTOR + lane_idx * VECTOR;
    const bool is_inside = in_head < block;
    float total[VECTOR] = {};
    for (int64_t first = 0; first < num_lookups; first += kFwdPiece) {
      const int64_t j = first + lane_idx;
      LaneLookup mine = {-1, 0.f};
      if (j < num_lookups) {
        mine = {lookups.rows[j], lookups.factors[j] * (weights == nullptr ? 1.f : weights[j * heads + head])};
      }
      float sum[VECTOR] = {};
      add_piece<T, VECTOR>(table + head * block + in_head, stride, is_inside, mine,
                           static_cast<int>(min(num_lookups - first, int64_t{kFwdPiece})), sum);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) total[i] += sum[i];
    }
    if (is_inside) store_row(out + head * block + in_head, total);
  }
}

/// Rows of kPeerLookups lookups from `first` on, null for what is none, and the row to multiply each with.
template <typename T, typename Params>
__device__ __forceinline__ void find_rows(const Params& p, int64_t first, const PeerLookups& lookups,
                                          const T* (&row)[kPeerLookups]) {
#pragma unroll
  for (int k = 0; k < kPeerLookups; ++k) {
    row[k] = nullptr;
    if (first + k >= p.shape.lookups) continue;
    const int64_t at = locate(p.shape.map, p.shape.indices[blockIdx.x * p.shape.lookups + first + k]).row;
    if (at >= 0) row[k] = static_cast<const T*>(p.table) + at * p.row_width();
    if (threadIdx.x % 32 == 0) lookups.rows[first + k] = static_cast<int>(at);
  }
}

template <typename T>
__device__ __forceinline__ void repeat(const T* x, const T* (&out)[kPeerLookups]) {
#pragma unroll
  for (int k = 0; k < kPeerLookups; ++k) out[k] = x;
}

template <typename T, int VECTOR>
__global__ void __launch_bounds__(kPeerThreads, VECTOR == 1 ? 4 : 2)
    peer_bag_fwd_kernel(const __grid_constant__ PeerBagFwdParams p) {
  const BagShape& shape = p.shape;
  const int64_t token = blockIdx.x;
  const PeerLookups lookups(shape.lookups);
  const T *row[kPeerLookups], *x[kPeerLookups];
  repeat(static_cast<const T*>(p.x) + token * p.query_width, x);
  for (int64_t first = threadIdx.x / 32 * kPeerLookups; first < shape.lookups; first += kPeerWarps * kPeerLookups) {
    find_rows(p, first, lookups, row);
    float score[kPeerLookups];
    dot_rows<T, VECTOR>(row, x, p.query_width, score);
#pragma unroll
    for (int k = 0; k < kPeerLookups; ++k) {
      if (threadIdx.x % 32 != 0 || first + k >= shape.lookups) continue;
      lookups.factors[first + k] = Activated(p.act, score[k]).value;
    }
  }
  __syncthreads();
  const float* weights = static_cast<const float*>(p.weights);
  sum_lookups<T, VECTOR>(lookups, shape.lookups, static_cast<const T*>(p.table) + p.query_width, p.row_width(),
                         shape.width, weights == nullptr ? nullptr : weights + token * shape.lookups * shape.heads,
                         shape.heads, static_cast<T*>(p.out) + token * shape.width);
}

template <typename T, int VECTOR>
__global__ void __launch_bounds__(kPeerThreads) peer_bag_bwd_kernel(const __grid_constant__ PeerBagBwdParams p) {
  const BagShape& shape = p.shape;
  const int64_t token = blockIdx.x, block = shape.width / shape.heads;
  const PeerLookups lookups(shape.lookups);
  const T *row[kPeerLookups], *other[kPeerLookups];
  for (int64_t first = threadIdx.x / 32 * kPeerLookups; first < shape.lookups; first += kPeerWarps * kPeerLookups) {
    find_rows(p, first, lookups, row);
    float score[kPeerLookups], dot[kPeerLookups], d_score[kPeerLookups] = {};
    repeat(static_cast<const T*>(p.x) + token * p.query_width, other);
    dot_rows<T, VECTOR>(row, other, p.query_width, score);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const T* value[kPeerLookups];
#pragma unroll
      for (int k = 0; k < kPeerLookups; ++k) {
        value[k] = row[k] == nullptr ? nullptr : row[k] + p.query_width + head * block;
      }
      repeat(static_cast<const T*>(p.d_out) + token * shape.width + head * block, other);
      dot_rows<T, VECTOR>(value, other, block, dot);
#pragma unroll
      for (int k = 0; k < kPeerLookups; ++k) {
        if (threadIdx.x % 32 != 0 || first + k >= shape.lookups) continue;
        const int64_t at = (token * shape.lookups + first + k) * shape.heads + head;
        const bool is_lookup = row[k] != nullptr;
        const float weight = is_lookup ? weight_at(p.weights, at) : 0.f;
        const float act = is_lookup ? Activated(p.act, score[k]).value : 0.f;
        d_score[k] = fmaf(weight, dot[k], d_score[k]);
        if (p.d_weights != nullptr) static_cast<float*>(p.d_weights)[at] = act * dot[k];
        if (p.factors != nullptr) static_cast<float*>(p.factors)[at] = act * weight;
      }
    }
#pragma unroll
    for (int k = 0; k < kPeerLookups; ++k) {
      if (threadIdx.x % 32 != 0 || first + k >= shape.lookups) continue;
      const float gradient = row[k] == nullptr ? 0.f : d_score[k] * Activated(p.act, score[k]).slope;
      lookups.factors[first + k] = gradient;
      if (p.d_scores != nullptr) static_cast<float*>(p.d_scores)[token * shape.lookups + first + k] = gradient;
    }
  }
  __syncthreads();
  sum_lookups<T, VECTOR>(lookups, shape.lookups, static_cast<const T*>(p.table), p.row_width(), p.query_width, nullptr,
                         1, static_cast<T*>(p.d_x) + token * p.query_width);
}

}  // namespace remora
