// The kernels of one instruction set, as cpu.cpp calls them.
#pragma once
#include "common/cpu/isa.h"
#include "pkm/memory_bag/params.h"

namespace remora {

struct MemoryBagCpuKernels {
  int64_t (*fwd_scratch)(const BagShape&);
  /// Columns [first_column, last_column) of each head's block, for tokens [begin, end).
  void (*fwd)(const MemoryBagFwdParams&, int64_t begin, int64_t end, int64_t first_column, int64_t last_column,
              void* scratch);
  void (*bwd_weights)(const MemoryBagWeightsParams&, int64_t begin, int64_t end);

  int64_t (*bwd_scratch)(const BagShape&);
  /// The pieces of segments that begin at sorted positions [begin, end).
  void (*bwd)(const MemoryBagBwdParams&, int64_t begin, int64_t end, void* scratch);
  /// The segment of several pieces that begins in a window of kPieceLookups positions, if there is one.
  void (*bwd_combine)(const MemoryBagBwdParams&, int64_t window);
  /// Zeros to the rows [begin, end) of d_table that no segment writes.
  void (*bwd_zero)(const MemoryBagBwdParams&, int64_t begin, int64_t end);

  int64_t (*peer_scratch)(const BagShape&, int64_t query_width);
  void (*peer_fwd)(const PeerBagFwdParams&, int64_t token, void* scratch);
  void (*peer_bwd)(const PeerBagBwdParams&, int64_t token, void* scratch);
};

REMORA_CPU_KERNELS(MemoryBagCpuKernels, memory_bag_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
