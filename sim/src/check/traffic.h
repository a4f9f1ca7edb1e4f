// Memory-traffic counters: coalescing, footprint and bank conflicts.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "sim/memory.h"
#include "sim/stats.h"

namespace ptxsim {

struct Worker;

/// A set of 32-byte sectors, as bitmaps of pages.
class SectorSet {
 public:
  void insert(uint64_t sector) {
    const uint64_t page = sector / kPage;
    if (page != last_page_) {
      last_ = &pages_[page];
      last_page_ = page;
    }
    (*last_)[sector % kPage / 64] |= uint64_t{1} << sector % 64;
  }
  void merge(const SectorSet& other);
  uint64_t size() const;

 private:
  static constexpr uint64_t kPage = 2048;
  using Page = std::array<uint64_t, kPage / 64>;
  std::unordered_map<uint64_t, Page> pages_;  // its elements do not move
  uint64_t last_page_ = ~uint64_t{0};
  Page* last_ = nullptr;
};

class TrafficCounter {
 public:
  void global(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr);
  void shared(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr);
  void global_range(LaunchStats& s, AccessKind kind, uint64_t addr, uint64_t bytes);

  SectorSet loaded, stored;
};

/// Distinct sectors over all workers.
void merge_footprints(std::vector<Worker>& workers, LaunchStats& total);

/// Shared-memory wavefronts of one request: 32 banks of 4 bytes; 8-byte accesses go by half-warps, 16-byte ones by
/// quarter-warps; lanes that access the same word of a bank share it.
unsigned shared_wavefronts(uint32_t mask, unsigned bytes, const uint64_t* addr, unsigned* ideal);

}  // namespace ptxsim
