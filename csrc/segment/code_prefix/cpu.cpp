// Hands blocks of channels to threads.
#include "segment/code_prefix/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "segment/code_prefix/launch.h"

namespace remora {
namespace {

/// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 15;

/// At least one block, which also writes the counts.
int64_t channel_blocks(const CodePrefixShape& shape) {
  return std::max<int64_t>(1, (shape.channels + kCodePrefixChannels - 1) / kCodePrefixChannels);
}

template <class Params, class Kernel>
Error run(const Params& params, const Launch& launch, const Kernel& kernel) {
  const CodePrefixShape& shape = params.shape;
  const int64_t blocks = channel_blocks(shape);
  const int64_t elements = kCodePrefixChannels * (shape.tokens + (shape.borders() + 1) * shape.codes);
  const bool ok =
      run_tasks(launch.parallel_for, shape.rows * blocks, std::max<int64_t>(1, kMinElementsPerThread / elements),
                code_prefix_kernels(params.dtype).scratch(shape),
                [&](int64_t task, void* scratch) { kernel(params, task / blocks, task % blocks, scratch); });
  return ok ? nullptr : "out of memory for the scratch buffers of code_prefix_state";
}

}  // namespace

Error code_prefix_fwd(const CodePrefixFwdParams& params, const Launch& launch) {
  return run(params, launch, code_prefix_kernels(params.dtype).fwd);
}

Error code_prefix_bwd(const CodePrefixBwdParams& params, const Launch& launch) {
  return run(params, launch, code_prefix_kernels(params.dtype).bwd);
}

}  // namespace remora
