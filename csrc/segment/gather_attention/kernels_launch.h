// Launches of the kernels of one dtype; each dtype is a file of its own, so that they compile in parallel.
#pragma once
#include "segment/gather_attention/launch.h"

namespace remora {

constexpr int kGatherLookups = 2048;  // of a piece of a block's lookups (pieces.cuh)

inline int64_t num_gather_losses(const GatherAttentionInputs& in) {
  return in.packed.batch * in.packed.seqlen * in.num_heads * in.num_softmaxes();
}

template <typename T>
struct GatherKernels {
  static Error fwd(const GatherAttentionFwdParams& params, const Launch& launch);
  static Error bwd(const GatherAttentionBwdParams& params, const Launch& launch);
};

}  // namespace remora
