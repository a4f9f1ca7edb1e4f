#include "recurrence/simple_gla/step_kernel.cuh"

namespace remora {

template cudaError_t launch_step<__nv_bfloat16>(const SimpleGlaStepParams&, cudaStream_t);

}  // namespace remora
