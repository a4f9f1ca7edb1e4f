// Hands tokens to threads; a token's results depend on no other thread's.
#include "routed/mom/cpu.h"

#include <algorithm>

#include "routed/mom/launch.h"

namespace remora {
namespace {

constexpr int64_t kMinWorkPerThread = 1 << 15;

int64_t grain(int64_t work_per_token) {
  return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work_per_token));
}

int64_t sequence_of(const RoutePlanParams& p, int64_t token) {
  if (!p.cu_seqlens) return token / p.seqlen;
  const int64_t n = std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.num_seqs, token) - p.cu_seqlens - 1;
  return n >= 0 && token < p.cu_seqlens[n + 1] ? n : -1;
}

/// Segment of a choice, or S if it is dropped.
int64_t segment_of(const RoutePlanParams& p, int64_t item) {
  const int64_t token = item / p.choices(), choice = item % p.choices();
  const int64_t n = sequence_of(p, token);
  const int64_t memory = choice == p.topk ? p.num_memories : p.indices[token * p.topk + choice];
  const bool is_kept = n >= 0 && (!p.mask || p.mask[token]) && memory >= 0 && memory < p.memories() &&
                       (choice == p.topk || memory < p.num_memories);
  return is_kept ? n * p.memories() + memory : p.segments();
}

}  // namespace

int64_t mom_route_workspace(const MomRouteParams& params) { return params.num_memories * 8; }

Error mom_route_fwd(const MomRouteParams& params, const Launch& launch) {
  const MomCpuKernels& kernels = mom_kernels(params.dtype);
  launch.parallel_for(params.rows, grain(params.num_memories * (params.topk + 8)),
                      [&](int64_t begin, int64_t end) { kernels.route_fwd(params, begin, end); });
  if (params.with_losses) kernels.route_losses(params);
  return nullptr;
}

Error mom_route_bwd(const MomRouteParams& params, const Launch& launch) {
  launch.parallel_for(params.rows, grain(params.num_memories * (params.topk + 16)),
                      [&](int64_t begin, int64_t end) { mom_kernels(params.dtype).route_bwd(params, begin, end); });
  return nullptr;
}

int64_t route_plan_workspace(const RoutePlanParams& params) { return (params.segments() + 1) * 3 * 8; }

Error route_plan(const RoutePlanParams& p, const Launch&) {
  const int64_t num_segments = p.segments(), num_items = p.items();
  int64_t* counts = static_cast<int64_t*>(p.workspace);
  int64_t* dropped = counts + num_segments + 1;
  int64_t* ranks = dropped + num_segments + 1;
  std::fill(counts, counts + num_segments + 1, 0);
  std::fill(ranks, ranks + num_segments + 1, 0);
  for (int64_t item = 0; item < num_items; ++item) ++counts[segment_of(p, item)];
  const auto kept = [&](int64_t segment) {
    if (segment == num_segments) return int64_t{0};
    const bool is_bounded = p.capacity >= 0 && segment % p.memories() < p.num_memories;
    return is_bounded ? std::min(counts[segment], p.capacity) : counts[segment];
  };
  int64_t position = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    p.offsets[s] = static_cast<int32_t>(position), p.counts[s] = static_cast<int32_t>(counts[s]);
    position += kept(s);
  }
  p.offsets[num_segments] = static_cast<int32_t>(position);
  for (int64_t s = 0; s <= num_segments; ++s) dropped[s] = position, position += counts[s] - kept(s);
  for (int64_t item = 0; item < num_items; ++item) {
    const int64_t s = segment_of(p, item), rank = ranks[s]++;
    const int64_t num_dropped = counts[s] - kept(s), first = p.drop_oldest ? num_dropped : 0;
    const bool is_kept = rank >= first && rank < first + kept(s);
    const int64_t to = is_kept ? p.offsets[s] + rank - first : dropped[s] + (rank < first ? rank : rank - kept(s));
    const int64_t row = item % p.choices() * p.tokens + item / p.choices();
    p.rows[to] = static_cast<int32_t>(row), p.positions[row] = static_cast<int32_t>(to);
  }
  return nullptr;
}

Error mom_combine_fwd(const MomCombineParams& params, const Launch& launch) {
  launch.parallel_for(params.rows, grain(params.choices * params.channels),
                      [&](int64_t begin, int64_t end) { mom_kernels(params.dtype).combine_fwd(params, begin, end); });
  return nullptr;
}

Error mom_combine_bwd(const MomCombineParams& params, const Launch& launch) {
  launch.parallel_for(params.rows, grain(params.choices * params.channels),
                      [&](int64_t begin, int64_t end) { mom_kernels(params.dtype).combine_bwd(params, begin, end); });
  return nullptr;
}

}  // namespace remora
