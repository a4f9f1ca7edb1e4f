// What one walk over the tokens of a sequence reads and writes; walk_kernel.cuh says what it computes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "recurrence/shape.h"

namespace remora {

/// A [B, T, heads, channels] tensor of the walk's element type.
struct WalkTensor {
  const void* data;
  TokenStrides stride;
  int num_channels;
  int group_size;  // value heads per head of this tensor
};

struct WalkParams {
  RecurrenceShape shape;
  const float* g;             // [B, T, HV] or null
  const int32_t* cu_seqlens;  // [N + 1] or null
  const int32_t* rows;        // [B * T] or null
  float scale;

  WalkTensor x, write, read;
  WalkTensor y;  // dots only: what meets the outputs, channels of x
  void* out;     // [B, T, HV, channels of x] contiguous; null: the walk sums up a span
  bool is_out_float, is_aligned;

  // States: [N, HV] matrices of channels of x by channels of write, element strides in them
  const float* entry;  // before the walk's first token, or null: zero, or for kStartFrom what was saved
  float* exit;         // after its last token, or null
  int64_t entry_stride_x, entry_stride_d;
  int64_t saved_stride_x, saved_stride_d;  // of saved and span states
  void* saved_states;                      // every kStateInterval tokens, bf16 if the elements are, else float
  enum Saved : int { kNone, kWrite, kStartFrom } saved_use;
  bool has_saved_pairs;  // two neighbours of x are aligned in saved_states
  void* chunk_states;    // dots only: [chunk slots, HV, tiles of x], same type:
                         // states entering the chunks, as RegisterState
  float* dots;           // [tiles of x, B, T, HV] or null

  int64_t num_x_tiles, num_spans, span_tokens;
  float* span_states;  // [span slots, HV]: sums of the spans, then the states that enter them
  float* span_decays;  // [span slots, HV]
  int num_stages;
};

constexpr int kWalkThreads = 128;
constexpr int kWalkBlockX = 64;
constexpr int kWalkPlacesSize = 224;

constexpr int walk_block_t(int64_t element_size) { return element_size == 4 ? 32 : 64; }

/// Bytes of shared memory.
constexpr int walk_stage_size(int element_size, int dim, bool has_dots) {
  return walk_block_t(element_size) * (2 * dim + (has_dots ? 2 : 1) * kWalkBlockX) * element_size;
}
constexpr int walk_smem_size(int element_size, int dim, bool has_dots, int num_stages) {
  const int block_t = walk_block_t(element_size), blocks = block_t / 16 * (block_t / 16 + 1) / 2;
  return num_stages * walk_stage_size(element_size, dim, has_dots) + kWalkPlacesSize + blocks * 256 * element_size +
         (4 * 5 * block_t + 4) * 4 + (has_dots ? (blocks * 32 + (blocks + 3) / 4 * 4 + 5 * block_t) * 4 : 0);
}

/// Elements of one chunk state.
constexpr int64_t walk_state_size(int dim) { return kWalkBlockX * dim; }

/// `dim` of launch_walk.
constexpr int walk_dim(int64_t num_channels) { return num_channels <= 64 ? 64 : 128; }

/// Launches the walk; `dim` 64 or 128 covers the channels of write.
template <typename T>
cudaError_t launch_walk(const WalkParams& params, int dim, bool is_reverse, bool has_dots, int arch,
                        cudaStream_t stream);

}  // namespace remora
