// Entry points of weighted bags. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include "common/launch.h"
#include "pkm/memory_bag/params.h"

namespace remora {

int64_t slot_plan_workspace(const SlotPlanParams& params);
Error slot_plan(const SlotPlanParams& params, const Launch& launch);

Error memory_bag_fwd(const MemoryBagFwdParams& params, const Launch& launch);
Error memory_bag_bwd_weights(const MemoryBagWeightsParams& params, const Launch& launch);

int64_t memory_bag_bwd_workspace(const MemoryBagBwdParams& params);
Error memory_bag_bwd(const MemoryBagBwdParams& params, const Launch& launch);

Error peer_bag_fwd(const PeerBagFwdParams& params, const Launch& launch);
/// The gradient of the table follows from two calls of memory_bag_bwd.
Error peer_bag_bwd(const PeerBagBwdParams& params, const Launch& launch);

}  // namespace remora
