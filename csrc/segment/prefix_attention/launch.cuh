// Launches of one element type, instantiated by fwd_<type>.cu and bwd_<type>.cu.
#pragma once
#include "segment/prefix_attention/launch.h"

namespace remora {

/// Splits of the keys where queries are few; it depends on the lengths of one row of the batch only.
struct AttentionSplits {
  int num_splits;
  int64_t keys_per_split[2];  // of the summaries, of the band

  explicit AttentionSplits(const PrefixAttentionInputs& in);
};

template <typename T>
Error prefix_attention_fwd_of(const PrefixAttentionFwdParams& params, bool is_aligned, const Launch& launch);
template <typename T>
Error prefix_attention_bwd_of(const PrefixAttentionBwdParams& params, bool is_aligned, const Launch& launch);

}  // namespace remora
