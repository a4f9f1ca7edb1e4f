// Entry points of Mixture-of-Memories. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include "common/launch.h"
#include "routed/mom/params.h"

namespace remora {

int64_t mom_route_workspace(const MomRouteParams& params);
Error mom_route_fwd(const MomRouteParams& params, const Launch& launch);
Error mom_route_bwd(const MomRouteParams& params, const Launch& launch);

int64_t route_plan_workspace(const RoutePlanParams& params);
Error route_plan(const RoutePlanParams& params, const Launch& launch);

Error mom_combine_fwd(const MomCombineParams& params, const Launch& launch);
Error mom_combine_bwd(const MomCombineParams& params, const Launch& launch);

}  // namespace remora
