#include "recurrence/gated_delta_rule/step_launch_impl.cuh"

namespace remora {

template cudaError_t launch_step<__nv_bfloat16>(const StepKernelParams&, cudaStream_t);

}  // namespace remora
