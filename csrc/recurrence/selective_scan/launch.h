// Entry points of the selective scan. cpu.cpp and launch.cu each define all of them; a library links one of the two.
#pragma once
#include <cstdint>

#include "common/launch.h"
#include "recurrence/selective_scan/params.h"

namespace remora {

int64_t selective_scan_fwd_workspace(const SelectiveScanFwdParams& params);
Error selective_scan_fwd(const SelectiveScanFwdParams& params, const Launch& launch);

int64_t selective_scan_bwd_workspace(const SelectiveScanBwdParams& params);
Error selective_scan_bwd(const SelectiveScanBwdParams& params, const Launch& launch);

Error selective_scan_step(const SelectiveScanStepParams& params, const Launch& launch);

}  // namespace remora
