#include "recurrence/gated_delta_rule/step_launch_impl.cuh"

namespace remora {

template cudaError_t launch_step<float>(const StepKernelParams&, cudaStream_t);

}  // namespace remora
