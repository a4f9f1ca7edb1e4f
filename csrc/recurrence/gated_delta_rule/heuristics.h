// How the forward pass is laid out on a device: a pure function of the shape and of the device.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/gated_delta_rule/traits.h"

namespace remora {

/// span_tokens where sequences stay whole: none is longer, as kernels count its tokens in 32 bits.
constexpr int64_t kNotCut = INT32_MAX;

struct FwdConfig {
  int head_dim = 0;               // of the instantiation; 0: none serves this shape
  int num_stages = 0;             // chunks in flight in shared memory
  int num_scratches = 0;          // of them, whose L may be live
  int64_t span_tokens = kNotCut;  // a longer sequence is cut into spans of so many tokens
  int64_t num_map_slots = 0;      // spans that other spans of their sequence may follow
  int64_t num_v_tiles = 0;
  int64_t num_transition_tiles = 0;  // column tiles of the spans' transition matrices
  int64_t num_summary_ctas = 0;
  int64_t num_output_ctas = 0;
  int smem_size = 0;

  std::string to_string() const {
    return "FwdConfig(head_dim=" + std::to_string(head_dim) + ", num_stages=" + std::to_string(num_stages) +
           ", num_scratches=" + std::to_string(num_scratches) + ", span_tokens=" + std::to_string(span_tokens) +
           ", num_map_slots=" + std::to_string(num_map_slots) + ", num_v_tiles=" + std::to_string(num_v_tiles) +
           ", num_summary_ctas=" + std::to_string(num_summary_ctas) +
           ", num_output_ctas=" + std::to_string(num_output_ctas) + ", smem_size=" + std::to_string(smem_size) + ")";
  }
};

/// Shared memory a CTA may have, by compute capability (major * 10 + minor).
constexpr int max_smem_size(int arch) {
  switch (arch) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 101:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

/// Where the heads of one sequence leave most of the device idle, long sequences are cut: kNominalLength tokens fill it
/// once. Cutting costs a second pass over the chunks, without outputs but with the transition matrix as extra columns,
/// and a combination of the spans. Neither the number nor the lengths of the sequences of a call matter: a sequence
/// gives the same bits whatever stands beside it.
inline int64_t plan_span_tokens(int64_t ctas_per_seq, int num_sms) {
  constexpr int64_t kNominalLength = 32768, kStep = 1024, kMinSpans = 4;
  static_assert(kStep % kStateInterval == 0);
  const int64_t num_spans = num_sms / ctas_per_seq;
  if (num_spans < kMinSpans) return kNotCut;
  return (kNominalLength / num_spans + kStep - 1) / kStep * kStep;
}

/// The walk of a sequence, forward or backward, by CTAs of kSpanBlockV columns of V.
struct SpanPlan {
  int64_t num_v_tiles = 0;
  int64_t num_transition_tiles = 0;  // column tiles of the spans' transition matrices
  int64_t span_tokens = kNotCut;     // a longer sequence is cut into spans of so many tokens
  int64_t num_map_slots = 0;         // spans that other spans of their sequence may follow
  int64_t num_walk_ctas = 0;
  int64_t num_summary_ctas = 0;
};

inline SpanPlan plan_spans(const RecurrenceShape& shape, int num_sms) {
  SpanPlan plan;
  plan.num_v_tiles = (shape.value_dim + kSpanBlockV - 1) / kSpanBlockV;
  plan.num_transition_tiles = (shape.head_dim + kSpanBlockV - 1) / kSpanBlockV;
  const int64_t ctas_per_seq = shape.num_value_heads * plan.num_v_tiles;
  plan.span_tokens = plan_span_tokens(ctas_per_seq, num_sms);
  if (plan.span_tokens != kNotCut) {
    plan.num_map_slots = std::max<int64_t>(shape.batch * shape.seqlen - 1, 0) / plan.span_tokens;
  }
  plan.num_walk_ctas = (shape.num_seqs + plan.num_map_slots) * ctas_per_seq;
  plan.num_summary_ctas = plan.num_map_slots * shape.num_value_heads * (plan.num_v_tiles + plan.num_transition_tiles);
  return plan;
}

/// Bytes of the spans' maps: per map slot and value head, a transition matrix and the span's own contribution.
inline int64_t span_maps_size(const RecurrenceShape& shape, int64_t num_map_slots) {
  return num_map_slots * shape.num_value_heads * shape.head_dim * (shape.head_dim + shape.value_dim) *
         static_cast<int64_t>(sizeof(float));
}

inline FwdConfig plan_fwd(const RecurrenceShape& shape, DType dtype, int num_sms, int arch) {
  FwdConfig config;
  if (dtype == DType::kFloat64 || shape.head_dim > 128) return config;
  config.head_dim = shape.head_dim <= 64 ? 64 : 128;
  const FwdTile tile{static_cast<int>(size_of(dtype)), config.head_dim};
  constexpr int kRings[][2] = {{4, 2}, {3, 2}, {2, 1}, {1, 1}};
  for (const auto& [num_stages, num_scratches] : kRings) {
    config.num_stages = num_stages;
    config.num_scratches = num_scratches;
    config.smem_size = tile.smem_size(num_stages, num_scratches);
    if (config.smem_size <= max_smem_size(arch)) break;
  }

  const SpanPlan spans = plan_spans(shape, num_sms);
  config.num_v_tiles = spans.num_v_tiles;
  config.num_transition_tiles = spans.num_transition_tiles;
  config.span_tokens = spans.span_tokens;
  config.num_map_slots = spans.num_map_slots;
  config.num_output_ctas = spans.num_walk_ctas;
  config.num_summary_ctas = spans.num_summary_ctas;
  return config;
}

}  // namespace remora
