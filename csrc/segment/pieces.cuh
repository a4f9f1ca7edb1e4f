// The segments of a slot_plan, lookups of one row side by side, cut for the CTAs of a key-major pass: a segment into
// pieces of kLookups from its first lookup on, so that where it is cut depends on nothing but itself. Sums of pieces
// are added in order by a second kernel.
#pragma once
#include <cstdint>

#include "common/reduce.cuh"
#include "segment/packed.h"

namespace remora {

struct Piece {
  int64_t segment, begin, end;  // lookups order[begin] ... order[end - 1]
  int64_t slot;                 // of its partial sum; -1: the piece is the segment

  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

/// Segment u takes the numbers u + starts[u] / kLookups ... below that of segment u + 1: as many as it has pieces, or
/// one more.
template <int kLookups>
struct PlanPieces {
  const int32_t* starts;  // [R + 1]
  int64_t max_rows;       // R
  int64_t num_lookups;    // M

  __host__ __device__ int64_t num_numbers() const { return max_rows + num_lookups / kLookups; }
  __host__ __device__ int64_t num_windows() const { return num_lookups / kLookups + 1; }
  __host__ __device__ int64_t num_slots() const { return 2 * num_windows() + 2; }

  __device__ __forceinline__ int64_t start(int64_t segment) const { return clamp_to(starts[segment], 0, num_lookups); }
  /// How many segments have a first number, or else a start, of at most `limit`; by the whole warp.
  __device__ __forceinline__ int64_t count_below(int64_t limit, bool by_number) const {
    const int lane_idx = threadIdx.x % 32;
    int64_t low = 0, high = max_rows;
    while (low < high) {
      const int64_t step = (high - low + 31) / 32, probe = low + lane_idx * step;
      bool is_below = probe < high;
      if (is_below) is_below = (by_number ? probe + start(probe) / kLookups : start(probe)) <= limit;
      const int count = __popc(__ballot_sync(kFullWarp, is_below));
      if (count == 0) break;
      high = min(high, low + count * step);
      low += (count - 1) * step + 1;
    }
    return low;
  }

  /// Piece with this number, found by the whole warp.
  __device__ __forceinline__ Piece find(int64_t number) const {
    const int64_t segment = count_below(number, true) - 1;
    if (segment < 0) return {0, 0, 0, -1};
    const int64_t first = start(segment), last = max(first, start(segment + 1));
    const int64_t index = number - segment - first / kLookups, begin = first + index * kLookups;
    const int64_t slot = 2 * (first / kLookups + index) + (index == 0);
    return {segment, begin, min(begin + kLookups, last), last - first > kLookups ? slot : -1};
  }

  /// The segment of several pieces that begins in a window of kLookups, at most one: its first piece and number of
  /// pieces, 0 for none.
  __device__ __forceinline__ int64_t find_cut(int64_t window, Piece& first_piece) const {
    const int64_t segment = count_below((window + 1) * kLookups - 1, false) - 1;
    if (segment < 0) return 0;
    const int64_t first = start(segment), last = max(first, start(segment + 1));
    if (first / kLookups != window || last - first <= kLookups) return 0;
    first_piece = {segment, first, first + kLookups, 2 * window + 1};
    return (last - first + kLookups - 1) / kLookups;
  }
  /// Slot of piece `index` of such a segment.
  static __device__ __forceinline__ int64_t slot_of(int64_t window, int64_t index) {
    return 2 * (window + index) + (index == 0);
  }
};

}  // namespace remora
