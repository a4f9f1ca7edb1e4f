// Entry points of segment pooling. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include "common/launch.h"
#include "segment/segment_pool/params.h"

namespace remora {

Error segment_pool_fwd(const SegmentPoolFwdParams& params, const Launch& launch);
Error segment_pool_bwd(const SegmentPoolBwdParams& params, const Launch& launch);

}  // namespace remora
