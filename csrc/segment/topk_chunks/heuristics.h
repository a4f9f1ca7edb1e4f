// How the selection of chunks is laid out on a device: a pure function of k and of the device.
#pragma once

namespace remora {

constexpr int kChunkWarps = 4;
constexpr int kChunkThreads = 32 * kChunkWarps;
constexpr int kChunkTile = 64;      // summaries of a tile
constexpr int kChunkQueries = 64;   // rows of a tile of queries, 16 a warp
constexpr int kChunkRowSize = 128;  // bytes of a tile's row: 64 elements of 16 bits, 32 floats
constexpr int kChunkStages = 2;
constexpr int kChunkStageSize = (kChunkTile + kChunkQueries) * kChunkRowSize;

struct TopkChunksConfig {
  int capacity = 0;      // candidates kept of a query, a power of two: the k best so far and a tile
  int warp_queries = 0;  // of the 16 rows a warp multiplies; 0: the device has too little shared memory
  int smem_size = 0;

  constexpr int block_queries() const { return kChunkWarps * warp_queries; }
};

/// `max_smem`: bytes of shared memory a CTA may have.
inline TopkChunksConfig plan_topk_chunks(int k, int max_smem) {
  TopkChunksConfig config{.capacity = 2 * kChunkTile};
  while (config.capacity < k + kChunkTile) config.capacity *= 2;
  for (int queries = 16; queries >= 1; queries /= 2) {
    config.smem_size = kChunkStages * kChunkStageSize + kChunkWarps * queries * config.capacity * 8;
    // Two CTAs of a multiprocessor hide each other's sorts.
    if (config.smem_size > (queries > 4 ? max_smem / 2 - 1024 : max_smem)) continue;
    config.warp_queries = queries;
    break;
  }
  return config;
}

}  // namespace remora
