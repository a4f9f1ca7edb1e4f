// The kernels of one instruction set, as cpu.cpp calls them. Each does one task on the calling thread.
#pragma once
#include <cstdint>

#include "common/cpu/isa.h"
#include "segment/segment_pool/params.h"

namespace remora {

/// Channels of a head that a task takes: a token's part is long enough for the prefetcher, and what is kept per channel
/// stays in L1.
constexpr int64_t kPoolChannels = 1024;

/// Channels [first, first + count) of a head's.
struct PoolChannels {
  int64_t head, first, count;
};

struct SegmentPoolCpuKernels {
  int64_t scratch;  // bytes per thread
  void (*fwd)(const SegmentPoolFwdParams&, int64_t batch, int64_t window, PoolChannels of_output, void* scratch);
  /// The tokens of a block; leaves its share of dslot_bias in the workspace.
  void (*bwd)(const SegmentPoolBwdParams&, int64_t block, PoolChannels of_input, void* scratch);
  void (*reduce)(const SegmentPoolBwdParams&, int64_t begin, int64_t end);  // entries of dslot_bias
};

REMORA_CPU_KERNELS(SegmentPoolCpuKernels, segment_pool_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
