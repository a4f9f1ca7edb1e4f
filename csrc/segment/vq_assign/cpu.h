// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "segment/vq_assign/params.h"

namespace remora {

struct VqAssignCpuKernels {
  int64_t chunk;  // tokens of a task
  int64_t panel;  // codes of a panel
  int64_t (*workspace)(const VqAssignParams&);
  int64_t (*scratch)(const VqAssignParams&);  // bytes per thread
  void (*pack)(const VqAssignParams&, int64_t head, int64_t panel);
  void (*assign)(const VqAssignParams&, int64_t batch, int64_t head, int64_t first_token, void* scratch);
};

REMORA_CPU_KERNELS(VqAssignCpuKernels, vq_assign_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
