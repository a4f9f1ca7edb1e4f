#include "recurrence/gated_delta_rule/fwd_launch_impl.cuh"

namespace remora {

template cudaError_t launch_fwd_pass<__nv_bfloat16, 64, false>(const FwdKernelParams&, const FwdConfig&, bool, bool,
                                                               cudaStream_t);

}  // namespace remora
