// What the kernels over rows, forward and backward, stream: tiles of the keys of a source and of their values.
#pragma once
#include "segment/prefix_attention/tile.cuh"

namespace remora {

/// kNumStages stages of a tile of keys and one of values from smem on. Rows of keys from `end` on are zeros.
template <typename T, typename Traits, int HEAD_DIM>
struct KeyTiles {
  const T *k, *v;
  int64_t k_stride, v_stride;
  int end, dims;
  bool is_aligned;
  uint32_t smem;

  __device__ __forceinline__ KeyTiles(const AttentionKeys& source, const AttentionSpan& keys, int kv_head, int end,
                                      int dims, bool is_aligned, uint32_t smem)
      : k(static_cast<const T*>(source.k) + source.k_stride.offset(keys.batch, keys.begin, kv_head)),
        v(static_cast<const T*>(source.v) + source.v_stride.offset(keys.batch, keys.begin, kv_head)),
        k_stride(source.k_stride.token),
        v_stride(source.v_stride.token),
        end(end),
        dims(dims),
        is_aligned(is_aligned),
        smem(smem) {}

  __device__ __forceinline__ uint32_t keys(int tile) const {
    return smem + tile % Traits::kNumStages * 2 * Traits::TILE_SIZE;
  }
  __device__ __forceinline__ uint32_t values(int tile) const { return keys(tile) + Traits::TILE_SIZE; }

  /// A group of cp.async, empty if there is no such tile before last_tile.
  __device__ __forceinline__ void load(int tile, int last_tile) const {
    if (tile < last_tile) {
      load_rows(keys(tile), k, k_stride, tile);
      load_rows(values(tile), v, v_stride, tile);
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void load_rows(uint32_t to, const T* base, int64_t stride, int tile) const {
    const int first = tile * Traits::BLOCK_N;
    load_tile<T, Traits::BLOCK_N, HEAD_DIM, Traits::kNumThreads>(
        to, base, [=](int row) { return base + (first + row) * stride; }, end - first, dims, is_aligned);
  }
};

/// The bias of a sequence's keys for a head, or null.
__device__ __forceinline__ const float* bias_of(const AttentionKeys& source, const AttentionSpan& keys, int head) {
  if (source.bias == nullptr) return nullptr;
  return static_cast<const float*>(source.bias) + keys.batch * source.bias_batch + head * source.bias_head + keys.begin;
}

}  // namespace remora
