// Entry points of attention to chosen blocks. cpu.cpp and launch.cu each define all of them; a library links one of the
// two.
#pragma once
#include "common/launch.h"
#include "segment/gather_attention/params.h"

namespace remora {

Error gather_attention_fwd(const GatherAttentionFwdParams& params, const Launch& launch);

int64_t gather_attention_bwd_workspace(const GatherAttentionBwdParams& params);
Error gather_attention_bwd(const GatherAttentionBwdParams& params, const Launch& launch);

}  // namespace remora
