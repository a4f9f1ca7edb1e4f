// The k greatest of many scores in shared memory, in order, by one warp. Scores are compared as integers of the same
// order, so that every score, NaN and infinities included, has its place: NaN first, -0 and +0 together, equal scores
// by position. An entry packs both into 64 bits, smaller is earlier: ~key with its sign flipped, then the position.
#pragma once
#include <cstdint>

#include "common/reduce.cuh"
#include "common/select.h"

namespace remora {

constexpr int32_t kNoKey = INT32_MIN;  // below the key of every score

__device__ __forceinline__ int32_t key_of(float score) {
  const int32_t bits = __float_as_int(score + 0.f);  // -0 becomes +0
  return score == score ? bits ^ ((bits >> 31) & INT32_MAX) : INT32_MAX;
}
__device__ __forceinline__ float score_of(int32_t key) { return __int_as_float(key ^ ((key >> 31) & INT32_MAX)); }

using Entry = uint64_t;
constexpr Entry kNoEntry = UINT64_MAX;

__device__ __forceinline__ Entry pack_entry(int32_t key, int32_t position) {
  return static_cast<uint64_t>(~(static_cast<uint32_t>(key) ^ 0x80000000u)) << 32 | static_cast<uint32_t>(position);
}
__device__ __forceinline__ int32_t key_of_entry(Entry entry) {
  return static_cast<int32_t>(~static_cast<uint32_t>(entry >> 32) ^ 0x80000000u);
}
__device__ __forceinline__ int32_t position_of_entry(Entry entry) { return static_cast<int32_t>(entry); }

/// Sorts `size` entries, a power of two.
__device__ __forceinline__ void sort_entries(Entry* smem_entries, int size) {
  const int lane_idx = threadIdx.x % 32;
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = lane_idx; pair < size / 2; pair += 32) {
        const int i = 2 * pair - (pair & (stride - 1));
        const Entry a = smem_entries[i], b = smem_entries[i + stride];
        if ((a > b) == ((i & run) == 0)) smem_entries[i] = b, smem_entries[i + stride] = a;
      }
      __syncwarp();
    }
  }
}

/// The greatest bound in [low, high] that `enough` keys reach; low is one. `count` says how many reach a bound.
template <class Count>
__device__ __forceinline__ int32_t greatest_bound(int32_t low, int32_t high, int min_count, int max_count, int num_low,
                                                  const Count& count) {
  while (num_low > max_count && low < high) {
    const int32_t middle = high - static_cast<int32_t>((static_cast<uint32_t>(high) - static_cast<uint32_t>(low)) / 2);
    const int reached = count(middle);
    if (reached >= min_count) {
      low = middle, num_low = reached;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// A bound that k keys at least reach, and on the whole few more: from the maxima of 32 kGroups >= 2 k groups.
template <int kGroups>
__device__ __forceinline__ int32_t bound_by_groups(const int32_t* smem_keys, int count, int k) {
  const int lane_idx = threadIdx.x % 32;
  int32_t greatest[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) greatest[g] = smem_keys[g * 32 + lane_idx];
  for (int first = 32 * kGroups; first < count; first += 32 * kGroups) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int i = first + g * 32 + lane_idx;
      if (i < count) greatest[g] = max(greatest[g], smem_keys[i]);
    }
  }
  int32_t low = greatest[0], high = greatest[0];
#pragma unroll
  for (int g = 1; g < kGroups; ++g) low = min(low, greatest[g]), high = max(high, greatest[g]);
  low = __reduce_min_sync(kFullWarp, low), high = __reduce_max_sync(kFullWarp, high);
  return greatest_bound(low, high, k, k + k / 8, 32 * kGroups, [&](int32_t bound) {
    int reached = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) reached += greatest[g] >= bound;
    return static_cast<int>(__reduce_add_sync(kFullWarp, reached));
  });
}

__device__ __forceinline__ int count_at_least(const int32_t* smem_keys, int count, int32_t bound) {
  int reached = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) reached += smem_keys[i] >= bound;
  return static_cast<int>(__reduce_add_sync(kFullWarp, reached));
}

/// The k greatest of `count` >= k keys as entries, in order; `smem_entries` has room for select_capacity(k).
__device__ __forceinline__ void select_greatest(const int32_t* smem_keys, int count, int k, Entry* smem_entries) {
  const int lane_idx = threadIdx.x % 32, capacity = select_capacity(k);
  int32_t bound = kNoKey;
  if (count > capacity && k <= 32) {
    bound = bound_by_groups<2>(smem_keys, count, k);
  } else if (count > max(capacity, 256) && k <= 128) {
    bound = bound_by_groups<8>(smem_keys, count, k);
  }

  // What reaches the bound, or if that is too much the k greatest: keys above the k-th, and the first of those equal
  const int num_reached = count <= capacity ? count : count_at_least(smem_keys, count, bound);
  int num_equal = count;  // how many keys equal to the bound are taken
  if (num_reached > capacity) {
    bound = greatest_bound(bound, INT32_MAX, k, k, num_reached,
                           [&](int32_t x) { return count_at_least(smem_keys, count, x); });
    num_equal = k - (bound == INT32_MAX ? 0 : count_at_least(smem_keys, count, bound + 1));
  }
  const uint32_t lanes_below = (1u << lane_idx) - 1;
  int num_taken = 0;
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane_idx;
    const int32_t key = i < count ? smem_keys[i] : kNoKey;
    const uint32_t equal = __ballot_sync(kFullWarp, i < count && key == bound);
    const bool is_taken = i < count && (key > bound || (key == bound && __popc(equal & lanes_below) < num_equal));
    const uint32_t taken = __ballot_sync(kFullWarp, is_taken);
    if (is_taken) smem_entries[num_taken + __popc(taken & lanes_below)] = pack_entry(key, i);
    num_taken += __popc(taken);
    num_equal -= min(num_equal, __popc(equal));
  }
  int size = 32;
  while (size < num_taken) size *= 2;
  for (int i = num_taken + lane_idx; i < size; i += 32) smem_entries[i] = kNoEntry;
  __syncwarp();
  sort_entries(smem_entries, size);
}

}  // namespace remora
