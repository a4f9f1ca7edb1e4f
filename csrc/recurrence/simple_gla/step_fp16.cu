#include "recurrence/simple_gla/step_kernel.cuh"

namespace remora {

template cudaError_t launch_step<__half>(const SimpleGlaStepParams&, cudaStream_t);

}  // namespace remora
