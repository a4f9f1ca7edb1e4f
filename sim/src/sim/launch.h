// A kernel launch: its geometry, its options and everything its CTAs share.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ptxsim/options.h"
#include "sim/program.h"
#include "sim/stats.h"

namespace ptxsim {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  const Program* program = nullptr;
  Dim3 grid, block, cluster;
  bool explicit_cluster = false;
  bool cooperative = false;
  uint32_t dynamic_shared = 0;
  uint32_t dynamic_shared_offset = 0;
  uint32_t shared_bytes = 0;  ///< reserved + static + dynamic
  std::vector<uint8_t> params;
  Options options;
  uint64_t id = 0;
  bool observe = false;  ///< any memory checker or counter is on

  /// cooperative_groups' grid barrier: {size, counter}. The device runtime finds
  /// it through %envreg1:2.
  alignas(16) uint32_t grid_workspace[16] = {64};

  std::atomic<uint64_t> next_cluster{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex;
  std::string error;

  uint32_t warps_per_cta() const { return static_cast<uint32_t>((block.count() + kWarpSize - 1) / kWarpSize); }
};

/// Runs the whole grid; throws Error on a fault. Returns the launch's counters.
LaunchStats run_launch(Launch& launch);

}  // namespace ptxsim
