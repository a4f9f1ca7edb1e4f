// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "recurrence/cpu_sequence.h"
#include "recurrence/simple_gla/params.h"

namespace remora {

/// Columns of V, or features of K, in units of kSimpleGlaUnit: the parts a head can be cut into.
struct SimpleGlaUnits {
  int64_t begin, end;
};
constexpr int64_t kSimpleGlaUnit = 32;

constexpr int64_t simple_gla_units(int64_t dim) { return (dim + kSimpleGlaUnit - 1) / kSimpleGlaUnit; }

struct SimpleGlaCpuKernels {
  int64_t (*values_scratch)(const RecurrenceShape&);  // bytes per thread
  /// o, final_state and saved_states of some value columns.
  void (*fwd)(const SimpleGlaFwdParams&, const RecurrenceSequence&, int64_t value_head, SimpleGlaUnits, void* scratch);
  /// dv and d_initial_state of some value columns.
  void (*bwd_values)(const SimpleGlaBwdParams&, const RecurrenceSequence&, int64_t value_head, SimpleGlaUnits,
                     void* scratch);
  int64_t (*keys_scratch)(const RecurrenceShape&);
  /// dq and dk of some features, and their shares of dg in the workspace, [units of K, B, T, HV].
  void (*bwd_keys)(const SimpleGlaBwdParams&, const RecurrenceSequence&, int64_t head, SimpleGlaUnits, void* scratch);
  int64_t (*step_scratch)(const RecurrenceShape&);
  void (*step)(const SimpleGlaStepParams&, const RecurrenceSequence&, int64_t value_head, int64_t slot, void* scratch);
};

REMORA_CPU_KERNELS(SimpleGlaCpuKernels, simple_gla_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
