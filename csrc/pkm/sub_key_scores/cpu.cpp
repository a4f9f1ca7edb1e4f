// Hands rows, and for the gradient of the sub-keys blocks of sub-keys, to threads. Every sum has one owner and a fixed
// order, tokens ascending.
#include "pkm/sub_key_scores/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "pkm/sub_key_scores/launch.h"

namespace remora {
namespace {

constexpr Error kOutOfMemory = "sub_key_scores: out of memory";
constexpr int64_t kBlockRows = 64;  // of a task

/// Runs body(row, scratch) for all rows.
template <class Body>
bool run_rows(const SubKeyScoresParams& params, const Launch& launch, int64_t scratch_bytes, const Body& body) {
  const int64_t num_rows = params.tokens * params.groups;
  const auto run_block = [&](int64_t block, void* scratch) {
    const int64_t end = std::min(num_rows, (block + 1) * kBlockRows);
    for (int64_t row = block * kBlockRows; row < end; ++row) body(row, scratch);
  };
  return run_tasks(launch.parallel_for, (num_rows + kBlockRows - 1) / kBlockRows, 1, scratch_bytes, run_block);
}

}  // namespace

Error sub_key_scores_fwd(const SubKeyScoresParams& params, const Launch& launch) {
  const SubKeyScoresCpuKernels& kernels = sub_key_scores_kernels(params.dtype);
  const bool done = run_rows(params, launch, kernels.query_scratch(params),
                             [&](int64_t row, void* scratch) { kernels.fwd(params, row, scratch); });
  return done ? nullptr : kOutOfMemory;
}

int64_t sub_key_scores_workspace(const SubKeyScoresParams& params) {
  return sub_key_scores_kernels(params.dtype).workspace(params);
}

Error sub_key_scores_bwd(const SubKeyScoresParams& params, const Launch& launch) {
  const SubKeyScoresCpuKernels& kernels = sub_key_scores_kernels(params.dtype);
  const bool has_entries = run_rows(params, launch, kernels.query_scratch(params),
                                    [&](int64_t row, void* scratch) { kernels.bwd_query(params, row, scratch); });
  if (!has_entries) return kOutOfMemory;
  const int64_t block_keys = kernels.block_keys(params);
  const int64_t num_blocks = (params.num_keys + block_keys - 1) / block_keys;
  const bool done = run_tasks(launch.parallel_for, num_blocks * params.groups, 1, kernels.keys_scratch(params),
                              [&](int64_t task, void* scratch) {
                                kernels.bwd_keys(params, task / num_blocks, task % num_blocks * block_keys, scratch);
                              });
  return done ? nullptr : kOutOfMemory;
}

}  // namespace remora
