// Hands rows to threads; a row's result depends on no other.
#include "pkm/tucker_select/cpu.h"

#include "common/cpu/tasks.h"
#include "pkm/tucker_select/launch.h"

namespace remora {

Error tucker_select(const TuckerSelectParams& params, const Launch& launch) {
  const TuckerSelectCpuKernels& kernels = tucker_select_kernels(params.dtype);
  const bool done = run_tasks(launch.parallel_for, params.tokens * params.heads, 1, kernels.scratch(params),
                              [&](int64_t row, void* scratch) { kernels.select(params, row, scratch); });
  return done ? nullptr : "tucker_select: out of memory";
}

}  // namespace remora
