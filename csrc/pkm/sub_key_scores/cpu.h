// The kernels of one instruction set, as cpu.cpp calls them. Rows are t * G + g.
#pragma once
#include "common/cpu/isa.h"
#include "pkm/sub_key_scores/params.h"

namespace remora {

struct SubKeyScoresCpuKernels {
  int64_t (*workspace)(const SubKeyScoresParams&);      // bytes: entries of every row
  int64_t (*query_scratch)(const SubKeyScoresParams&);  // bytes of a thread
  int64_t (*keys_scratch)(const SubKeyScoresParams&);   // bytes of a thread
  int64_t (*block_keys)(const SubKeyScoresParams&);     // sub-keys of a task of bwd_keys
  void (*fwd)(const SubKeyScoresParams&, int64_t row, void* scratch);
  void (*bwd_query)(const SubKeyScoresParams&, int64_t row, void* scratch);  // and the entries
  void (*bwd_keys)(const SubKeyScoresParams&, int64_t group, int64_t first_key, void* scratch);
};

REMORA_CPU_KERNELS(SubKeyScoresCpuKernels, sub_key_scores_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
