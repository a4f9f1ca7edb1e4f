#include "recurrence/gated_delta_rule/step_launch_impl.cuh"

namespace remora {

template cudaError_t launch_step<__half>(const StepKernelParams&, cudaStream_t);

}  // namespace remora
