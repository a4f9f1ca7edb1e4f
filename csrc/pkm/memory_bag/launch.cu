// CUDA entry points of weighted bags.
#include "pkm/memory_bag/launch.h"

namespace remora {
namespace {

constexpr Error kNoKernels = "memory_bag has no CUDA kernels yet";

}  // namespace

int64_t slot_plan_workspace(const SlotPlanParams&) { return 0; }
Error slot_plan(const SlotPlanParams&, const Launch&) { return kNoKernels; }
Error memory_bag_fwd(const MemoryBagFwdParams&, const Launch&) { return kNoKernels; }
Error memory_bag_bwd_weights(const MemoryBagWeightsParams&, const Launch&) { return kNoKernels; }
int64_t memory_bag_bwd_workspace(const MemoryBagBwdParams&) { return 0; }
Error memory_bag_bwd(const MemoryBagBwdParams&, const Launch&) { return kNoKernels; }

}  // namespace remora
