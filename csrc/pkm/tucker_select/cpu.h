// The kernels of one instruction set, as cpu.cpp calls them. Rows are t * H + h.
#pragma once
#include "common/cpu/isa.h"
#include "pkm/tucker_select/params.h"

namespace remora {

struct TuckerSelectCpuKernels {
  int64_t (*scratch)(const TuckerSelectParams&);  // bytes of a thread
  void (*select)(const TuckerSelectParams&, int64_t row, void* scratch);
};

REMORA_CPU_KERNELS(TuckerSelectCpuKernels, tucker_select_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
