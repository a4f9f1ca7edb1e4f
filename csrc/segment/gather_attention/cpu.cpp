// Hands runs of tokens of a unit of heads, and blocks of keys, to threads; each result has one owner.
#include "segment/gather_attention/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "segment/gather_attention/launch.h"

namespace remora {
namespace {

constexpr Error kOutOfMemory = "gather_attention: out of memory";
constexpr int64_t kRunTokens = 16;  // of a task: neighbours choose much the same blocks

/// Multiply-adds of the forward pass.
int64_t work_of(const GatherAttentionInputs& in) { return in.num_lookups() * in.list_heads() * in.block * in.dim * 2; }

int64_t grain_of(int64_t num_tasks, int64_t work) {
  constexpr int64_t kMinWorkPerThread = 1 << 18;
  return std::max<int64_t>(1, kMinWorkPerThread * num_tasks / std::max<int64_t>(1, work));
}

/// Runs body(b, t, unit, scratch) for all tokens; the units of a key head stand together in time.
template <class Body>
bool run_queries(const GatherAttentionInputs& in, const Launch& launch, int64_t scratch, const Body& body) {
  const int64_t runs = (in.packed.seqlen + kRunTokens - 1) / kRunTokens;
  const int64_t num_tasks = in.packed.batch * in.num_units() * runs;
  return run_tasks(launch.parallel_for, num_tasks, grain_of(num_tasks, work_of(in)), scratch,
                   [&](int64_t task, void* buffer) {
                     const int64_t first = task % runs * kRunTokens, unit = task / runs % in.num_units();
                     const int64_t b = task / runs / in.num_units();
                     for (int64_t t = first; t < std::min(first + kRunTokens, in.packed.seqlen); ++t) {
                       body(b, t, unit, buffer);
                     }
                   });
}

}  // namespace

Error gather_attention_fwd(const GatherAttentionFwdParams& params, const Launch& launch) {
  const GatherAttentionCpuKernels& kernels = gather_attention_kernels(params.in.dtype);
  const bool done =
      run_queries(params.in, launch, kernels.query_scratch(params.in),
                  [&](int64_t b, int64_t t, int64_t unit, void* scratch) { kernels.fwd(params, b, t, unit, scratch); });
  return done ? nullptr : kOutOfMemory;
}

int64_t gather_attention_bwd_workspace(const GatherAttentionBwdParams& params) {
  return gather_attention_kernels(params.in.dtype).workspace(params);
}

Error gather_attention_bwd(const GatherAttentionBwdParams& params, const Launch& launch) {
  const GatherAttentionInputs& in = params.in;
  const GatherAttentionCpuKernels& kernels = gather_attention_kernels(in.dtype);
  const bool has_queries = run_queries(
      in, launch, kernels.query_scratch(in),
      [&](int64_t b, int64_t t, int64_t unit, void* scratch) { kernels.bwd_query(params, b, t, unit, scratch); });
  if (!has_queries) return kOutOfMemory;
  const int64_t num_tasks = params.max_rows * in.heads_of_row();
  const bool done = run_tasks(launch.parallel_for, num_tasks, grain_of(num_tasks, 2 * work_of(in)),
                              kernels.keys_scratch(in), [&](int64_t task, void* scratch) {
                                kernels.bwd_keys(params, task / in.heads_of_row(), task % in.heads_of_row(), scratch);
                              });
  return done ? nullptr : kOutOfMemory;
}

}  // namespace remora
