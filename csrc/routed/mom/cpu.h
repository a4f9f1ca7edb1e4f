// The kernels of one instruction set, as cpu.cpp calls them, for tokens [begin, end).
#pragma once
#include "common/cpu/isa.h"
#include "routed/mom/params.h"

namespace remora {

/// The losses are sums over blocks of so many tokens, each in the order of its tokens, then over the blocks in order.
constexpr int64_t kLossRows = 256;

constexpr int64_t loss_blocks(const MomRouteParams& params) { return (params.rows + kLossRows - 1) / kLossRows; }

struct MomCpuKernels {
  void (*route_fwd)(const MomRouteParams&, int64_t begin, int64_t end);
  void (*route_partial)(const MomRouteParams&, int64_t block);  // after route_fwd
  void (*route_losses)(const MomRouteParams&);                  // after all blocks
  void (*route_bwd)(const MomRouteParams&, int64_t begin, int64_t end);
  void (*combine_fwd)(const MomCombineParams&, int64_t begin, int64_t end);
  void (*combine_bwd)(const MomCombineParams&, int64_t begin, int64_t end);
};

REMORA_CPU_KERNELS(MomCpuKernels, mom_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
