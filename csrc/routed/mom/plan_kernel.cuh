// The plan: count per chunk of items, scan over chunks, scan over segments, stable scatter. Integers only.
//
//   counts_of [chunks, S + 1] in the workspace, segment S for dropped items; then totals [S + 1], dropped_at [S + 1]
//
// An item is token * J + choice. A warp owns a chunk and takes 32 items at a time: lanes with the same segment rank by
// lane, so the order of items is kept whatever the schedule.
#pragma once
#include "common/reduce.cuh"
#include "routed/mom/params.h"

namespace remora {

constexpr int kPlanThreads = 256;
constexpr int64_t kMinPlanChunk = 256, kMaxPlanChunks = 512;

__host__ __device__ constexpr int64_t plan_chunk(const RoutePlanParams& p) {
  const int64_t size = (p.items() + kMaxPlanChunks - 1) / kMaxPlanChunks;
  return size <= kMinPlanChunk ? kMinPlanChunk : (size + 31) / 32 * 32;
}

__host__ __device__ constexpr int64_t plan_chunks(const RoutePlanParams& p) {
  return (p.items() + plan_chunk(p) - 1) / plan_chunk(p);
}

__device__ __forceinline__ int64_t sequence_of(const RoutePlanParams& p, int64_t token) {
  if (p.cu_seqlens == nullptr) return token / p.seqlen;
  int64_t low = 0, high = p.num_seqs;  // the last sequence that begins at or before the token is low - 1
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && token < p.cu_seqlens[low] ? low - 1 : -1;
}

/// S for a dropped item.
__device__ __forceinline__ int64_t segment_of(const RoutePlanParams& p, int64_t item) {
  const int64_t token = item / p.choices(), choice = item % p.choices();
  const bool is_shared = choice == p.topk;
  const int64_t memory = is_shared ? p.num_memories : int64_t{p.indices[token * p.topk + choice]};
  const int64_t seq = sequence_of(p, token);
  const bool is_kept =
      seq >= 0 && (p.mask == nullptr || p.mask[token] != 0) && memory >= 0 && (is_shared || memory < p.num_memories);
  return is_kept ? seq * p.memories() + memory : p.segments();
}

__device__ __forceinline__ int kept_of(const RoutePlanParams& p, int64_t segment, int total) {
  if (segment == p.segments()) return 0;
  const bool is_bounded = p.capacity >= 0 && segment % p.memories() < p.num_memories;
  return is_bounded ? static_cast<int>(min(int64_t{total}, p.capacity)) : total;
}

struct PlanWorkspace {
  int32_t *counts, *totals, *dropped_at;
  __device__ __forceinline__ explicit PlanWorkspace(const RoutePlanParams& p)
      : counts(static_cast<int32_t*>(p.workspace)),
        totals(counts + plan_chunks(p) * (p.segments() + 1)),
        dropped_at(totals + p.segments() + 1) {}
};

static __global__ void __launch_bounds__(32) route_plan_count_kernel(const __grid_constant__ RoutePlanParams p) {
  int32_t* counts = PlanWorkspace(p).counts + blockIdx.x * (p.segments() + 1);
  for (int64_t s = threadIdx.x; s <= p.segments(); s += 32) counts[s] = 0;
  __syncwarp();
  const int64_t begin = blockIdx.x * plan_chunk(p), end = min(begin + plan_chunk(p), p.items());
  for (int64_t item = begin + threadIdx.x; item < end; item += 32) atomicAdd(counts + segment_of(p, item), 1);
}

/// Counts become exclusive sums over the chunks.
static __global__ void __launch_bounds__(kPlanThreads)
    route_plan_chunks_kernel(const __grid_constant__ RoutePlanParams p) {
  const PlanWorkspace workspace(p);
  const int64_t segment = int64_t{blockIdx.x} * kPlanThreads + threadIdx.x;
  if (segment > p.segments()) return;
  int total = 0;
  for (int64_t chunk = 0; chunk < plan_chunks(p); ++chunk) {
    int32_t& count = workspace.counts[chunk * (p.segments() + 1) + segment];
    const int here = count;
    count = total;
    total += here;
  }
  workspace.totals[segment] = total;
  if (segment < p.segments()) p.counts[segment] = total;
}

/// Sum over the threads below this one; `sum` becomes that over all of them.
__device__ __forceinline__ int block_exclusive_sum(int x, int* smem_sums, int& sum) {
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  int inclusive = x;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = __shfl_up_sync(kFullWarp, inclusive, delta);
    if (lane_idx >= delta) inclusive += below;
  }
  __syncthreads();
  if (lane_idx == 31) smem_sums[warp_idx] = inclusive;
  __syncthreads();
  int before = 0;
  sum = 0;
  for (int warp = 0; warp < kPlanThreads / 32; ++warp) {
    if (warp < warp_idx) before += smem_sums[warp];
    sum += smem_sums[warp];
  }
  return before + inclusive - x;
}

static __global__ void __launch_bounds__(kPlanThreads)
    route_plan_offsets_kernel(const __grid_constant__ RoutePlanParams p) {
  __shared__ int smem_sums[kPlanThreads / 32];
  const PlanWorkspace workspace(p);
  const int64_t num_segments = p.segments();
  int position = 0, sum;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t first = 0; first <= num_segments; first += kPlanThreads) {
      const int64_t segment = first + threadIdx.x;
      const int total = segment <= num_segments ? workspace.totals[segment] : 0;
      const int kept = segment <= num_segments ? kept_of(p, segment, total) : 0;
      const int at = position + block_exclusive_sum(pass == 0 ? kept : total - kept, smem_sums, sum);
      if (segment <= num_segments) (pass == 0 ? p.offsets : workspace.dropped_at)[segment] = at;
      position += sum;
    }
  }
}

static __global__ void __launch_bounds__(32) route_plan_scatter_kernel(const __grid_constant__ RoutePlanParams p) {
  const PlanWorkspace workspace(p);
  int32_t* ranks = workspace.counts + blockIdx.x * (p.segments() + 1);
  const int64_t begin = blockIdx.x * plan_chunk(p), end = min(begin + plan_chunk(p), p.items());
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t item = first + threadIdx.x;
    const int segment = item < end ? static_cast<int>(segment_of(p, item)) : -1;
    const unsigned peers = __match_any_sync(kFullWarp, segment);
    const int below = __popc(peers & ((1u << threadIdx.x) - 1));
    if (segment >= 0) {
      const int total = workspace.totals[segment], kept = kept_of(p, segment, total);
      const int rank = ranks[segment] + below, skipped = p.drop_oldest ? total - kept : 0;
      const bool is_kept = rank >= skipped && rank < skipped + kept;
      const int to = is_kept ? p.offsets[segment] + rank - skipped
                             : workspace.dropped_at[segment] + (rank < skipped ? rank : rank - kept);
      const int64_t row = item % p.choices() * p.tokens + item / p.choices();
      p.rows[to] = static_cast<int32_t>(row);
      p.positions[row] = to;
    }
    __syncwarp();
    if (segment >= 0 && below == 0) ranks[segment] += __popc(peers);
    __syncwarp();
  }
}

}  // namespace remora
