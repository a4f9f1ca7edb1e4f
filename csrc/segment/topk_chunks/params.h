// Arguments of the selection of chunks by their summaries, and of the scores of chosen ones.
//
// H query heads read Hk heads of summaries; Hs lists of chunks are chosen (H, Hk or 1). List a is scored by the query
// heads [a H / Hs, (a + 1) H / Hs), query head h reads summaries of head h / (H / Hk).
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "segment/packed.h"

namespace remora {

/// score(t, a, s) = scale sum over the heads h of list a of w[t, h] f(<q[t, h], k_sum[s, kv(h)]>), f(x) = x, w = 1 or
/// f(x) = max(x, 0)
struct ChunkScoreShape {
  PackedShape packed;  // keys are summaries
  int64_t num_heads, num_key_heads, num_lists, dim;
  DType dtype;  // of q, k_sum and their gradients; everything else is float32, or float64 if dtype is
  bool is_relu;
  double scale;
  const void* q;      // [B, T, H, D]
  const void* k_sum;  // [B, S, Hk, D]
  HeadStrides q_stride, k_stride;
  const void* w;  // [B, T, H], relu only

  constexpr int64_t list_heads() const { return num_heads / num_lists; }
  constexpr int64_t key_head(int64_t head) const { return head / (num_heads / num_key_heads); }
};

struct TopkChunksParams {
  ChunkScoreShape shape;
  int64_t k, force_first, force_local;  // force_first + force_local <= k
  int64_t stride, size;                 // of the windows that chunks summarise; stride 0: all chunks are visible
  const int32_t* n_visible;             // [B, T] or null: in place of stride and size
  const void* bias;                     // [B, Hs, S] or null

  int32_t* idx;  // [B, T, Hs, k]
  void* scores;  // [B, T, Hs, k]
  void* workspace;
};

/// What a query chooses from: summaries [begin, begin + count), of which the first and the last are forced.
struct VisibleChunks {
  int64_t begin, count, num_first, num_local;

  constexpr int64_t num_forced() const { return num_first + num_local; }
  constexpr bool is_forced(int64_t chunk) const { return chunk < num_first || chunk >= count - num_local; }
  /// Where a forced chunk stands in the list.
  constexpr int64_t slot(int64_t chunk) const { return chunk < num_first ? chunk : chunk - (count - num_forced()); }
};

constexpr VisibleChunks visible_chunks(const TopkChunksParams& p, int64_t b, int64_t t) {
  const PackedQuery query = locate_query(p.shape.packed, t);
  int64_t count = query.num_keys;
  if (p.n_visible != nullptr) {
    count = clamp_to(p.n_visible[b * p.shape.packed.seqlen + t], 0, count);
  } else if (p.stride > 0) {
    const int64_t past = query.token + 1 - p.size;  // tokens since the first window closed
    count = past < 0 ? 0 : clamp_to(past / p.stride + 1, 0, count);
  }
  const int64_t num_first = clamp_to(p.force_first, 0, count);
  return {query.key_begin, count, num_first, clamp_to(p.force_local, 0, count - num_first)};
}

/// scores[b, t, a, m] = score(t, a, idx[b, t, a, m]), and its gradient. What is outside the chunks of the sequence has
/// score -infinity and no gradient.
struct ChunkScoresParams {
  ChunkScoreShape shape;
  int64_t k;
  const int32_t* idx;  // [B, T, Hs, k]
  void* scores;        // [B, T, Hs, k]

  const void* d_scores;           // [B, T, Hs, k]
  const int32_t *order, *starts;  // slot_plan of the rows [B, Hp, S] that lookups read, Hp = min(Hs, Hk)
  const int32_t* rows;
  int64_t max_rows;  // R: segments
  void* dq;          // [B, T, H, D]
  void* dk_sum;      // [B, S, Hk, D]; zero where no lookup reads
  void* dw;          // [B, T, H]
  void* workspace;   // chunk_scores_bwd_workspace() bytes

  constexpr int64_t num_lookups() const { return shape.packed.batch * shape.packed.seqlen * shape.num_lists * k; }
};

}  // namespace remora
