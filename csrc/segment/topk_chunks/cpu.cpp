// Hands blocks of tokens of a list, rows and segments of the plan to threads; each result has one owner.
#include "segment/topk_chunks/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "segment/topk_chunks/launch.h"

namespace remora {
namespace {

/// Rows of which a thread takes at least so many that they are worth it.
int64_t grain_of(int64_t work_per_row) {
  constexpr int64_t kMinWorkPerThread = 1 << 15;
  return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work_per_row));
}

}  // namespace

int64_t topk_chunks_workspace(const TopkChunksParams& params) {
  return topk_chunks_kernels(params.shape.dtype).workspace(params);
}

Error topk_chunks_fwd(const TopkChunksParams& params, const Launch& launch) {
  const TopkChunksCpuKernels& kernels = topk_chunks_kernels(params.shape.dtype);
  const ChunkScoreShape& shape = params.shape;
  const int64_t grain = grain_of(32 * shape.dim);
  launch.parallel_for(kernels.num_panels(params), grain,
                      [&](int64_t begin, int64_t end) { kernels.pack(params, begin, end); });
  const int64_t block_tokens = kernels.block_tokens(params);
  const int64_t num_blocks = (shape.packed.seqlen + block_tokens - 1) / block_tokens;
  // Blocks descending: late tokens see the most chunks.
  const bool done =
      run_tasks(launch.parallel_for, num_blocks * shape.packed.batch * shape.num_lists, 1, kernels.scratch(params),
                [&](int64_t task, void* scratch) {
                  const int64_t block = num_blocks - 1 - task % num_blocks, list = task / num_blocks;
                  kernels.select(params, list / shape.num_lists, list % shape.num_lists, block * block_tokens, scratch);
                });
  return done ? nullptr : "topk_chunks: out of memory";
}

Error chunk_scores_fwd(const ChunkScoresParams& params, const Launch& launch) {
  const ChunkScoreShape& shape = params.shape;
  const int64_t num_rows = shape.packed.batch * shape.packed.seqlen * shape.num_lists;
  launch.parallel_for(num_rows, grain_of(params.k * shape.list_heads() * shape.dim), [&](int64_t begin, int64_t end) {
    topk_chunks_kernels(shape.dtype).scores_fwd(params, begin, end);
  });
  return nullptr;
}

int64_t chunk_scores_bwd_workspace(const ChunkScoresParams& params) {
  return topk_chunks_kernels(params.shape.dtype).bwd_workspace(params);
}

Error chunk_scores_bwd(const ChunkScoresParams& params, const Launch& launch) {
  const TopkChunksCpuKernels& kernels = topk_chunks_kernels(params.shape.dtype);
  const ChunkScoreShape& shape = params.shape;
  const int64_t num_rows = shape.packed.batch * shape.packed.seqlen * shape.num_lists;
  const int64_t work = params.k * shape.list_heads() * shape.dim;
  launch.parallel_for(num_rows, grain_of(work),
                      [&](int64_t begin, int64_t end) { kernels.bwd_query(params, begin, end); });
  const int64_t num_segments = std::max<int64_t>(1, params.max_rows);
  const auto keys = [&](int64_t segment, void*) { kernels.bwd_keys(params, segment); };
  const bool done = run_tasks(launch.parallel_for, params.max_rows, grain_of(num_rows * work / num_segments), 64, keys);
  return done ? nullptr : "chunk_scores: out of memory";
}

}  // namespace remora
