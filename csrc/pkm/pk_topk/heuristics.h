// How the selection is laid out on a device: a pure function of the shape and of the device.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/select.h"
#include "pkm/pk_topk/params.h"
#include "pkm/pk_topk/staircase.h"
#include "pkm/pk_topk/traits.h"

namespace remora {

struct PkTopkConfig {
  int block_tokens = 0;  // of a CTA; 0: the device has too little shared memory
  int row_stride = 0;    // of the scores of a token, in keys
  int num_pairs = 0;
  int capacity = 0;   // entries a warp selects in
  int list_size = 0;  // entries kept of an axis
  int smem_size = 0;
};

/// `max_smem`: bytes of shared memory a CTA may have.
inline PkTopkConfig plan_pk_topk(const PkTopkParams& p, int max_smem, int num_sms) {
  const bool is_pairs = p.output == PkTopkParams::Output::kPairs;
  PkTopkConfig config;
  config.num_pairs = is_pairs ? static_cast<int>(staircase_size(p.topk, p.candidates)) : 0;
  // 4 modulo 16: eight keys of four pairs of tokens, what a warp stores at once, lie in different banks.
  const int row = std::max(static_cast<int>(p.num_keys), config.num_pairs);
  config.row_stride = (row + 11) / 16 * 16 + 4;
  config.capacity = select_capacity(static_cast<int>(std::max({p.candidates, p.lowest, is_pairs ? p.topk : 1})));
  config.list_size = is_pairs ? static_cast<int>(p.candidates) : 0;
  const auto smem_size = [&](int block_tokens) {
    // Entries are selected where the tiles were.
    const int entries_size = std::min(block_tokens, kPkTopkWarps) * config.capacity * 8;
    return std::max(kPkTopkStages * kPkTopkStageSize, entries_size) +
           block_tokens * (config.row_stride * 4 + 2 * config.list_size * 8) + (config.list_size + 1) * 4;
  };
  // Two CTAs of a multiprocessor take turns at products and selection; more tokens share a read of the sub-keys.
  const int half = max_smem / 2 - 1024;
  for (int tokens = kPkTopkTokens; tokens >= 1; tokens /= 2) {
    const int64_t num_ctas = (p.tokens + tokens - 1) / tokens * p.heads;
    const bool is_small = tokens > kPkTopkWarps && num_ctas < num_sms;
    if (smem_size(tokens) <= half && !is_small) {
      config.block_tokens = tokens;
      break;
    }
  }
  for (int tokens = kPkTopkTokens; config.block_tokens == 0 && tokens >= 1; tokens /= 2) {
    if (smem_size(tokens) <= max_smem) config.block_tokens = tokens;
  }
  config.smem_size = smem_size(config.block_tokens);
  return config;
}

}  // namespace remora
