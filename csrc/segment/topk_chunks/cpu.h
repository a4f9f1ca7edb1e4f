// The kernels of one instruction set, as cpu.cpp calls them. Rows are (b T + t) Hs + list.
#pragma once
#include "common/cpu/isa.h"
#include "segment/topk_chunks/params.h"

namespace remora {

struct TopkChunksCpuKernels {
  int64_t (*workspace)(const TopkChunksParams&);                      // bytes: packed summaries
  int64_t (*scratch)(const TopkChunksParams&);                        // bytes of a thread
  int64_t (*block_tokens)(const TopkChunksParams&);                   // tokens of a task
  void (*pack)(const TopkChunksParams&, int64_t begin, int64_t end);  // panels of summaries, of all there are
  int64_t (*num_panels)(const TopkChunksParams&);
  void (*select)(const TopkChunksParams&, int64_t b, int64_t list, int64_t first_token, void* scratch);
  void (*scores_fwd)(const ChunkScoresParams&, int64_t begin, int64_t end);  // rows
  int64_t (*bwd_workspace)(const ChunkScoresParams&);
  void (*bwd_query)(const ChunkScoresParams&, int64_t begin, int64_t end);  // rows
  void (*bwd_keys)(const ChunkScoresParams&, int64_t segment);              // of the plan
};

REMORA_CPU_KERNELS(TopkChunksCpuKernels, topk_chunks_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
