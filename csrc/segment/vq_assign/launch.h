// Entry points of the assignment to codes. cpu.cpp and launch.cu each define all of them; a library links one of the
// two.
#pragma once
#include "common/launch.h"
#include "segment/vq_assign/params.h"

namespace remora {

int64_t vq_assign_workspace(const VqAssignParams& params);
Error vq_assign(const VqAssignParams& params, const Launch& launch);

}  // namespace remora
