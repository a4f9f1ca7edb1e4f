// Interface between bwd_launch.cu and the instantiations of the backward kernels.
#pragma once
#include <cuda_runtime_api.h>

#include "common/launch.h"
#include "recurrence/gated_delta_rule/params.h"

namespace remora {

/// Shared memory a CTA may use on 8.6, 8.9 and 12.x; on 8.0; on 9.0 and 10.x.
constexpr int kSmallSmemSize = 99 * 1024;
constexpr int kMediumSmemSize = 163 * 1024;
constexpr int kLargeSmemSize = 227 * 1024;

constexpr int smem_size_of(int arch) {
  return arch >= 90 && arch < 120 ? kLargeSmemSize : arch == 80 ? kMediumSmemSize : kSmallSmemSize;
}

/// V tiles that the chunk kernel has in flight.
constexpr int num_bwd_stages(int arch) { return smem_size_of(arch) == kSmallSmemSize ? 1 : 2; }

/// Columns of V whose state the chunk kernel keeps in shared memory: as many as fit.
constexpr int bwd_state_columns(int element_size, int num_stages) {
  return element_size == 2 ? 128 : num_stages == 2 ? 64 : 32;
}

/// Parts of the workspace, in this order.
struct BwdWorkspace {
  int64_t d_states_size;    // bytes, [chunk slots, HV, V, HEAD_DIM] of saved_dtype
  int64_t inverses_size;    // bytes, [chunk slots, HV] tiles of -Y
  int64_t span_maps_size;   // bytes, span_maps.cuh
  int64_t group_sums_size;  // bytes, dq and dk of an interval in float while a group is summed
};

template <typename T, int HEAD_DIM>
cudaError_t run_gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const BwdWorkspace& workspace,
                                     const Launch& launch);

}  // namespace remora
