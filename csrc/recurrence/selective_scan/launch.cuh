// Launches of one element type, instantiated by launch_<type>.cu.
#pragma once
#include "recurrence/selective_scan/launch.h"
#include "recurrence/selective_scan/scan_tile.cuh"

namespace remora {

/// Calls f with the traits of kernels whose lanes hold LANE_STATES states each, a value of a compile-time type. Many
/// make sums over few lanes; few make neighbouring lanes read and write neighbouring states.
template <int LANE_STATES, class F>
Error with_scan_traits(int64_t state_dim, F&& f) {
  if (state_dim <= 16) return f(ScanTraits<16 / LANE_STATES, LANE_STATES>{});
  if (state_dim <= 64) return f(ScanTraits<64 / LANE_STATES, LANE_STATES>{});
  if (state_dim <= 128) return f(ScanTraits<128 / LANE_STATES, LANE_STATES>{});
  return "selective_scan on CUDA supports up to 128 states";
}

/// Floats that the passes keep in the workspace, in the order of ScanGradients (bwd_kernel.cuh).
struct ScanWorkspace {
  int64_t slots, states, steps, map_shares;

  explicit ScanWorkspace(const SelectiveScanInputs& in);
  int64_t fwd_bytes(bool has_saved_states) const { return ((has_saved_states ? 0 : states) + steps) * 4; }
  int64_t bwd_bytes() const { return (2 * states + 3 * steps + 2 * map_shares) * 4; }
};

template <typename T>
Error selective_scan_fwd_of(const SelectiveScanFwdParams& params, const Launch& launch);
template <typename T>
Error selective_scan_bwd_of(const SelectiveScanBwdParams& params, const Launch& launch);
template <typename T>
Error selective_scan_step_of(const SelectiveScanStepParams& params, const Launch& launch);

}  // namespace remora
