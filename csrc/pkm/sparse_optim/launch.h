// Entry points of the sparse optimizers. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include "common/launch.h"
#include "pkm/sparse_optim/params.h"

namespace remora {

Error sparse_update(const SparseUpdateParams& params, const Launch& launch);

int64_t row_norm_workspace(const RowNormParams& params);
Error row_norm(const RowNormParams& params, const Launch& launch);

}  // namespace remora
