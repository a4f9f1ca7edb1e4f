// The kernels of one instruction set, as cpu.cpp calls them.
#pragma once
#include "common/cpu/isa.h"
#include "pkm/pk_topk/params.h"

namespace remora {

struct PkTopkCpuKernels {
  int64_t (*workspace)(const PkTopkParams&);        // bytes: packed sub-keys
  int64_t (*scratch)(const PkTopkParams&);          // bytes of a thread
  int64_t (*block_tokens)(const PkTopkParams&);     // tokens of a task
  void (*pack)(const PkTopkParams&, int64_t axis);  // sub-keys of axis 0 ... 2 H - 1
  void (*select)(const PkTopkParams&, int64_t head, int64_t first_token, void* scratch);
  void (*select_bwd)(const PkSelectBwdParams&, int64_t begin, int64_t end);  // rows of T * H
};

REMORA_CPU_KERNELS(PkTopkCpuKernels, pk_topk_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
