#include "recurrence/gated_delta_rule/step_kernel.cuh"

namespace remora {

template cudaError_t launch_step<__half>(const GatedDeltaRuleStepParams&, cudaStream_t);

}  // namespace remora
