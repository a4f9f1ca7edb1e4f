// Tile sizes of the CUDA kernels. The limit of shared memory is that of compute capability 8.6 and 12.0, 99 KiB.
#pragma once
#include <cstdint>

namespace remora {

/// A CTA owns kNumWarps * 16 * m_tiles rows of one operand and streams tiles of block_n rows of the other.
struct AttentionConfig {
  int num_warps, m_tiles, block_n, num_stages;

  constexpr int block_m() const { return num_warps * 16 * m_tiles; }
  constexpr int num_threads() const { return num_warps * 32; }
};

/// Forward: rows of queries over keys. Two fragments of rows a warp, where registers hold them, halve the reads of keys
/// from shared memory.
constexpr AttentionConfig attention_fwd_config(int element_size, int head_dim) {
  if (element_size == 4) return head_dim < 256 ? AttentionConfig{4, 1, 32, 2} : AttentionConfig{4, 1, 16, 1};
  return head_dim == 64 ? AttentionConfig{4, 2, 64, 2} : AttentionConfig{4, head_dim == 128 ? 2 : 1, 32, 2};
}

/// Forward of few rows, bound by the bytes of the keys: one warp a CTA.
constexpr AttentionConfig attention_decode_config(int element_size, int head_dim) {
  if (element_size == 4) return {1, 1, head_dim < 256 ? 32 : 16, 2};
  return {1, 1, head_dim == 64 ? 64 : 32, 2};
}

/// Backward: rows of queries over keys.
constexpr AttentionConfig attention_bwd_rows_config(int element_size, int head_dim) {
  if (element_size == 4) {
    return head_dim == 64    ? AttentionConfig{4, 1, 32, 2}
           : head_dim == 128 ? AttentionConfig{4, 1, 16, 2}
                             : AttentionConfig{2, 1, 16, 1};
  }
  return head_dim == 64    ? AttentionConfig{4, 2, 32, 2}
         : head_dim == 128 ? AttentionConfig{4, 1, 64, 2}
                           : AttentionConfig{4, 1, 32, 1};
}

/// Backward: keys over rows of queries.
constexpr AttentionConfig attention_bwd_keys_config(int element_size, int head_dim) {
  if (element_size == 4) {
    return head_dim == 64    ? AttentionConfig{4, 1, 32, 2}
           : head_dim == 128 ? AttentionConfig{4, 1, 16, 2}
                             : AttentionConfig{2, 1, 16, 1};
  }
  return head_dim == 64 ? AttentionConfig{4, 1, 64, 2} : AttentionConfig{4, 1, 32, head_dim == 128 ? 2 : 1};
}

}  // namespace remora
