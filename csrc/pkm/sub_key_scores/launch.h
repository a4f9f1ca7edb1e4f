// Entry points of the scores of chosen sub-keys. cpu.cpp and launch.cu each define all of them; a library links one of
// the two.
#pragma once
#include "common/launch.h"
#include "pkm/sub_key_scores/params.h"

namespace remora {

Error sub_key_scores_fwd(const SubKeyScoresParams& params, const Launch& launch);

int64_t sub_key_scores_workspace(const SubKeyScoresParams& params);
Error sub_key_scores_bwd(const SubKeyScoresParams& params, const Launch& launch);

}  // namespace remora
