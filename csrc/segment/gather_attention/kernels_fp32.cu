#include "segment/gather_attention/kernels_launch_impl.cuh"

namespace remora {

template struct GatherKernels<float>;

}  // namespace remora
