// The best pairs of candidate rows and columns under a bilinear form; neither the candidates' scores nor the m^2 values
// of the form reach device memory.
//
//   query [T, H, 2, r, ds]   keys [H, 2, r, n, ds]   index [T, H, 2, m]   core [H, r, r]
//   chosen [T, H, 2, k]   sub_scores [T, H, 2, r, k]   (TuckerSelectParams)
//
// Grid: token and head. A warp at a time scores a candidate. Pairs lie in order of their ranks; warp w owns a
// contiguous range of them, so that the order of warps and lanes is theirs. Four maxima a thread bound the k-th value
// from below; what reaches the bound, seldom much more than k pairs, is sorted. If it is more than fits, the bound is
// made exact and ties are taken in order.
#pragma once
#include "common/select.cuh"
#include "pkm/sub_key.cuh"
#include "pkm/tucker_select/params.h"

namespace remora {

constexpr int kTuckerWarps = 8, kTuckerThreads = 32 * kTuckerWarps, kTuckerMaxima = 4;

/// n / width for n < 2^21, width <= 1024; `magic` is 2^32 / width rounded up, 0 for width 1.
__device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t magic) { return magic == 0 ? n : __umulhi(n, magic); }

/// Pairs of one group of candidates, in order of their ranks.
struct TuckerGroup {
  uint32_t offset, width, magic;
  __device__ __forceinline__ TuckerGroup(int64_t offset, int64_t width)
      : offset(static_cast<uint32_t>(offset)),
        width(static_cast<uint32_t>(width)),
        magic(width <= 1 ? 0u : UINT32_MAX / static_cast<uint32_t>(width) + 1) {}
};

template <int RANK>
struct TuckerForm {
  const float* smem_weights;  // [m][RANK] row times core
  const float* smem_columns;  // [m][RANK]
  TuckerGroup first, second;
  int num_first_pairs;

  __device__ __forceinline__ int32_t key(int position) const {
    const bool is_first = position < num_first_pairs;
    const uint32_t width = is_first ? first.width : second.width, offset = is_first ? first.offset : second.offset;
    const uint32_t i = position - (is_first ? 0 : num_first_pairs);
    const uint32_t row = divide(i, is_first ? first.magic : second.magic);
    const float* smem_row = smem_weights + (offset + row) * RANK;
    const float* smem_column = smem_columns + (offset + i - row * width) * RANK;
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < RANK; ++s) sum = fmaf(smem_row[s], smem_column[s], sum);
    return key_of(sum);
  }
};

template <typename T, typename Index, typename Store>
__device__ __forceinline__ void score_sub_keys(const TuckerSelectParams& p, int first, int count, Index index,
                                               Store store) {
  const int rank = static_cast<int>(p.rank);
  const int64_t head = blockIdx.x % p.heads;
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < rank * count; i += kTuckerWarps) {
    const int64_t group = first + i / count;  // of the axes and ranks of a head
    const T* query = static_cast<const T*>(p.query) + (int64_t{blockIdx.x} * 2 * rank + group) * p.dims;
    const T* keys = static_cast<const T*>(p.keys) + (head * 2 * rank + group) * p.num_keys * p.dims;
    const float score = sub_key_score(query, keys, index(i % count), p.num_keys, p.dims);
    if (threadIdx.x % 32 == 0) store(i / count, i % count, score);
  }
}

/// Scores of `count` sub-keys of an axis for every rank: store(rank, i, <query[rank], keys[rank][index(i)]>), on one
/// lane.
template <typename Index, typename Store>
__device__ __forceinline__ void score_axis(const TuckerSelectParams& p, int axis, int count, Index index, Store store) {
  const int first = axis * static_cast<int>(p.rank);
  switch (p.dtype) {
    case DType::kBFloat16:
      return score_sub_keys<__nv_bfloat16>(p, first, count, index, store);
    case DType::kFloat16:
      return score_sub_keys<__half>(p, first, count, index, store);
    default:
      return score_sub_keys<float>(p, first, count, index, store);
  }
}

template <int RANK>
__global__ void __launch_bounds__(kTuckerThreads, 3)
    tucker_select_kernel(const __grid_constant__ TuckerSelectParams p, int capacity) {
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int num_candidates = static_cast<int>(p.candidates), topk = static_cast<int>(p.topk);
  const int num_pairs = static_cast<int>(p.num_pairs()), rank = static_cast<int>(p.rank);
  const int32_t* gmem_index = p.index + int64_t{blockIdx.x} * 2 * num_candidates;
  const float* core = static_cast<const float*>(p.core) + blockIdx.x % p.heads * rank * rank;

  extern __shared__ __align__(16) uint8_t smem[];
  Entry* smem_entries = reinterpret_cast<Entry*>(smem);
  float* smem_weights = reinterpret_cast<float*>(smem_entries + capacity);
  float* smem_columns = smem_weights + num_candidates * RANK;
  __shared__ int32_t smem_counts[kTuckerWarps + 1];
  __shared__ int32_t smem_equal[kTuckerWarps + 1];

  // The ranks that there are not score zero.
  for (int i = threadIdx.x; i < num_candidates * RANK; i += kTuckerThreads) smem_weights[i] = smem_columns[i] = 0.f;
  __syncthreads();
#pragma unroll 1
  for (int axis = 0; axis < 2; ++axis) {
    float* smem_axis = axis == 0 ? smem_weights : smem_columns;
    score_axis(
        p, axis, num_candidates, [&](int i) { return gmem_index[axis * num_candidates + i]; },
        [&](int r, int i, float score) { smem_axis[i * RANK + r] = score; });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_candidates; i += kTuckerThreads) {
    float row[RANK];
#pragma unroll
    for (int r = 0; r < RANK; ++r) row[r] = smem_weights[i * RANK + r];
#pragma unroll
    for (int s = 0; s < RANK; ++s) {
      float weight = 0.f;
#pragma unroll
      for (int r = 0; r < RANK; ++r) weight = s < rank && r < rank ? fmaf(row[r], core[r * rank + s], weight) : weight;
      smem_weights[i * RANK + s] = weight;
    }
  }
  __syncthreads();
  const TuckerForm<RANK> form{smem_weights, smem_columns, TuckerGroup(0, p.positive),
                              TuckerGroup(p.positive, p.candidates - p.positive),
                              static_cast<int>(p.num_first_pairs())};
  const int share = (num_pairs + 32 * kTuckerWarps - 1) / (32 * kTuckerWarps) * 32;
  const int begin = min(num_pairs, warp_idx * share), end = min(num_pairs, begin + share);
  const auto count_at_least = [&](int32_t bound) {
    int reached = 0;
    for (int i = begin + lane_idx; i < end; i += 32) reached += form.key(i) >= bound;
    reached = static_cast<int>(__reduce_add_sync(kFullWarp, reached));
    if (lane_idx == 0) smem_counts[warp_idx] = reached;
    __syncthreads();
    int sum = 0;
    for (int warp = 0; warp < kTuckerWarps; ++warp) sum += smem_counts[warp];
    __syncthreads();
    return sum;
  };

  // A bound that at least k pairs reach
  int32_t bound = kNoKey;
  if (num_pairs >= kTuckerMaxima * kTuckerThreads) {
    int32_t greatest[kTuckerMaxima];
#pragma unroll
    for (int g = 0; g < kTuckerMaxima; ++g) greatest[g] = kNoKey;
    for (int i = begin + lane_idx; i < end; i += 32 * kTuckerMaxima) {
#pragma unroll
      for (int g = 0; g < kTuckerMaxima; ++g) {
        if (i + 32 * g < end) greatest[g] = max(greatest[g], form.key(i + 32 * g));
      }
    }
    bound = greatest_bound(kNoKey, INT32_MAX, topk, topk + topk / 8, kTuckerMaxima * kTuckerThreads, [&](int32_t x) {
      int reached = 0;
#pragma unroll
      for (int g = 0; g < kTuckerMaxima; ++g) reached += __syncthreads_count(greatest[g] >= x);
      return reached;
    });
  }
  const int num_reached = count_at_least(bound);
  int num_equal = num_pairs;  // how many pairs equal to the bound are taken
  if (num_reached > capacity) {
    bound = greatest_bound(bound, INT32_MAX, topk, topk, num_reached, count_at_least);
    num_equal = topk - (bound == INT32_MAX ? 0 : count_at_least(bound + 1));
  }

  // Where the pairs of each warp go
  int num_above = 0, num_same = 0;
  for (int i = begin + lane_idx; i < end; i += 32) {
    const int32_t key = form.key(i);
    num_above += key > bound, num_same += key == bound;
  }
  num_above = static_cast<int>(__reduce_add_sync(kFullWarp, num_above));
  num_same = static_cast<int>(__reduce_add_sync(kFullWarp, num_same));
  if (lane_idx == 0) smem_counts[warp_idx] = num_above, smem_equal[warp_idx] = num_same;
  __syncthreads();
  int to = 0, num_same_before = 0;
  for (int warp = 0; warp < warp_idx; ++warp) {
    to += smem_counts[warp] + min(smem_equal[warp], max(num_equal - num_same_before, 0));
    num_same_before += smem_equal[warp];
  }
  int num_left = max(num_equal - num_same_before, 0);
  const uint32_t lanes_below = (1u << lane_idx) - 1;
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane_idx;
    const int32_t key = i < end ? form.key(i) : kNoKey;
    const uint32_t equal = __ballot_sync(kFullWarp, i < end && key == bound);
    const bool is_taken = i < end && (key > bound || (key == bound && __popc(equal & lanes_below) < num_left));
    const uint32_t taken = __ballot_sync(kFullWarp, is_taken);
    if (is_taken) smem_entries[to + __popc(taken & lanes_below)] = pack_entry(key, i);
    to += __popc(taken), num_left -= min(num_left, __popc(equal));
  }
  if (warp_idx == kTuckerWarps - 1 && lane_idx == 0) smem_counts[kTuckerWarps] = to;
  __syncthreads();

  if (warp_idx == 0) {
    const int num_taken = smem_counts[kTuckerWarps];
    int size = 32;
    while (size < num_taken) size *= 2;
    for (int i = num_taken + lane_idx; i < size; i += 32) smem_entries[i] = kNoEntry;
    __syncwarp();
    sort_entries(smem_entries, size);
  }
  __syncthreads();

  // The weights have taken the place of the rows' scores, so those of the chosen rows are computed again.
  int32_t* chosen = p.chosen + int64_t{blockIdx.x} * 2 * topk;
  float* sub_scores = static_cast<float*>(p.sub_scores) + int64_t{blockIdx.x} * 2 * rank * topk;
  const auto pair_of = [&](int i) { return tucker_pair(p, position_of_entry(smem_entries[i])); };
  for (int i = threadIdx.x; i < topk; i += kTuckerThreads) {
    const TuckerPair pair = pair_of(i);
    chosen[i] = gmem_index[pair.row], chosen[topk + i] = gmem_index[num_candidates + pair.column];
    for (int r = 0; r < rank; ++r) sub_scores[(rank + r) * topk + i] = smem_columns[pair.column * RANK + r];
  }
  score_axis(
      p, 0, topk, [&](int i) { return gmem_index[pair_of(i).row]; },
      [&](int r, int i, float score) { sub_scores[r * topk + i] = score; });
}

}  // namespace remora
