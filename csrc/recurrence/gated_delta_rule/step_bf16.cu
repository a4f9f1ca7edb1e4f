#include "recurrence/gated_delta_rule/step_kernel.cuh"

namespace remora {

template cudaError_t launch_step<__nv_bfloat16>(const GatedDeltaRuleStepParams&, cudaStream_t);

}  // namespace remora
