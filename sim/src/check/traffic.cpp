#include "check/traffic.h"

#include <algorithm>

#include "sim/cta.h"

namespace ptxsim {
namespace {
constexpr uint64_t kSector = 32;
}

void TrafficCounter::global(LaunchStats& s, AccessKind kind, uint32_t mask, unsigned bytes, const uint64_t* addr) {
  GlobalTraffic& t = kind == AccessKind::load ? s.global_load : s.global_store;
  auto& footprint = kind == AccessKind::load ? loaded : stored;
  uint64_t sectors[kWarpSize * 4];
  unsigned n = 0;
  uint64_t distinct_bytes = 0, last = ~0ull;
  uint64_t sorted[kWarpSize];
  unsigned lanes = 0;
  for_lanes(mask, [&](uint32_t l) {
    sorted[lanes++] = addr[l];
    const uint64_t first = addr[l] / kSector, end = (addr[l] + bytes - 1) / kSector;
    for (uint64_t q = first; q <= end && n < std::size(sectors); ++q)
      if (q != last) sectors[n++] = last = q;
  });
  std::sort(sectors, sectors + n);
  n = static_cast<unsigned>(std::unique(sectors, sectors + n) - sectors);
  // The ideal: the distinct bytes of the request, packed.
  std::sort(sorted, sorted + lanes);
  uint64_t reach = 0;
  for (unsigned i = 0; i < lanes; ++i) {
    const uint64_t begin = std::max(sorted[i], reach), end = sorted[i] + bytes;
    if (end > begin) distinct_bytes += end - begin;
    reach = std::max(reach, end);
  }
  ++t.requests;
  t.sectors += n;
  t.ideal_sectors += (distinct_bytes + kSector - 1) / kSector;
  t.bytes += uint64_t{bytes} * lanes;
  for (unsigned i = 0; i < n; ++i) footprint.insert(sectors[i]);
}

void TrafficCounter::global_range(LaunchStats& s, AccessKind kind, uint64_t addr, uint64_t bytes) {
  if (!bytes) return;
  GlobalTraffic& t = kind == AccessKind::load ? s.global_load : s.global_store;
  auto& footprint = kind == AccessKind::load ? loaded : stored;
  const uint64_t first = addr / kSector, last = (addr + bytes - 1) / kSector;
  t.sectors += last - first + 1;
  t.ideal_sectors += (bytes + kSector - 1) / kSector;
  t.bytes += bytes;
  for (uint64_t q = first; q <= last; ++q) footprint.insert(q);
}

unsigned shared_wavefronts(uint32_t mask, unsigned bytes, const uint64_t* addr, unsigned* ideal) {
  const unsigned lanes_per_phase = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  unsigned total = 0;
  *ideal = 0;
  for (unsigned phase = 0; phase < kWarpSize / lanes_per_phase; ++phase) {
    const uint32_t phase_mask =
        lanes_per_phase == 32 ? mask : mask & (((1u << lanes_per_phase) - 1) << (phase * lanes_per_phase));
    if (!phase_mask) continue;
    // Distinct words per bank decide how often the bank is read.
    uint64_t words[kWarpSize * 4];
    unsigned n = 0;
    for_lanes(phase_mask, [&](uint32_t l) {
      for (uint64_t w = addr[l] / 4; w <= (addr[l] + bytes - 1) / 4; ++w) words[n++] = w;
    });
    std::sort(words, words + n);
    n = static_cast<unsigned>(std::unique(words, words + n) - words);
    unsigned per_bank[32] = {}, most = 0;
    for (unsigned i = 0; i < n; ++i) most = std::max(most, ++per_bank[words[i] % 32]);
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

void TrafficCounter::finish(LaunchStats&) {}

void merge_footprints(std::vector<Worker>& workers, LaunchStats& total) {
  std::unordered_set<uint64_t> loaded, stored;
  for (Worker& w : workers) {
    if (!w.traffic) continue;
    loaded.merge(w.traffic->loaded);
    stored.merge(w.traffic->stored);
  }
  total.distinct_load_bytes = loaded.size() * kSector;
  total.distinct_store_bytes = stored.size() * kSector;
}

}  // namespace ptxsim
