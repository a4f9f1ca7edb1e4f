// Entry points of the selection of chunks. cpu.cpp and launch.cu each define all of them; a library links one of the
// two.
#pragma once
#include "common/launch.h"
#include "segment/topk_chunks/params.h"

namespace remora {

int64_t topk_chunks_workspace(const TopkChunksParams& params);
Error topk_chunks_fwd(const TopkChunksParams& params, const Launch& launch);

Error chunk_scores_fwd(const ChunkScoresParams& params, const Launch& launch);

int64_t chunk_scores_bwd_workspace(const ChunkScoresParams& params);
Error chunk_scores_bwd(const ChunkScoresParams& params, const Launch& launch);

}  // namespace remora
