// How the forward pass is laid out on a device: a pure function of the shape and of the device.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/gated_delta_rule/traits.h"

namespace remora {

struct FwdConfig {
  int head_dim = 0;       // of the instantiation; 0: none serves this shape
  int num_stages = 0;     // chunks in flight in shared memory
  int num_scratches = 0;  // of them, whose L may be live
  int num_spans = 1;      // parts a sequence is cut into
  int64_t num_v_tiles = 0;
  int64_t num_transition_tiles = 0;  // column tiles of the spans' transition matrices
  int64_t num_summary_ctas = 0;      // 0 unless num_spans > 1
  int64_t num_output_ctas = 0;
  int smem_size = 0;

  std::string to_string() const {
    return "FwdConfig(head_dim=" + std::to_string(head_dim) + ", num_stages=" + std::to_string(num_stages) +
           ", num_scratches=" + std::to_string(num_scratches) + ", num_spans=" + std::to_string(num_spans) +
           ", num_v_tiles=" + std::to_string(num_v_tiles) + ", num_summary_ctas=" + std::to_string(num_summary_ctas) +
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

/// Spans that make the chain of chunks shortest. Cutting costs a second pass over the chunks (without outputs, but with
/// the transition matrix as extra columns) and a combination of the spans, so short sequences stay whole.
inline int plan_num_spans(int64_t num_chains, int64_t num_v_tiles, int64_t num_transition_tiles, int64_t tokens_per_seq,
                          int block_t, int num_sms) {
  constexpr int kMaxSpans = 64;
  constexpr double kSummaryCost = 0.7;   // of a chunk of the output pass
  constexpr double kCombineChunks = 16;  // two more launches and the first and last span's combination
  constexpr double kCombineSpanChunks = 1;
  constexpr double kMinGain = 1.15;
  const auto waves = [&](int64_t ctas) { return static_cast<double>((ctas + num_sms - 1) / num_sms); };
  const double chunks = static_cast<double>((tokens_per_seq + block_t - 1) / block_t);
  const double whole = waves(num_chains * num_v_tiles) * chunks;
  int best = 1;
  double best_cost = whole / kMinGain;
  for (int spans = 2; spans <= kMaxSpans; ++spans) {
    const int64_t span_tokens = (tokens_per_seq + spans - 1) / spans;
    const double span_chunks =
        static_cast<double>((span_tokens + kStateInterval - 1) / kStateInterval * kStateInterval / block_t);
    const int64_t summary_ctas = num_chains * ((spans - 1) * num_v_tiles + (spans - 2) * num_transition_tiles);
    const double cost = (kSummaryCost * waves(summary_ctas) + waves(num_chains * num_v_tiles * spans)) * span_chunks +
                        kCombineChunks + kCombineSpanChunks * spans;
    if (cost < best_cost) {
      best = spans;
      best_cost = cost;
    }
  }
  return best;
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

  config.num_v_tiles = (shape.value_dim + kFwdBlockV - 1) / kFwdBlockV;
  config.num_transition_tiles = (shape.head_dim + kFwdBlockV - 1) / kFwdBlockV;
  const int64_t num_chains = shape.num_seqs * shape.num_value_heads;
  const int64_t tokens_per_seq = shape.batch * shape.seqlen / std::max<int64_t>(shape.num_seqs, 1);
  if (num_chains > 0) {
    config.num_spans = plan_num_spans(num_chains, config.num_v_tiles, config.num_transition_tiles, tokens_per_seq,
                                      tile.block_t(), std::max(num_sms, 1));
  }
  config.num_output_ctas = num_chains * config.num_spans * config.num_v_tiles;
  if (config.num_spans > 1) {
    config.num_summary_ctas = num_chains * (config.num_spans - 1) * (config.num_v_tiles + config.num_transition_tiles);
  }
  return config;
}

/// Bytes of workspace: per sequence, value head and span but the last, its transition matrix and its own contribution.
inline int64_t fwd_workspace_size(const RecurrenceShape& shape, const FwdConfig& config) {
  return shape.num_seqs * shape.num_value_heads * (config.num_spans - 1) * shape.head_dim *
         (shape.head_dim + shape.value_dim) * static_cast<int64_t>(sizeof(float));
}

}  // namespace remora
