// Picks the kernels for the processor and the dtype, and hands their tasks to threads. A task writes what no other task
// writes and sums in its own order, so results do not depend on the number of threads.
#include "recurrence/gated_delta_rule/cpu.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "common/cpu/tasks.h"
#include "recurrence/gated_delta_rule/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of gated_delta_rule";

}  // namespace

int64_t gated_delta_rule_fwd_workspace(const GatedDeltaRuleFwdParams&, const Launch&) { return 0; }

Error gated_delta_rule_fwd(const GatedDeltaRuleFwdParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  zero_uncovered(params.o, shape.num_value_heads * shape.value_dim * size_of(params.dtype), shape, params.cu_seqlens);

  // Heads are split by columns only where there are too few of them: every part repeats the products of q and k.
  const int64_t heads = shape.num_seqs * shape.num_value_heads;
  if (heads == 0) return nullptr;
  const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t columns = (shape.value_dim + kGatedDeltaRuleColumns - 1) / kGatedDeltaRuleColumns;
  const int64_t parts = std::min(columns, (threads + heads - 1) / heads);
  const bool ok = run_tasks(launch.parallel_for, heads * parts, tasks_per_thread(shape, heads * parts),
                            kernels.fwd_scratch(shape), [&](int64_t task, void* scratch) {
                              const int64_t part = task % parts, head = task / parts;
                              kernels.fwd(params, sequence_at(shape, params.cu_seqlens, head / shape.num_value_heads),
                                          head % shape.num_value_heads,
                                          {columns * part / parts, columns * (part + 1) / parts}, scratch);
                            });
  return ok ? nullptr : kNoMemory;
}

int64_t gated_delta_rule_bwd_workspace(const GatedDeltaRuleBwdParams&, const Launch&) { return 0; }

Error gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  const int64_t key_bytes = shape.num_heads * shape.head_dim * size_of(params.dtype);
  const int64_t gate_bytes = shape.num_value_heads * size_of(params.state_dtype);
  zero_uncovered(params.dq, key_bytes, shape, params.cu_seqlens);
  zero_uncovered(params.dk, key_bytes, shape, params.cu_seqlens);
  zero_uncovered(params.dv, shape.num_value_heads * shape.value_dim * size_of(params.dtype), shape, params.cu_seqlens);
  zero_uncovered(params.dg, gate_bytes, shape, params.cu_seqlens);
  zero_uncovered(params.dbeta, gate_bytes, shape, params.cu_seqlens);

  const int64_t tasks = shape.num_seqs * shape.num_heads;
  if (tasks == 0) return nullptr;
  const bool ok = run_tasks(launch.parallel_for, tasks, tasks_per_thread(shape, tasks), kernels.bwd_scratch(shape),
                            [&](int64_t task, void* scratch) {
                              kernels.bwd(params, sequence_at(shape, params.cu_seqlens, task / shape.num_heads),
                                          task % shape.num_heads, scratch);
                            });
  return ok ? nullptr : kNoMemory;
}

Error gated_delta_rule_step(const GatedDeltaRuleStepParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  const int64_t row_bytes = shape.num_value_heads * shape.value_dim * size_of(params.dtype);
  zero_uncovered(params.o, row_bytes, shape, params.cu_seqlens);

  const int64_t tasks = shape.num_seqs * shape.num_value_heads;
  if (tasks == 0) return nullptr;
  const bool ok = run_tasks(
      launch.parallel_for, tasks, tasks_per_thread(shape, tasks), kernels.step_scratch(shape),
      [&](int64_t task, void* scratch) {
        const int64_t n = task / shape.num_value_heads, value_head = task % shape.num_value_heads;
        const RecurrenceSequence sequence = sequence_at(shape, params.cu_seqlens, n);
        const int64_t slot = params.state_indices ? params.state_indices[n] : n;
        if (params.state_indices && (slot < 0 || slot >= params.num_slots)) {
          const int64_t head_bytes = shape.value_dim * size_of(params.dtype);
          for (int64_t t = 0; t < sequence.length; ++t) {
            std::memset(static_cast<char*>(params.o) + sequence.row(shape, t) * row_bytes + value_head * head_bytes, 0,
                        head_bytes);
          }
          return;
        }
        kernels.step(params, sequence, value_head, slot, scratch);
      });
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
