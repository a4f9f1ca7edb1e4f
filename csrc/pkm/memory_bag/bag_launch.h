// Launches of the bag kernels for one element type; one .cu file each, so that they compile in parallel.
#pragma once
#include "common/launch.h"
#include "pkm/memory_bag/params.h"

namespace remora {

template <typename T>
struct BagKernels {
  static Error fwd(const MemoryBagFwdParams& params, const Launch& launch);
  static Error bwd_weights(const MemoryBagWeightsParams& params, const Launch& launch);
  static Error bwd(const MemoryBagBwdParams& params, const Launch& launch);
  static Error peer_fwd(const PeerBagFwdParams& params, const Launch& launch);
  static Error peer_bwd(const PeerBagBwdParams& params, const Launch& launch);
};

}  // namespace remora
