// Sequences cut into spans, on the device. A span is an affine map of the state (forward) or of its gradient
// (backward): out = M in + ext. A summary pass computes the maps, the combination folds them, and then every span
// starts from its exact state. Spans and slots: plan_spans (heuristics.h).
#pragma once
#include <cuda_runtime_api.h>

#include "recurrence/sequence.cuh"

namespace remora {

struct SpanMaps {
  int64_t span_tokens;
  float* data;  // [map slots, HV]: ext [K, V], which the combination replaces by the result, then M [K, K]
};

/// Spans but the last of a sequence own consecutive slots of maps: those of different sequences never meet. In slot i
/// of a sequence: forward, the map of span i; backward, that of span i + 1. Once combined: what passes between the two.
__device__ __forceinline__ int64_t first_map_slot(const Sequence& seq, int64_t span_tokens) {
  return seq.first_token / span_tokens;
}

__device__ __forceinline__ float* span_map(const RecurrenceShape& shape, const SpanMaps& maps, int64_t slot,
                                           int64_t head) {
  return maps.data + (slot * shape.num_value_heads + head) * shape.head_dim * (shape.head_dim + shape.value_dim);
}

__device__ __forceinline__ int64_t find_map_owner(const RecurrenceShape& shape, const int32_t* cu_seqlens,
                                                  const SpanMaps& maps, int64_t slot) {
  return find_owner(shape, cu_seqlens, slot,
                    [&](const Sequence& seq, int64_t) { return first_map_slot(seq, maps.span_tokens); });
}

struct CombineParams {
  RecurrenceShape shape;
  const int32_t* cu_seqlens;
  SpanMaps maps;
  bool is_reverse;  // from the last slot of a sequence to the first
};

cudaError_t launch_combine(const CombineParams& params, int64_t num_map_slots, cudaStream_t stream);

}  // namespace remora
