// Picks the kernels for the processor and the dtype, and hands their tasks to threads. A task writes what no other task
// writes and sums in its own order, so results do not depend on the number of threads.
#include "recurrence/gated_delta_rule/cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/cpu/tasks.h"
#include "recurrence/gated_delta_rule/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of gated_delta_rule";

RecurrenceSequence step_sequence(const GatedDeltaRuleStepParams& params, int64_t n) {
  const RecurrenceShape& shape = params.shape;
  if (!params.memories) return sequence_at(shape, params.cu_seqlens, nullptr, n);
  return {n, n, 1, {n, n / shape.seqlen, n % shape.seqlen}, nullptr};
}

/// Heads of the backward pass are cut along time where there are too few of them and the call is worth two threads.
SequenceTasks bwd_tasks(const GatedDeltaRuleBwdParams& params) {
  const int64_t max_parts = tasks_per_thread(params.shape, 2) == 1 ? INT64_MAX : 1;
  return {params.shape, params.cu_seqlens, params.rows, params.shape.num_heads, max_parts, kStateInterval};
}

int64_t bytes_per_cut(const GatedDeltaRuleBwdParams& params) {
  const RecurrenceShape& shape = params.shape;
  return shape.num_value_heads * shape.head_dim * shape.value_dim * size_of(params.state_dtype);
}

/// Gradient of the state [HV, K, V] at the cut behind a task, in the workspace.
char* d_state_behind(const GatedDeltaRuleBwdParams& params, const SequenceTasks& tasks, int64_t task) {
  return static_cast<char*>(params.workspace) + tasks.cut_behind(task) * bytes_per_cut(params);
}

/// The gradient of the state at all cuts, into the workspace.
bool run_bwd_cuts(const GatedDeltaRuleBwdParams& params, const Launch& launch, const SequenceTasks& tasks) {
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  std::vector<int64_t> first_parts;  // of the sequences with cuts: the longest ones, so they stand first
  for (int64_t i = 0; i < tasks.count() && tasks[i].parts > 1; i += shape.num_heads * tasks[i].parts) {
    first_parts.push_back(i);
  }
  const int64_t columns = (shape.value_dim + kGatedDeltaRuleColumns - 1) / kGatedDeltaRuleColumns;
  const int64_t heads = std::ssize(first_parts) * shape.num_value_heads;
  const int64_t shares = std::clamp<int64_t>((hardware_threads() + heads - 1) / heads, 1, columns);
  const auto run = [&](int64_t i, void* scratch) {
    const int64_t share = i % shares, value_head = i / shares % shape.num_value_heads;
    const int64_t first = first_parts[i / shares / shape.num_value_heads];
    kernels.bwd_cuts(params, tasks[first].sequence, value_head,
                     {columns * share / shares, columns * (share + 1) / shares}, tasks[first].parts,
                     d_state_behind(params, tasks, first), scratch);
  };
  return run_tasks(launch.parallel_for, heads * shares, 1, kernels.bwd_cuts_scratch(shape), run);
}

}  // namespace

int64_t gated_delta_rule_fwd_workspace(const GatedDeltaRuleFwdParams&, const Launch&) { return 0; }

Error gated_delta_rule_fwd(const GatedDeltaRuleFwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const GatedDeltaRuleFwdParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  zero_uncovered(params.o, shape.num_value_heads * shape.value_dim * size_of(params.dtype), shape, params.cu_seqlens,
                 params.rows);

  // Heads are split by columns only where there are too few of them: every part repeats the products of q and k.
  const int64_t columns = (shape.value_dim + kGatedDeltaRuleColumns - 1) / kGatedDeltaRuleColumns;
  const SequenceTasks tasks(shape, params.cu_seqlens, params.rows, shape.num_value_heads, columns);
  const bool ok =
      run_tasks(launch.parallel_for, tasks.count(), tasks_per_thread(shape, tasks.count()), kernels.fwd_scratch(shape),
                [&](int64_t i, void* scratch) {
                  const auto [sequence, head, part, parts] = tasks[i];
                  kernels.fwd(params, sequence, head, {columns * part / parts, columns * (part + 1) / parts}, scratch);
                });
  return ok ? nullptr : kNoMemory;
}

int64_t gated_delta_rule_bwd_workspace(const GatedDeltaRuleBwdParams& given, const Launch&) {
  std::vector<int32_t> offsets;
  const GatedDeltaRuleBwdParams params = with_rising_offsets(given, given.shape, offsets);
  return bwd_tasks(params).cuts() * bytes_per_cut(params);
}

Error gated_delta_rule_bwd(const GatedDeltaRuleBwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const GatedDeltaRuleBwdParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  const int64_t key_bytes = shape.num_heads * shape.head_dim * size_of(params.dtype);
  const int64_t gate_bytes = shape.num_value_heads * size_of(params.state_dtype);
  const auto zero = [&](void* data, int64_t row_bytes) {
    zero_uncovered(data, row_bytes, shape, params.cu_seqlens, params.rows);
  };
  zero(params.dq, key_bytes);
  zero(params.dk, key_bytes);
  zero(params.dv, shape.num_value_heads * shape.value_dim * size_of(params.dtype));
  zero(params.dg, gate_bytes);
  zero(params.dbeta, gate_bytes);

  const SequenceTasks tasks = bwd_tasks(params);
  if (tasks.cuts() > 0 && !run_bwd_cuts(params, launch, tasks)) return kNoMemory;
  const bool ok = run_tasks(launch.parallel_for, tasks.count(), tasks_per_thread(shape, tasks.count()),
                            kernels.bwd_scratch(shape), [&](int64_t i, void* scratch) {
                              const SequenceTask task = tasks[i];
                              kernels.bwd(params, task.sequence, task.head, {task.part, task.parts},
                                          d_state_behind(params, tasks, i), scratch);
                            });
  return ok ? nullptr : kNoMemory;
}

Error gated_delta_rule_step(const GatedDeltaRuleStepParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const GatedDeltaRuleStepParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const GatedDeltaRuleCpuKernels& kernels = gated_delta_rule_kernels(params.dtype);
  const int64_t row_bytes = shape.num_value_heads * shape.value_dim * size_of(params.dtype);
  zero_uncovered(params.o, row_bytes, shape, params.cu_seqlens, nullptr);

  const int64_t tasks = shape.num_seqs * shape.num_value_heads;
  const bool ok = run_tasks(
      launch.parallel_for, tasks, tasks_per_thread(shape, tasks), kernels.step_scratch(shape),
      [&](int64_t task, void* scratch) {
        const int64_t n = task / shape.num_value_heads, value_head = task % shape.num_value_heads;
        const RecurrenceSequence sequence = step_sequence(params, n);
        const int64_t slot =
            step_slot(shape, params.state_indices, params.memories, params.num_memories, params.num_slots, n);
        if (slot < 0) {
          const int64_t head_bytes = shape.value_dim * size_of(params.dtype);
          for (int64_t t = 0; t < sequence.length; ++t) {
            std::memset(static_cast<char*>(params.o) + sequence.at(shape, t).row * row_bytes + value_head * head_bytes,
                        0, head_bytes);
          }
          return;
        }
        kernels.step(params, sequence, value_head, slot, scratch);
      });
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
