// The stable sort of lookups by row: a radix sort whose chunks are counted, then scattered, in parallel. Where an item
// goes depends on the items alone, so neither chunks nor threads show in the result.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/cpu/arena.h"
#include "common/launch.h"
#include "pkm/memory_bag/params.h"

namespace remora {

constexpr int kMaxDigitBits = 11;  // the counters of a chunk stay in L1
constexpr int64_t kPlanChunk = 1 << 14, kMaxPlanChunks = 64;

/// A lookup and its key, as the sort moves them.
struct KeyedLookup {
  uint32_t key;
  int32_t lookup;
};

struct PlanScratch {
  int64_t chunk, num_chunks, num_bins;
  int num_passes, digit_bits;
  KeyedLookup* items[2];  // [M]
  uint32_t* bins;         // [num_chunks, num_bins] items of a chunk by digit, then where they go
  int32_t* segments;      // [num_chunks, 3] segments, those of rows that are not frozen, lookups
  int64_t bytes;

  PlanScratch(const SlotPlanParams& p, void* buffer) {
    const int64_t size = p.num_lookups;
    chunk = std::max(kPlanChunk, (size + kMaxPlanChunks - 1) / kMaxPlanChunks);
    num_chunks = (size + chunk - 1) / chunk;
    num_passes = (p.num_key_bits() + kMaxDigitBits - 1) / kMaxDigitBits;
    digit_bits = (p.num_key_bits() + num_passes - 1) / num_passes;
    num_bins = int64_t{1} << digit_bits;
    Arena arena(buffer);
    for (KeyedLookup*& half : items) half = arena.take<KeyedLookup>(size);
    bins = arena.take<uint32_t>(num_chunks * num_bins);
    segments = arena.take<int32_t>(num_chunks * 3);
    bytes = arena.used();
  }

  /// body(chunk_idx, begin, end) for every chunk of the lookups.
  template <class Body>
  void for_chunks(const Launch& launch, int64_t size, const Body& body) const {
    launch.parallel_for(num_chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) body(c, c * chunk, std::min(size, (c + 1) * chunk));
    });
  }
};

inline void sort_lookups(const SlotPlanParams& p, const PlanScratch& scratch, const Launch& launch) {
  scratch.for_chunks(launch, p.num_lookups, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) scratch.items[0][m] = {p.key_of(m), static_cast<int32_t>(m)};
  });
  for (int pass = 0; pass < scratch.num_passes; ++pass) {
    const KeyedLookup* from = scratch.items[pass % 2];
    KeyedLookup* to = scratch.items[1 - pass % 2];
    const int shift = pass * scratch.digit_bits;
    const uint32_t mask = static_cast<uint32_t>(scratch.num_bins - 1);
    scratch.for_chunks(launch, p.num_lookups, [&](int64_t c, int64_t begin, int64_t end) {
      uint32_t* bins = scratch.bins + c * scratch.num_bins;
      std::fill_n(bins, scratch.num_bins, 0);
      for (int64_t i = begin; i < end; ++i) ++bins[from[i].key >> shift & mask];
    });
    uint32_t position = 0;
    for (int64_t bin = 0; bin < scratch.num_bins; ++bin) {
      for (int64_t c = 0; c < scratch.num_chunks; ++c) {
        uint32_t& count = scratch.bins[c * scratch.num_bins + bin];
        const uint32_t here = count;
        count = position;
        position += here;
      }
    }
    scratch.for_chunks(launch, p.num_lookups, [&](int64_t c, int64_t begin, int64_t end) {
      uint32_t* bins = scratch.bins + c * scratch.num_bins;
      for (int64_t i = begin; i < end; ++i) to[bins[from[i].key >> shift & mask]++] = from[i];
    });
  }
}

/// Splits the sorted lookups into segments.
inline void find_segments(const SlotPlanParams& p, const PlanScratch& scratch, const Launch& launch) {
  const KeyedLookup* sorted = scratch.items[scratch.num_passes % 2];
  const uint32_t num_rows = static_cast<uint32_t>(p.map.num_rows), last_key = p.last_key();
  const auto is_head = [&](int64_t i) {
    return sorted[i].key != last_key && (i == 0 || sorted[i - 1].key != sorted[i].key);
  };
  scratch.for_chunks(launch, p.num_lookups, [&](int64_t c, int64_t begin, int64_t end) {
    int32_t heads = 0, free_heads = 0, lookups = 0;
    for (int64_t i = begin; i < end; ++i) {
      heads += is_head(i);
      free_heads += is_head(i) && sorted[i].key < num_rows;
      lookups += sorted[i].key != last_key;
    }
    int32_t* sums = scratch.segments + c * 3;
    sums[0] = heads, sums[1] = free_heads, sums[2] = lookups;
  });
  int32_t total[3] = {};
  for (int64_t c = 0; c < scratch.num_chunks; ++c) {
    int32_t* sums = scratch.segments + c * 3;
    const int32_t before = total[0];
    for (int i = 0; i < 3; ++i) total[i] += sums[i];
    sums[0] = before;
  }
  p.num_rows[0] = total[1], p.num_rows[1] = total[0];
  scratch.for_chunks(launch, p.num_lookups, [&](int64_t c, int64_t begin, int64_t end) {
    int32_t u = scratch.segments[c * 3];
    for (int64_t i = begin; i < end; ++i) {
      p.order[i] = sorted[i].lookup;
      if (!is_head(i)) continue;
      p.rows[u] = static_cast<int32_t>(sorted[i].key < num_rows ? sorted[i].key : sorted[i].key - num_rows);
      p.starts[u++] = static_cast<int32_t>(i);
    }
  });
  std::fill(p.rows + total[0], p.rows + p.max_rows(), static_cast<int32_t>(num_rows));
  std::fill(p.starts + total[0], p.starts + p.max_rows() + 1, total[2]);
}

}  // namespace remora
