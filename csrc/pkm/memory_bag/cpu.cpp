// Hands tokens, sorted positions and rows to threads; how they are cut depends on sizes alone.
#include "pkm/memory_bag/cpu.h"

#include <algorithm>

#include "common/cpu/huge_pages.h"
#include "common/cpu/tasks.h"
#include "pkm/memory_bag/cpu_plan.h"
#include "pkm/memory_bag/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of memory_bag";

/// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 15;

/// Few tokens are cut into columns, so that a decoding step has work for every thread.
constexpr int64_t kFewTokens = 16, kFewTokensColumns = 256;

/// Rows that one task of the zeroing handles.
constexpr int64_t kZeroRows = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t grain(int64_t work) { return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work)); }

template <class Params>
Error for_tokens(const Params& params, const Launch& launch, void (*kernel)(const Params&, int64_t, void*)) {
  const BagShape& shape = params.shape;
  const bool ok = run_tasks(launch.parallel_for, shape.tokens, grain(shape.lookups * params.row_width()),
                            memory_bag_kernels(shape.dtype).peer_scratch(shape, params.query_width),
                            [&](int64_t token, void* scratch) { kernel(params, token, scratch); });
  return ok ? nullptr : kNoMemory;
}

}  // namespace

int64_t slot_plan_workspace(const SlotPlanParams& params) { return PlanScratch(params, nullptr).bytes; }

Error slot_plan(const SlotPlanParams& params, const Launch& launch) {
  const PlanScratch scratch(params, params.workspace);
  sort_lookups(params, scratch, launch);
  find_segments(params, scratch, launch);
  return nullptr;
}

Error memory_bag_fwd(const MemoryBagFwdParams& params, const Launch& launch) {
  const BagShape& shape = params.shape;
  const MemoryBagCpuKernels& kernels = memory_bag_kernels(shape.dtype);
  const int64_t block = shape.width / shape.heads;
  const int64_t columns = shape.tokens < kFewTokens ? std::min(block, kFewTokensColumns) : block;
  const int64_t num_blocks = ceil_div(block, columns);
  const bool ok =
      run_tasks(launch.parallel_for, shape.tokens * num_blocks, grain(shape.lookups * columns * shape.heads),
                kernels.fwd_scratch(shape), [&](int64_t task, void* scratch) {
                  const int64_t token = task / num_blocks, first = task % num_blocks * columns;
                  kernels.fwd(params, token, token + 1, first, std::min(block, first + columns), scratch);
                });
  return ok ? nullptr : kNoMemory;
}

Error memory_bag_bwd_weights(const MemoryBagWeightsParams& params, const Launch& launch) {
  const BagShape& shape = params.shape;
  launch.parallel_for(shape.tokens, grain(shape.lookups * shape.width), [&](int64_t begin, int64_t end) {
    memory_bag_kernels(shape.dtype).bwd_weights(params, begin, end);
  });
  return nullptr;
}

int64_t memory_bag_bwd_workspace(const MemoryBagBwdParams& params) {
  return 2 * params.num_windows() * params.shape.width * (params.shape.dtype == DType::kFloat64 ? 8 : 4);
}

Error memory_bag_bwd(const MemoryBagBwdParams& params, const Launch& launch) {
  const BagShape& shape = params.shape;
  const MemoryBagCpuKernels& kernels = memory_bag_kernels(shape.dtype);
  constexpr int64_t kTask = 4 * kPieceLookups;
  const bool is_dense = params.kind == RowGradient::kDense;
  const int64_t rows = is_dense ? shape.map.num_rows : params.max_rows;
  if (params.kind != RowGradient::kAccumulate) {
    const int64_t element = is_dense ? size_of(shape.dtype) : shape.dtype == DType::kFloat64 ? 8 : 4;
    prefer_huge_pages(params.d_table, ((rows - 1) * params.d_table_stride + shape.width) * element);
  }
  const bool ok =
      run_tasks(launch.parallel_for, ceil_div(shape.num_lookups(), kTask), grain(kTask * shape.width),
                kernels.bwd_scratch(shape), [&](int64_t task, void* scratch) {
                  kernels.bwd(params, task * kTask, std::min(shape.num_lookups(), (task + 1) * kTask), scratch);
                });
  launch.parallel_for(params.num_windows(), grain(shape.width), [&](int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) kernels.bwd_combine(params, window);
  });
  if (params.kind != RowGradient::kAccumulate) {
    launch.parallel_for(ceil_div(rows, kZeroRows), grain(kZeroRows * shape.width), [&](int64_t begin, int64_t end) {
      kernels.bwd_zero(params, begin * kZeroRows, std::min(rows, end * kZeroRows));
    });
  }
  return ok ? nullptr : kNoMemory;
}

Error peer_bag_fwd(const PeerBagFwdParams& params, const Launch& launch) {
  return for_tokens(params, launch, memory_bag_kernels(params.shape.dtype).peer_fwd);
}

Error peer_bag_bwd(const PeerBagBwdParams& params, const Launch& launch) {
  return for_tokens(params, launch, memory_bag_kernels(params.shape.dtype).peer_bwd);
}

}  // namespace remora
