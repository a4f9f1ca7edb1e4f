// Counters of a kernel launch.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sim/program.h"

namespace ptxsim {

/// Global-memory traffic of one direction (loads or stores).
struct GlobalTraffic {
  uint64_t requests = 0;       ///< warp-level instructions
  uint64_t sectors = 0;        ///< distinct 32-byte sectors, summed over requests
  uint64_t ideal_sectors = 0;  ///< sectors had the bytes been contiguous
  uint64_t bytes = 0;          ///< requested by lanes
};

struct SharedTraffic {
  uint64_t requests = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;  ///< without bank conflicts
  uint64_t bytes = 0;
};

/// What worker threads count; summed when the launch ends.
struct LaunchStats {
  uint64_t launches = 0;
  uint64_t ctas = 0;
  uint64_t warps = 0;
  uint64_t threads = 0;
  std::vector<uint64_t> warp_count;    ///< executions per instruction (pc)
  std::vector<uint64_t> thread_count;  ///< lanes summed over them
  uint64_t divergent_branches = 0;
  uint64_t barriers = 0;  ///< completed phases of CTA barriers
  GlobalTraffic global_load, global_store;
  SharedTraffic shared_load, shared_store;
  uint64_t async_copy_bytes = 0;  ///< cp.async and bulk copies
  uint64_t atomic_lanes = 0;
  uint64_t distinct_load_bytes = 0;  ///< footprint, 32-byte sector granularity
  uint64_t distinct_store_bytes = 0;
  uint64_t max_local_bytes = 0;
  uint64_t shared_bytes = 0;
  double seconds = 0;                         ///< host time
  std::map<std::string, uint64_t> mma_flops;  ///< by input type

  uint64_t class_warps(const Program& p, InstClass c) const;
  uint64_t total_warps() const;
  uint64_t total_threads() const;
  void add(const LaunchStats& other);
};

/// Per-kernel-name totals of the process.
struct KernelTotals {
  LaunchStats stats;
  std::map<std::string, std::pair<uint64_t, uint64_t>> classes;  ///< name -> {warp, thread}
};
/// Classes of one launch, in the form of KernelTotals::classes.
std::map<std::string, std::pair<uint64_t, uint64_t>> classes_of(const Program& program, const LaunchStats& stats);
/// A JSON object.
std::string to_json(const KernelTotals& k);
std::map<std::string, KernelTotals> kernel_totals();
void accumulate(const Program& program, const LaunchStats& stats);

}  // namespace ptxsim
