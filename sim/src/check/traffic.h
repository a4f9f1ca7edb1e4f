// Memory-traffic counters: coalescing, footprint and bank conflicts.
#pragma once
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "sim/memory.h"
#include "sim/stats.h"

namespace ptxsim {

struct Worker;

class TrafficCounter {
 public:
  void global(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr);
  void shared(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr);
  void global_range(LaunchStats& s, AccessKind kind, uint64_t addr, uint64_t bytes);
  void finish(LaunchStats& s);

  std::unordered_set<uint64_t> loaded, stored;  ///< sector numbers
};

/// Distinct sectors over all workers.
void merge_footprints(std::vector<Worker>& workers, LaunchStats& total);

/// Shared-memory wavefronts of one request: 32 banks of 4 bytes; 8-byte
/// accesses go by half-warps, 16-byte ones by quarter-warps; lanes that read
/// the same word of a bank share it.
unsigned shared_wavefronts(uint32_t mask, unsigned bytes, const uint64_t* addr, unsigned* ideal);

}  // namespace ptxsim
