#include "recurrence/simple_gla/walk_kernel.cuh"

namespace remora {

template cudaError_t launch_walk<float>(const WalkParams&, int, bool, bool, int, cudaStream_t);

}  // namespace remora
