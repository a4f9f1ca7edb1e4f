// Entry points of prefix attention. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include <cstdint>

#include "common/launch.h"
#include "segment/prefix_attention/params.h"

namespace remora {

int64_t prefix_attention_fwd_workspace(const PrefixAttentionFwdParams& params);
Error prefix_attention_fwd(const PrefixAttentionFwdParams& params, const Launch& launch);

int64_t prefix_attention_bwd_workspace(const PrefixAttentionBwdParams& params);
Error prefix_attention_bwd(const PrefixAttentionBwdParams& params, const Launch& launch);

}  // namespace remora
