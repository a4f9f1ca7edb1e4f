#include "pkm/memory_bag/bag_launch_impl.cuh"

namespace remora {

template struct BagKernels<__half>;

}  // namespace remora
