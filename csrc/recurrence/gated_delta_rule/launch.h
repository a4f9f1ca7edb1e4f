// Entry points of the gated delta rule. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include <cstdint>

#include "common/launch.h"
#include "recurrence/gated_delta_rule/params.h"

namespace remora {

int64_t gated_delta_rule_fwd_workspace(const GatedDeltaRuleFwdParams& params, const Launch& launch);
Error gated_delta_rule_fwd(const GatedDeltaRuleFwdParams& params, const Launch& launch);

int64_t gated_delta_rule_bwd_workspace(const GatedDeltaRuleBwdParams& params, const Launch& launch);
Error gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const Launch& launch);

Error gated_delta_rule_step(const GatedDeltaRuleStepParams& params, const Launch& launch);

}  // namespace remora
