// Scores of chosen sub-keys and their gradients. No atomics: every sum has one owner and a fixed order.
//
//   query [T, G, ds]   keys [G, n, ds]   index [T, G, m]   scores [T, G, m]   (SubKeyScoresParams)
//
// fwd        a warp owns a row (t, g): a product of the lanes for each of its m sub-keys
// bwd query  a warp owns a row: distinct sub-keys in order of first appearance, each with the sum of its d_scores, go
//            to the workspace; d_query is their weighted sum
// bwd keys   a CTA owns 64 sub-keys, 128 channels and a span of tokens: its gradients stay in shared memory while the
//            tokens pass in order. A warp owns 32 of the channels, so warps need not wait for each other
// reduce     adds the spans in order
#pragma once
#include "pkm/sub_key.cuh"
#include "pkm/sub_key_scores/params.h"

namespace remora {

constexpr int kRowWarps = 2;
constexpr int kKeyBlock = 64, kChannelBlock = 128, kReduceThreads = 256;

struct SubKeyBwdKernelParams {
  SubKeyScoresParams p;
  int64_t num_spans, span_tokens;
  int32_t* entry_keys;     // [T, G, m] distinct sub-keys, then -1
  float* entry_products;   // [T, G, m] ScoreGradient of the entry
  float* entry_squares;    // [T, G, m]; unless score is kDot
  float* partial;          // [num_spans, G, n, ds]
  float* partial_squares;  // [num_spans, G, n]
};

template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps)
    sub_key_scores_fwd_kernel(const __grid_constant__ SubKeyScoresParams p) {
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (row >= p.tokens * p.groups) return;
  const int lane_idx = threadIdx.x % 32;
  const T* query = static_cast<const T*>(p.query) + row * p.dims;
  const T* keys = static_cast<const T*>(p.keys) + row % p.groups * p.num_keys * p.dims;
  for (int64_t m = row * p.chosen; m < (row + 1) * p.chosen; ++m) {
    const float score = sub_key_score(query, keys, p.index[m], p.num_keys, p.dims);
    if (lane_idx == 0) static_cast<float*>(p.scores)[m] = score;
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps)
    sub_key_scores_bwd_query_kernel(const __grid_constant__ SubKeyBwdKernelParams params) {
  const SubKeyScoresParams& p = params.p;
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (row >= p.tokens * p.groups) return;
  const int lane_idx = threadIdx.x % 32, chosen = static_cast<int>(p.chosen);
  const bool is_dot = p.score.kind == ScoreFunction::Kind::kDot;
  const T* query = static_cast<const T*>(p.query) + row * p.dims;
  const T* keys = static_cast<const T*>(p.keys) + row % p.groups * p.num_keys * p.dims;

  extern __shared__ int32_t smem[];
  int32_t* smem_index = smem + threadIdx.x / 32 * 4 * chosen;
  float* smem_d_scores = reinterpret_cast<float*>(smem_index + chosen);
  int32_t* smem_entry_keys = smem_index + 2 * chosen;
  float* smem_products = reinterpret_cast<float*>(smem_index + 3 * chosen);
  for (int m = lane_idx; m < chosen; m += 32) {
    const int key = p.index[row * chosen + m];
    smem_index[m] = key < p.num_keys ? key : -1;
    smem_d_scores[m] = static_cast<const float*>(p.d_scores)[row * chosen + m];
  }
  __syncwarp();

  // Sums of d_scores of every distinct sub-key
  int num_entries = 0;
  for (int m0 = 0; m0 < chosen; m0 += 32) {
    const int m = m0 + lane_idx, key = m < chosen ? smem_index[m] : -1;
    bool is_first = key >= 0;
    for (int other = 0; is_first && other < m; ++other) is_first = smem_index[other] != key;
    const uint32_t firsts = __ballot_sync(kFullWarp, is_first);
    if (is_first) {
      float sum = 0.f;
      for (int other = m; other < chosen; ++other) {
        if (smem_index[other] == key) sum += smem_d_scores[other];
      }
      const int entry = num_entries + __popc(firsts & ((1u << lane_idx) - 1));
      smem_entry_keys[entry] = key, smem_products[entry] = sum;
    }
    num_entries += __popc(firsts);
  }
  __syncwarp();

  // What the score function makes of them
  float query_square = 0.f;  // gradient of <q, q>
  if (!is_dot) {
    float square = 0.f;
    for (int64_t d = lane_idx; d < p.dims; d += 32) square = fmaf(load_float(query + d), load_float(query + d), square);
    square = warp_sum(square);
    for (int entry = 0; entry < num_entries; ++entry) {
      const T* key = keys + smem_entry_keys[entry] * p.dims;
      float product = 0.f, key_square = 0.f, distance = 0.f;
      for (int64_t d = lane_idx; d < p.dims; d += 32) {
        const float x = load_float(query + d), y = load_float(key + d);
        product = fmaf(x, y, product), key_square = fmaf(y, y, key_square), distance = fmaf(x - y, x - y, distance);
      }
      product = warp_sum(product), key_square = warp_sum(key_square), distance = warp_sum(distance);
      const ScoreGradient<float> g =
          score_gradient(p.score, smem_products[entry], product, square, key_square, distance);
      query_square += g.query_square;
      __syncwarp();
      if (lane_idx == 0) smem_products[entry] = g.product, smem_d_scores[entry] = g.key_square;
    }
    __syncwarp();
  }

  for (int m = lane_idx; m < chosen; m += 32) {
    const bool is_entry = m < num_entries;
    params.entry_keys[row * chosen + m] = is_entry ? smem_entry_keys[m] : -1;
    if (!is_entry) continue;
    params.entry_products[row * chosen + m] = smem_products[m];
    if (!is_dot) params.entry_squares[row * chosen + m] = smem_d_scores[m];
  }
  for (int64_t d = lane_idx; d < p.dims; d += 32) {
    float sum = 2.f * query_square * load_float(query + d);
    for (int entry = 0; entry < num_entries; ++entry) {
      sum = fmaf(smem_products[entry], load_float(keys + smem_entry_keys[entry] * p.dims + d), sum);
    }
    static_cast<T*>(p.d_query)[row * p.dims + d] = static_cast<T>(sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kChannelBlock)
    sub_key_scores_bwd_keys_kernel(const __grid_constant__ SubKeyBwdKernelParams params) {
  const SubKeyScoresParams& p = params.p;
  const int lane_idx = threadIdx.x % 32;
  const int64_t num_key_blocks = (p.num_keys + kKeyBlock - 1) / kKeyBlock;
  const int64_t num_channel_blocks = (p.dims + kChannelBlock - 1) / kChannelBlock;
  int64_t block = blockIdx.x;
  const int64_t channel = block % num_channel_blocks * kChannelBlock + threadIdx.x;
  const bool has_squares =
      block % num_channel_blocks == 0 && threadIdx.x < 32 && p.score.kind != ScoreFunction::Kind::kDot;
  block /= num_channel_blocks;
  const int first_key = static_cast<int>(block % num_key_blocks) * kKeyBlock;
  block /= num_key_blocks;
  const int64_t group = block % p.groups, span = block / p.groups;
  const int num_keys = static_cast<int>(min(int64_t{kKeyBlock}, p.num_keys - first_key));

  __shared__ float smem_sums[kKeyBlock][kChannelBlock];
  __shared__ float smem_squares[kKeyBlock];  // of warp 0
  for (int key = 0; key < num_keys; ++key) smem_sums[key][threadIdx.x] = 0.f;
  if (has_squares) {
    for (int key = lane_idx; key < num_keys; key += 32) smem_squares[key] = 0.f;
    __syncwarp();
  }

  const int64_t end = min(p.tokens, (span + 1) * params.span_tokens);
  for (int64_t token = span * params.span_tokens; token < end; ++token) {
    const int64_t row = token * p.groups + group;
    float query = 0.f;
    bool has_query = false;
    for (int64_t m0 = 0; m0 < p.chosen; m0 += 32) {
      const int64_t m = row * p.chosen + m0 + lane_idx;
      const int key = m0 + lane_idx < p.chosen ? params.entry_keys[m] - first_key : -1;
      const bool is_own = key >= 0 && key < num_keys;
      const float product = is_own ? params.entry_products[m] : 0.f;
      uint32_t owns = __ballot_sync(kFullWarp, is_own);
      // Distinct sub-keys of a token: lanes meet at none.
      if (has_squares && is_own) smem_squares[key] += params.entry_squares[m];
      if (owns != 0 && !has_query) {
        has_query = true;
        if (channel < p.dims) query = load_float(static_cast<const T*>(p.query) + row * p.dims + channel);
      }
      for (; owns != 0; owns &= owns - 1) {
        const int lane = __ffs(static_cast<int>(owns)) - 1;
        float& sum = smem_sums[__shfl_sync(kFullWarp, key, lane)][threadIdx.x];
        sum = fmaf(__shfl_sync(kFullWarp, product, lane), query, sum);
      }
      __syncwarp();
    }
  }

  const int64_t to = (span * p.groups + group) * p.num_keys + first_key;
  for (int key = 0; channel < p.dims && key < num_keys; ++key) {
    params.partial[(to + key) * p.dims + channel] = smem_sums[key][threadIdx.x];
  }
  for (int key = lane_idx; has_squares && key < num_keys; key += 32)
    params.partial_squares[to + key] = smem_squares[key];
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    sub_key_scores_reduce_kernel(const __grid_constant__ SubKeyBwdKernelParams params) {
  const SubKeyScoresParams& p = params.p;
  const int64_t num_rows = p.groups * p.num_keys, i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= num_rows * p.dims) return;
  float sum = 0.f, squares = 0.f;
  for (int64_t span = 0; span < params.num_spans; ++span) sum += params.partial[span * num_rows * p.dims + i];
  if (p.score.kind != ScoreFunction::Kind::kDot) {
    for (int64_t span = 0; span < params.num_spans; ++span) {
      squares += params.partial_squares[span * num_rows + i / p.dims];
    }
    sum = fmaf(2.f * squares, load_float(static_cast<const T*>(p.keys) + i), sum);
  }
  static_cast<T*>(p.d_keys)[i] = static_cast<T>(sum);
}

}  // namespace remora
