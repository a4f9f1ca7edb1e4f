// Launches of one element type, instantiated by launch_<type>.cu.
#pragma once
#include "segment/segment_pool/launch.h"

namespace remora {

template <typename T>
Error segment_pool_fwd_of(const SegmentPoolFwdParams& params, const Launch& launch);
template <typename T>
Error segment_pool_bwd_of(const SegmentPoolBwdParams& params, const Launch& launch);

}  // namespace remora
