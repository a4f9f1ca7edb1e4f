// Hands blocks of tokens of a head to threads; a token's results depend on no other token.
#include "pkm/pk_topk/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "pkm/pk_topk/launch.h"

namespace remora {

int64_t pk_topk_workspace(const PkTopkParams& params) {
  return params.sub_scores ? 0 : pk_topk_kernels(params.dtype).workspace(params);
}

Error pk_topk(const PkTopkParams& params, const Launch& launch) {
  const PkTopkCpuKernels& kernels = pk_topk_kernels(params.dtype);
  const int64_t block_tokens = kernels.block_tokens(params);
  const int64_t num_blocks = (params.tokens + block_tokens - 1) / block_tokens;
  // Few tokens: who packs the sub-keys of a head selects from them, out of its own cache.
  const bool packs_first = !params.sub_scores && num_blocks > 1, packs_own = !params.sub_scores && num_blocks == 1;
  if (packs_first) {
    launch.parallel_for(2 * params.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t axis = begin; axis < end; ++axis) kernels.pack(params, axis);
    });
  }
  // Heads outermost: the packed sub-keys of a head stay in the cache.
  const bool done = run_tasks(launch.parallel_for, num_blocks * params.heads, 1, kernels.scratch(params),
                              [&](int64_t task, void* scratch) {
                                const int64_t head = task / num_blocks;
                                for (int64_t axis = 2 * head; packs_own && axis < 2 * head + 2; ++axis)
                                  kernels.pack(params, axis);
                                kernels.select(params, head, task % num_blocks * block_tokens, scratch);
                              });
  return done ? nullptr : "pk_topk: out of memory";
}

Error pk_select_bwd(const PkSelectBwdParams& params, const Launch& launch) {
  constexpr int64_t kMinWorkPerThread = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kMinWorkPerThread / (2 * params.num_keys + 2 * params.topk));
  launch.parallel_for(params.tokens * params.heads, grain, [&](int64_t begin, int64_t end) {
    pk_topk_kernels(params.dtype).select_bwd(params, begin, end);
  });
  return nullptr;
}

}  // namespace remora
