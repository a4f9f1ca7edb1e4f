// CUDA entry points of the selective scan.
#include "recurrence/selective_scan/launch.h"

#include "recurrence/selective_scan/launch.cuh"

namespace remora {
namespace {

constexpr Error kNoFloat64 = "selective_scan on CUDA supports float32, bfloat16 and float16";

template <class Params, class Bf16, class Fp16, class Fp32>
Error dispatch(const Params& params, const Launch& launch, Bf16 bf16, Fp16 fp16, Fp32 fp32) {
  switch (params.in.dtype) {
    case DType::kBFloat16:
      return bf16(params, launch);
    case DType::kFloat16:
      return fp16(params, launch);
    case DType::kFloat32:
      return fp32(params, launch);
    default:
      return kNoFloat64;
  }
}

}  // namespace

ScanWorkspace::ScanWorkspace(const SelectiveScanInputs& in) {
  const SelectiveScanShape& shape = in.shape;
  const int64_t tokens = shape.sequences.batch * shape.sequences.seqlen;
  slots = num_scan_slots(tokens, shape.sequences.num_seqs);
  states = slots * shape.num_channels * shape.state_dim;
  steps = slots * shape.num_channels;
  map_shares = shape.num_groups * scan_blocks_per_group<kBwdChannels>(shape) * tokens * shape.state_dim;
}

int64_t selective_scan_fwd_workspace(const SelectiveScanFwdParams& params) {
  return ScanWorkspace(params.in).fwd_bytes(params.saved_states != nullptr);
}
Error selective_scan_fwd(const SelectiveScanFwdParams& params, const Launch& launch) {
  return dispatch(params, launch, selective_scan_fwd_of<__nv_bfloat16>, selective_scan_fwd_of<__half>,
                  selective_scan_fwd_of<float>);
}

int64_t selective_scan_bwd_workspace(const SelectiveScanBwdParams& params) {
  return ScanWorkspace(params.in).bwd_bytes();
}
Error selective_scan_bwd(const SelectiveScanBwdParams& params, const Launch& launch) {
  return dispatch(params, launch, selective_scan_bwd_of<__nv_bfloat16>, selective_scan_bwd_of<__half>,
                  selective_scan_bwd_of<float>);
}

Error selective_scan_step(const SelectiveScanStepParams& params, const Launch& launch) {
  return dispatch(params, launch, selective_scan_step_of<__nv_bfloat16>, selective_scan_step_of<__half>,
                  selective_scan_step_of<float>);
}

}  // namespace remora
