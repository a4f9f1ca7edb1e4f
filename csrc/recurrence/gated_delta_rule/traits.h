// Tile sizes and shared memory of the forward kernel. Plain host code: heuristics.h plans with it, the kernel is built
// on it.
#pragma once
#include <cstdint>

namespace remora {

struct FwdTile {
  int element_size;  // bytes of q, k, v
  int head_dim;      // 64 or 128: the key dimension, zero-filled up to it

  // Tokens a chunk. 64 balances the C-terms against the KV-terms; 32 for float, whose K and Q tiles of 64 rows would
  // not fit in 99 KB.
  constexpr int block_t() const { return element_size == 4 ? 32 : 64; }

  constexpr int key_tile_size() const { return block_t() * head_dim * element_size; }
  constexpr int num_causal_blocks() const { return block_t() / 16 * (block_t() / 16 + 1) / 2; }
  constexpr int causal_tile_size() const { return num_causal_blocks() * 256 * element_size; }
  constexpr int coefficients_size() const { return 9 * block_t() * 4; }

  // A stage holds what one chunk needs: K, Q, A, -Y, coefficients. L is handed from the pair to the inverse warps
  // apart.
  constexpr int stage_size() const { return 2 * key_tile_size() + 2 * causal_tile_size() + coefficients_size(); }
  constexpr int scratch_size() const { return num_causal_blocks() * 256 * 4; }
  constexpr int smem_size(int num_stages, int num_scratches) const {
    return num_scratches * scratch_size() + num_stages * stage_size();
  }
};

constexpr int kSpanBlockV = 64;      // columns of V a CTA that walks a sequence, 16 a state warp
constexpr int kFwdStateWarps = 4;    // carry the state through the chunks
constexpr int kFwdPairWarps = 2;     // coefficients, A and L of a chunk
constexpr int kFwdInverseWarps = 2;  // load a chunk; Y from L
constexpr int kFwdThreads = 32 * (kFwdStateWarps + kFwdPairWarps + kFwdInverseWarps);
constexpr int kFwdMaxStages = 4;
constexpr int kFwdMaxScratches = 2;

/// With at least three stages and two scratches each role works on a chunk of its own; else the preparation of a chunk
/// is sequential and overlaps only the state warps.
constexpr bool is_deep_pipeline(int num_stages, int num_scratches) { return num_stages >= 3 && num_scratches == 2; }

}  // namespace remora
