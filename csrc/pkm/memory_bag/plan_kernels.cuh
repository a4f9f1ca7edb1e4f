// The stable sort of lookups by row, and its segments. Integers only; no order depends on the schedule.
//
// A radix sort from the lowest digit: per pass, count the digits of every tile, sum the counts over tiles, scatter.
// Within a tile a warp owns neighbouring items and ranks 32 at a time by the lanes below with the same digit, so equal
// digits keep their order. The scatter goes through shared memory: what is written together lies together.
#pragma once
#include "common/reduce.cuh"
#include "pkm/memory_bag/params.h"

namespace remora {

constexpr int kPlanThreads = 256;
constexpr int kPlanItems = 16;  // per thread
constexpr int kPlanTile = kPlanThreads * kPlanItems;
constexpr int kDigitBits = 8;
constexpr int kNumDigits = 1 << kDigitBits;
static_assert(kNumDigits == kPlanThreads, "a thread owns a digit");

/// Keys and lookups between the passes, counts [digit][tile] and, of the segments, sums [3][tile].
struct PlanWorkspace {
  int64_t num_tiles;
  uint32_t* keys[2];   // [M]
  int32_t* lookups;    // [M]; the other buffer is SlotPlanParams::order
  int32_t* counts;     // [kNumDigits, num_tiles], then exclusive sums over tiles
  int32_t* totals;     // [kNumDigits]
  int32_t* segments;   // [num_tiles] that begin in earlier tiles
  int32_t* free_rows;  // [num_tiles] segments of rows that are not frozen
  int32_t* found;      // [num_tiles] lookups
  int32_t* num_found;  // [1]
  int64_t bytes;

  __host__ __device__ PlanWorkspace(const SlotPlanParams& p, void* buffer)
      : num_tiles((p.num_lookups + kPlanTile - 1) / kPlanTile) {
    int32_t* next = static_cast<int32_t*>(buffer);
    const auto take = [&](int64_t size) {
      int32_t* piece = next;
      next += size;
      return piece;
    };
    keys[0] = reinterpret_cast<uint32_t*>(take(p.num_lookups)),
    keys[1] = reinterpret_cast<uint32_t*>(take(p.num_lookups));
    lookups = take(p.num_lookups), counts = take(kNumDigits * num_tiles), totals = take(kNumDigits);
    segments = take(num_tiles), free_rows = take(num_tiles), found = take(num_tiles), num_found = take(1);
    bytes = (next - static_cast<int32_t*>(buffer)) * int64_t{4};
  }
};

/// One pass: keys and lookups from one buffer to the other. The first reads the indices instead.
struct PlanPass {
  const uint32_t* keys;  // null: the first pass
  const int32_t* lookups;
  uint32_t* keys_out;
  int32_t* lookups_out;
  int shift;

  __device__ __forceinline__ uint32_t key_at(const SlotPlanParams& p, int64_t i) const {
    return keys == nullptr ? p.key_of(i) : keys[i];
  }
  __device__ __forceinline__ int digit_of(uint32_t key) const { return key >> shift & (kNumDigits - 1); }
};

static __global__ void __launch_bounds__(kPlanThreads)
    slot_plan_count_kernel(const __grid_constant__ SlotPlanParams p, const __grid_constant__ PlanPass pass) {
  __shared__ int smem_counts[kNumDigits];
  const PlanWorkspace workspace(p, p.workspace);
  smem_counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * kPlanTile, end = min(begin + kPlanTile, p.num_lookups);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPlanThreads) {
    atomicAdd(&smem_counts[pass.digit_of(pass.key_at(p, i))], 1);
  }
  __syncthreads();
  workspace.counts[threadIdx.x * workspace.num_tiles + blockIdx.x] = smem_counts[threadIdx.x];
}

/// Counts become exclusive sums over the tiles. Grid: digits.
static __global__ void __launch_bounds__(kPlanThreads) slot_plan_scan_kernel(const __grid_constant__ SlotPlanParams p) {
  __shared__ int smem_sums[kPlanThreads / 32];
  const PlanWorkspace workspace(p, p.workspace);
  int32_t* counts = workspace.counts + blockIdx.x * workspace.num_tiles;
  int total = 0, sum;
  for (int64_t first = 0; first < workspace.num_tiles; first += kPlanThreads) {
    const int64_t tile = first + threadIdx.x;
    const int count = tile < workspace.num_tiles ? counts[tile] : 0;
    const int before = block_exclusive_sum<kPlanThreads>(count, smem_sums, sum);
    if (tile < workspace.num_tiles) counts[tile] = total + before;
    total += sum;
  }
  if (threadIdx.x == 0) workspace.totals[blockIdx.x] = total;
}

static __global__ void __launch_bounds__(kPlanThreads)
    slot_plan_scatter_kernel(const __grid_constant__ SlotPlanParams p, const __grid_constant__ PlanPass pass) {
  constexpr int kNumWarps = kPlanThreads / 32;
  __shared__ int smem_ranks[kNumWarps][kNumDigits];  // items of a warp by digit, then of the warps below
  __shared__ int smem_first[kNumDigits];             // of a digit in the sorted tile
  __shared__ int smem_target[kNumDigits];            // of a digit in the output, less smem_first
  __shared__ int smem_sums[kNumWarps];
  __shared__ uint32_t smem_keys[kPlanTile];
  __shared__ int32_t smem_lookups[kPlanTile];
  const PlanWorkspace workspace(p, p.workspace);
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * kPlanTile;
  const int size = static_cast<int>(min(int64_t{kPlanTile}, p.num_lookups - begin));

  for (int warp = 0; warp < kNumWarps; ++warp) smem_ranks[warp][threadIdx.x] = 0;
  __syncthreads();
  const int first_item = warp_idx * 32 * kPlanItems + lane_idx;
  uint32_t key[kPlanItems];
  int rank[kPlanItems];
#pragma unroll
  for (int r = 0; r < kPlanItems; ++r) {
    const int item = first_item + r * 32;
    key[r] = item < size ? pass.key_at(p, begin + item) : 0;
    const int digit = item < size ? pass.digit_of(key[r]) : kNumDigits;
    const unsigned peers = __match_any_sync(kFullWarp, digit);
    const int below = __popc(peers & ((1u << lane_idx) - 1));
    rank[r] = item < size ? smem_ranks[warp_idx][digit] + below : 0;
    __syncwarp();
    if (item < size && below == 0) smem_ranks[warp_idx][digit] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();

  int count = 0, sum;
  for (int warp = 0; warp < kNumWarps; ++warp) {
    const int here = smem_ranks[warp][threadIdx.x];
    smem_ranks[warp][threadIdx.x] = count;
    count += here;
  }
  const int first = block_exclusive_sum<kPlanThreads>(count, smem_sums, sum);
  const int digit_begin = block_exclusive_sum<kPlanThreads>(workspace.totals[threadIdx.x], smem_sums, sum);
  smem_first[threadIdx.x] = first;
  smem_target[threadIdx.x] = digit_begin + workspace.counts[threadIdx.x * workspace.num_tiles + blockIdx.x] - first;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kPlanItems; ++r) {
    const int item = first_item + r * 32;
    if (item >= size) continue;
    const int digit = pass.digit_of(key[r]);
    const int to = smem_first[digit] + smem_ranks[warp_idx][digit] + rank[r];
    smem_keys[to] = key[r];
    smem_lookups[to] = pass.keys == nullptr ? static_cast<int32_t>(begin + item) : pass.lookups[begin + item];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += kPlanThreads) {
    const int to = smem_target[pass.digit_of(smem_keys[i])] + i;
    pass.keys_out[to] = smem_keys[i];
    pass.lookups_out[to] = smem_lookups[i];
  }
}

/// Whether a segment begins at sorted position i.
__device__ __forceinline__ bool is_head(const SlotPlanParams& p, const uint32_t* keys, int64_t i) {
  return i < p.num_lookups && keys[i] != p.last_key() && (i == 0 || keys[i - 1] != keys[i]);
}

static __global__ void __launch_bounds__(kPlanThreads)
    slot_plan_heads_kernel(const __grid_constant__ SlotPlanParams p, const uint32_t* keys) {
  __shared__ int smem_sums[kPlanThreads / 32];
  const PlanWorkspace workspace(p, p.workspace);
  int heads = 0, free_heads = 0, found = 0, sum;
  for (int r = 0; r < kPlanItems; ++r) {
    const int64_t i = int64_t{blockIdx.x} * kPlanTile + r * kPlanThreads + threadIdx.x;
    const bool head = is_head(p, keys, i);
    heads += head;
    free_heads += head && keys[i] < p.map.num_rows;
    found += i < p.num_lookups && keys[i] != p.last_key();
  }
  const auto store_sum = [&](int x, int32_t* sums) {
    block_exclusive_sum<kPlanThreads>(x, smem_sums, sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  };
  store_sum(heads, workspace.segments), store_sum(free_heads, workspace.free_rows), store_sum(found, workspace.found);
}

/// One block: the segments of each tile become exclusive sums; totals.
static __global__ void __launch_bounds__(kPlanThreads)
    slot_plan_offsets_kernel(const __grid_constant__ SlotPlanParams p) {
  __shared__ int smem_sums[kPlanThreads / 32];
  const PlanWorkspace workspace(p, p.workspace);
  int total = 0, free_rows = 0, found = 0, sum;
  for (int64_t first = 0; first < workspace.num_tiles; first += kPlanThreads) {
    const int64_t tile = first + threadIdx.x;
    const bool is_valid = tile < workspace.num_tiles;
    const int before = block_exclusive_sum<kPlanThreads>(is_valid ? workspace.segments[tile] : 0, smem_sums, sum);
    if (is_valid) workspace.segments[tile] = total + before;
    total += sum;
    block_exclusive_sum<kPlanThreads>(is_valid ? workspace.free_rows[tile] : 0, smem_sums, sum);
    free_rows += sum;
    block_exclusive_sum<kPlanThreads>(is_valid ? workspace.found[tile] : 0, smem_sums, sum);
    found += sum;
  }
  if (threadIdx.x == 0) p.num_rows[0] = free_rows, p.num_rows[1] = total, *workspace.num_found = found;
}

static __global__ void __launch_bounds__(kPlanThreads)
    slot_plan_segments_kernel(const __grid_constant__ SlotPlanParams p, const uint32_t* keys) {
  __shared__ int smem_sums[kPlanThreads / 32];
  const PlanWorkspace workspace(p, p.workspace);
  const int64_t begin = int64_t{blockIdx.x} * kPlanTile;
  const int total = p.num_rows[1];
  int u = workspace.segments[blockIdx.x], sum;
  for (int r = 0; r < kPlanItems; ++r) {
    const int64_t i = begin + r * kPlanThreads + threadIdx.x;
    const bool head = is_head(p, keys, i);
    const int at = u + block_exclusive_sum<kPlanThreads>(head, smem_sums, sum);
    u += sum;
    if (head) {
      p.rows[at] = static_cast<int32_t>(keys[i] < p.map.num_rows ? keys[i] : keys[i] - p.map.num_rows);
      p.starts[at] = static_cast<int32_t>(i);
    }
    // Behind the last segment. R is at most M, so the tiles cover it; starts has one more entry.
    if (i >= total && i < p.max_rows()) p.rows[i] = static_cast<int32_t>(p.map.num_rows);
    if (i >= total && i < p.max_rows()) p.starts[i] = *workspace.num_found;
    if (i == p.num_lookups - 1) p.starts[p.max_rows()] = *workspace.num_found;
  }
}

}  // namespace remora
