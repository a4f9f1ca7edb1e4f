// Picks the kernels for the processor and the dtype, and hands their tasks to threads. A task writes what no other task
// writes and sums in its own order, so results do not depend on the number of threads.
#include "recurrence/simple_gla/cpu.h"

#include <algorithm>
#include <cstring>

#include "common/cpu/tasks.h"
#include "recurrence/simple_gla/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of simple_gla";

SimpleGlaUnits units_of(const SequenceTask& task, int64_t units) {
  return {units * task.part / task.parts, units * (task.part + 1) / task.parts};
}

RecurrenceSequence step_sequence(const SimpleGlaStepParams& params, int64_t n) {
  const RecurrenceShape& shape = params.shape;
  if (!params.memories) return sequence_at(shape, params.cu_seqlens, nullptr, n);
  return {n, n, 1, {n, n / shape.seqlen, n % shape.seqlen}, nullptr};
}

/// dg from the shares of the units of K, in their order.
template <class T>
void sum_shares(const SimpleGlaBwdParams& params, const Launch& launch) {
  const RecurrenceShape& shape = params.shape;
  const int64_t size = shape.batch * shape.seqlen * shape.num_value_heads, units = simple_gla_units(shape.head_dim);
  launch.parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {
    T* dg = static_cast<T*>(params.dg);
    const T* share = static_cast<const T*>(params.workspace);
    std::copy(share + begin, share + end, dg + begin);
    for (int64_t unit = 1; unit < units; ++unit) {
      for (int64_t i = begin; i < end; ++i) dg[i] += share[unit * size + i];
    }
  });
}

}  // namespace

int64_t simple_gla_fwd_workspace(const SimpleGlaFwdParams&, const Launch&) { return 0; }

Error simple_gla_fwd(const SimpleGlaFwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const SimpleGlaFwdParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const SimpleGlaCpuKernels& kernels = simple_gla_kernels(params.dtype);
  zero_uncovered(params.o, shape.num_value_heads * shape.value_dim * size_of(params.dtype), shape, params.cu_seqlens,
                 params.rows);

  // Heads are split by columns only where there are too few of them: every part repeats the products of q and k.
  const int64_t units = simple_gla_units(shape.value_dim);
  const SequenceTasks tasks(shape, params.cu_seqlens, params.rows, shape.num_value_heads, units);
  const bool ok = run_tasks(launch.parallel_for, tasks.count(), tasks_per_thread(shape, tasks.count()),
                            kernels.values_scratch(shape), [&](int64_t i, void* scratch) {
                              const SequenceTask task = tasks[i];
                              kernels.fwd(params, task.sequence, task.head, units_of(task, units), scratch);
                            });
  return ok ? nullptr : kNoMemory;
}

int64_t simple_gla_bwd_workspace(const SimpleGlaBwdParams& params, const Launch&) {
  const RecurrenceShape& shape = params.shape;
  if (!params.dg) return 0;
  return simple_gla_units(shape.head_dim) * shape.batch * shape.seqlen * shape.num_value_heads *
         size_of(params.state_dtype);
}

Error simple_gla_bwd(const SimpleGlaBwdParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const SimpleGlaBwdParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const SimpleGlaCpuKernels& kernels = simple_gla_kernels(params.dtype);
  const auto zero = [&](void* data, int64_t row_bytes) {
    zero_uncovered(data, row_bytes, shape, params.cu_seqlens, params.rows);
  };
  zero(params.dq, shape.num_heads * shape.head_dim * size_of(params.dtype));
  zero(params.dk, shape.num_heads * shape.head_dim * size_of(params.dtype));
  zero(params.dv, shape.num_value_heads * shape.value_dim * size_of(params.dtype));

  // The walks over K do more than those over V and come first.
  const int64_t key_units = simple_gla_units(shape.head_dim), value_units = simple_gla_units(shape.value_dim);
  const SequenceTasks keys(shape, params.cu_seqlens, params.rows, shape.num_heads, key_units);
  const SequenceTasks values(shape, params.cu_seqlens, params.rows, shape.num_value_heads, value_units);
  const int64_t count = keys.count() + values.count();
  const int64_t scratch_bytes = std::max(kernels.keys_scratch(shape), kernels.values_scratch(shape));
  const bool ok = run_tasks(
      launch.parallel_for, count, tasks_per_thread(shape, count), scratch_bytes, [&](int64_t i, void* scratch) {
        if (i < keys.count()) {
          const SequenceTask task = keys[i];
          kernels.bwd_keys(params, task.sequence, task.head, units_of(task, key_units), scratch);
          return;
        }
        const SequenceTask task = values[i - keys.count()];
        kernels.bwd_values(params, task.sequence, task.head, units_of(task, value_units), scratch);
      });
  if (!ok) return kNoMemory;
  if (!params.dg) return nullptr;
  if (params.state_dtype == DType::kFloat64) {
    sum_shares<double>(params, launch);
  } else {
    sum_shares<float>(params, launch);
  }
  zero(params.dg, shape.num_value_heads * size_of(params.state_dtype));
  return nullptr;
}

Error simple_gla_step(const SimpleGlaStepParams& given, const Launch& launch) {
  std::vector<int32_t> offsets;
  const SimpleGlaStepParams params = with_rising_offsets(given, given.shape, offsets);
  const RecurrenceShape& shape = params.shape;
  const SimpleGlaCpuKernels& kernels = simple_gla_kernels(params.dtype);
  const int64_t head_bytes = shape.value_dim * size_of(params.dtype), row_bytes = shape.num_value_heads * head_bytes;
  zero_uncovered(params.o, row_bytes, shape, params.cu_seqlens, nullptr);

  const int64_t tasks = shape.num_seqs * shape.num_value_heads;
  const bool ok = run_tasks(
      launch.parallel_for, tasks, tasks_per_thread(shape, tasks), kernels.step_scratch(shape),
      [&](int64_t task, void* scratch) {
        const int64_t n = task / shape.num_value_heads, value_head = task % shape.num_value_heads;
        const RecurrenceSequence sequence = step_sequence(params, n);
        const int64_t slot =
            step_slot(shape, params.state_indices, params.memories, params.num_memories, params.num_slots, n);
        if (slot >= 0) {
          kernels.step(params, sequence, value_head, slot, scratch);
          return;
        }
        for (int64_t t = 0; t < sequence.length; ++t) {
          std::memset(static_cast<char*>(params.o) + sequence.at(shape, t).row * row_bytes + value_head * head_bytes, 0,
                      head_bytes);
        }
      });
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
