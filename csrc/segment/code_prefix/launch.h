// Entry points of the running sums of values per code. cpu.cpp and launch.cu each define all of them; a library links
// one of the two.
#pragma once
#include "common/launch.h"
#include "segment/code_prefix/params.h"

namespace remora {

Error code_prefix_fwd(const CodePrefixFwdParams& params, const Launch& launch);
Error code_prefix_bwd(const CodePrefixBwdParams& params, const Launch& launch);

}  // namespace remora
