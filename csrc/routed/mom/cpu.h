// The kernels of one instruction set, as cpu.cpp calls them, for tokens [begin, end).
#pragma once
#include "common/cpu/isa.h"
#include "routed/mom/params.h"

namespace remora {

struct MomCpuKernels {
  void (*route_fwd)(const MomRouteParams&, int64_t begin, int64_t end);
  void (*route_losses)(const MomRouteParams&);  // of all tokens, after route_fwd
  void (*route_bwd)(const MomRouteParams&, int64_t begin, int64_t end);
  void (*combine_fwd)(const MomCombineParams&, int64_t begin, int64_t end);
  void (*combine_bwd)(const MomCombineParams&, int64_t begin, int64_t end);
};

REMORA_CPU_KERNELS(MomCpuKernels, mom_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
