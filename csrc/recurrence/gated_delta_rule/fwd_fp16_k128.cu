#include "recurrence/gated_delta_rule/fwd_launch_impl.cuh"

namespace remora {

template cudaError_t launch_fwd_pass<__half, 128, false>(const FwdKernelParams&, const FwdConfig&, bool, bool,
                                                         cudaStream_t);

}  // namespace remora
