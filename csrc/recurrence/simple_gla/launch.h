// Entry points of linear attention with scalar decay. cpu.cpp and launch.cu each define all of them; a library links
// one of the two.
#pragma once
#include <cstdint>

#include "common/launch.h"
#include "recurrence/simple_gla/params.h"

namespace remora {

int64_t simple_gla_fwd_workspace(const SimpleGlaFwdParams& params, const Launch& launch);
Error simple_gla_fwd(const SimpleGlaFwdParams& params, const Launch& launch);

int64_t simple_gla_bwd_workspace(const SimpleGlaBwdParams& params, const Launch& launch);
Error simple_gla_bwd(const SimpleGlaBwdParams& params, const Launch& launch);

Error simple_gla_step(const SimpleGlaStepParams& params, const Launch& launch);

}  // namespace remora
