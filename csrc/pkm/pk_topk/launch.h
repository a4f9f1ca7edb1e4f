// Entry points of the product-key selection. cpu.cpp and launch.cu each define all of them; a library links one of the
// two.
#pragma once
#include "common/launch.h"
#include "pkm/pk_topk/params.h"

namespace remora {

int64_t pk_topk_workspace(const PkTopkParams& params);
Error pk_topk(const PkTopkParams& params, const Launch& launch);

Error pk_select_bwd(const PkSelectBwdParams& params, const Launch& launch);

}  // namespace remora
