// Entry point of the bilinear selection. cpu.cpp and launch.cu each define it; a library links one of the two.
#pragma once
#include "common/launch.h"
#include "pkm/tucker_select/params.h"

namespace remora {

Error tucker_select(const TuckerSelectParams& params, const Launch& launch);

}  // namespace remora
