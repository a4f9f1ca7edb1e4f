// Hands windows, and blocks of tokens, to threads; a window's results depend on no other's.
#include "segment/segment_pool/cpu.h"

#include <algorithm>

#include "common/cpu/huge_pages.h"
#include "common/cpu/tasks.h"
#include "segment/segment_pool/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of segment_pool";

/// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 15;

/// Outputs from here on are asked to be on huge pages.
constexpr int64_t kLargeBytes = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Heads in blocks of kPoolChannels channels. With dual windows the halves of a head's channels share no block.
struct ChannelBlocks {
  int64_t heads, channels, parts, per_part;

  ChannelBlocks(const PoolShape& shape, int64_t num_parts)
      : heads(shape.heads),
        channels(shape.channels),
        parts(num_parts),
        per_part(ceil_div(shape.channels, kPoolChannels)) {}

  int64_t count() const { return heads * parts * per_part; }
  PoolChannels operator[](int64_t i) const {
    const int64_t first = i % per_part * kPoolChannels, part = i / per_part % parts;
    return {i / (per_part * parts), part * channels + first, std::min(kPoolChannels, channels - first)};
  }
};

int64_t grain(int64_t elements_per_task) {
  return std::max<int64_t>(1, kMinElementsPerThread / std::max<int64_t>(1, elements_per_task));
}

}  // namespace

Error segment_pool_fwd(const SegmentPoolFwdParams& params, const Launch& launch) {
  const PoolShape& shape = params.shape;
  const SegmentPoolCpuKernels& kernels = segment_pool_kernels(params.dtype);
  const ChannelBlocks blocks(shape, 1);
  // Some windows a task: a task is a few microseconds at least.
  const int64_t windows = shape.batch * shape.num_windows;
  const int64_t window_elements =
      std::min(shape.channels, kPoolChannels) * (shape.is_ragged() ? shape.seqlen / shape.num_windows + 1 : shape.size);
  const int64_t group = std::clamp<int64_t>(8192 / window_elements, 1, 64), groups = ceil_div(windows, group);
  const bool ok = run_tasks(launch.parallel_for, groups * blocks.count(), grain(group * window_elements),
                            kernels.scratch, [&](int64_t task, void* scratch) {
                              const int64_t first = task / blocks.count() * group;
                              for (int64_t i = first; i < std::min(windows, first + group); ++i) {
                                kernels.fwd(params, i / shape.num_windows, i % shape.num_windows,
                                            blocks[task % blocks.count()], scratch);
                              }
                            });
  return ok ? nullptr : kNoMemory;
}

Error segment_pool_bwd(const SegmentPoolBwdParams& params, const Launch& launch) {
  const PoolShape& shape = params.shape;
  const SegmentPoolCpuKernels& kernels = segment_pool_kernels(params.dtype);
  const ChannelBlocks blocks(shape, shape.dual ? 2 : 1);
  const int64_t bytes = shape.batch * shape.seqlen * shape.heads * shape.input_channels() * size_of(params.dtype);
  for (void* const output : {params.dx, params.dgate}) {
    if (output && bytes >= kLargeBytes) prefer_huge_pages(output, bytes);
  }
  bool ok = run_tasks(launch.parallel_for, shape.num_blocks() * blocks.count(),
                      grain(std::min(shape.channels, kPoolChannels) * shape.block_tokens()), kernels.scratch,
                      [&](int64_t task, void* scratch) {
                        kernels.bwd(params, task / blocks.count(), blocks[task % blocks.count()], scratch);
                      });
  if (params.dslot_bias) {
    const int64_t entries = shape.size * shape.heads * shape.input_channels();
    constexpr int64_t kReduceEntries = 1024;
    ok &= run_tasks(launch.parallel_for, ceil_div(entries, kReduceEntries), grain(kReduceEntries * shape.num_blocks()),
                    64, [&](int64_t i, void*) {
                      kernels.reduce(params, i * kReduceEntries, std::min(entries, (i + 1) * kReduceEntries));
                    });
  }
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
