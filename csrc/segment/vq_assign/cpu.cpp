// Hands panels of codes, then chunks of tokens, to threads.
#include "segment/vq_assign/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "segment/vq_assign/launch.h"

namespace remora {
namespace {

/// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t vq_assign_workspace(const VqAssignParams& params) { return vq_assign_kernels(params.dtype).workspace(params); }

Error vq_assign(const VqAssignParams& params, const Launch& launch) {
  const VqAssignCpuKernels& kernels = vq_assign_kernels(params.dtype);
  const int64_t panels = ceil_div(params.codes, kernels.panel), chunks = ceil_div(params.tokens, kernels.chunk);
  const auto grain = [](int64_t work) { return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work)); };
  bool ok = run_tasks(launch.parallel_for, params.heads * panels, grain(kernels.panel * params.dims * 8), 64,
                      [&](int64_t task, void*) { kernels.pack(params, task / panels, task % panels); });
  ok &= run_tasks(
      launch.parallel_for, params.batch * params.heads * chunks, grain(kernels.chunk * params.codes * params.dims),
      kernels.scratch(params), [&](int64_t task, void* scratch) {
        const int64_t row = task / chunks;
        kernels.assign(params, row / params.heads, row % params.heads, task % chunks * kernels.chunk, scratch);
      });
  return ok ? nullptr : "out of memory for the scratch buffers of vq_assign";
}

}  // namespace remora
