// Entry points of the causal convolution. cpu.cpp and launch.cu each define all of them; a library links one of the
// two.
#pragma once
#include <cstdint>

#include "common/launch.h"
#include "recurrence/causal_conv1d/params.h"

namespace remora {

Error causal_conv1d_fwd(const CausalConv1dFwdParams& params, const Launch& launch);

int64_t causal_conv1d_bwd_workspace(const CausalConv1dBwdParams& params);
Error causal_conv1d_bwd(const CausalConv1dBwdParams& params, const Launch& launch);

Error causal_conv1d_step(const CausalConv1dStepParams& params, const Launch& launch);

}  // namespace remora
