#include "check/traffic.h"

#include <algorithm>

#include "sim/cta.h"

namespace ptxsim {
namespace {
constexpr uint64_t kSector = 32;
}

void SectorSet::merge(const SectorSet& other) {
  for (const auto& [number, page] : other.pages_) {
    Page& mine = pages_[number];
    for (size_t i = 0; i < page.size(); ++i) mine[i] |= page[i];
  }
}

uint64_t SectorSet::size() const {
  uint64_t n = 0;
  for (const auto& [number, page] : pages_)
    for (uint64_t bits : page) n += static_cast<uint64_t>(__builtin_popcountll(bits));
  return n;
}

void TrafficCounter::global(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr) {
  GlobalTraffic& t = kind == AccessKind::load ? s.global_load : s.global_store;
  SectorSet& footprint = kind == AccessKind::load ? loaded : stored;
  uint64_t sorted[kWarpSize];
  unsigned lanes = 0;
  bool ascending = true;
  for_lanes(mask, [&](uint32_t l) {
    ascending &= lanes == 0 || sorted[lanes - 1] <= addr[l];
    sorted[lanes++] = addr[l];
  });
  if (!ascending) std::sort(sorted, sorted + lanes);
  // In ascending order a sector or byte has been seen if it is not behind the last one.
  uint64_t distinct_bytes = 0, reach = 0, next_sector = 0;
  for (unsigned i = 0; i < lanes; ++i) {
    const uint64_t begin = sorted[i], end = begin + bytes;
    if (end > reach) {
      distinct_bytes += end - std::max(begin, reach);
      reach = end;
    }
    for (uint64_t q = std::max(begin / kSector, next_sector); q * kSector < end; ++q) {
      ++t.sectors;
      footprint.insert(q);
      next_sector = q + 1;
    }
  }
  ++t.requests;
  // The ideal: the distinct bytes of the request, packed.
  t.ideal_sectors += (distinct_bytes + kSector - 1) / kSector;
  t.bytes += uint64_t{bytes} * lanes;
}

void TrafficCounter::global_range(LaunchStats& s, AccessKind kind, uint64_t addr, uint64_t bytes) {
  if (!bytes) return;
  GlobalTraffic& t = kind == AccessKind::load ? s.global_load : s.global_store;
  SectorSet& footprint = kind == AccessKind::load ? loaded : stored;
  const uint64_t first = addr / kSector, last = (addr + bytes - 1) / kSector;
  t.sectors += last - first + 1;
  t.ideal_sectors += (bytes + kSector - 1) / kSector;
  t.bytes += bytes;
  for (uint64_t q = first; q <= last; ++q) footprint.insert(q);
}

unsigned shared_wavefronts(uint32_t mask, unsigned bytes, const uint64_t* addr, unsigned* ideal) {
  // A unit is what a lane accesses of one bank group: a word, two or four (aligned, so units coincide or are disjoint).
  const unsigned unit = bytes <= 4 ? 4 : bytes <= 8 ? 8 : 16;
  const unsigned lanes_per_phase = 128 / unit, groups = 128 / unit;
  unsigned total = 0;
  *ideal = 0;
  for (unsigned phase = 0; phase < kWarpSize / lanes_per_phase; ++phase) {
    const uint32_t lanes = mask & (kAllLanes >> (kWarpSize - lanes_per_phase)) << (phase * lanes_per_phase);
    if (!lanes) continue;
    // Distinct units per group decide how often its banks are accessed.
    uint64_t seen[kWarpSize][kWarpSize];
    uint8_t count[kWarpSize] = {};
    unsigned most = 0;
    for_lanes(lanes, [&](uint32_t l) {
      const uint64_t u = addr[l] / unit;
      uint64_t* of_group = seen[u % groups];
      uint8_t& n = count[u % groups];
      if (std::find(of_group, of_group + n, u) != of_group + n) return;
      of_group[n++] = u;
      most = std::max<unsigned>(most, n);
    });
    total += most;
    *ideal += 1;
  }
  return total;
}

void TrafficCounter::shared(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr) {
  SharedTraffic& t = kind == AccessKind::load ? s.shared_load : s.shared_store;
  unsigned ideal = 0;
  t.wavefronts += shared_wavefronts(mask, bytes, addr, &ideal);
  t.ideal_wavefronts += ideal;
  ++t.requests;
  t.bytes += uint64_t{bytes} * static_cast<unsigned>(__builtin_popcount(mask));
}

void merge_footprints(std::vector<Worker>& workers, LaunchStats& total) {
  SectorSet loaded, stored;
  for (Worker& w : workers) {
    if (!w.traffic) continue;
    loaded.merge(w.traffic->loaded);
    stored.merge(w.traffic->stored);
  }
  total.distinct_load_bytes = loaded.size() * kSector;
  total.distinct_store_bytes = stored.size() * kSector;
}

}  // namespace ptxsim
