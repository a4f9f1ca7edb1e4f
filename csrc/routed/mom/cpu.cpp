// Hands tokens to threads; a token's results depend on no other thread's.
#include "routed/mom/cpu.h"

#include <algorithm>
#include <utility>

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

/// Calls body(row, segment) for every choice of tokens [begin, end), in order; segment S is that of dropped ones.
template <class Body>
void for_each_choice(const RoutePlanParams& p, int64_t begin, int64_t end, const Body& body) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t n = sequence_of(p, token);
    const bool is_real = n >= 0 && (!p.mask || p.mask[token]);
    for (int64_t j = 0; j < p.choices(); ++j) {
      const int64_t memory = j == p.topk ? p.num_memories : p.indices[token * p.topk + j];
      const bool is_kept = is_real && memory >= 0 && (j == p.topk || memory < p.num_memories);
      body(j * p.tokens + token, is_kept ? n * p.memories() + memory : p.segments());
    }
  }
}

/// Tokens are counted and sorted by chunks; more of them than this many choices each would cost more than they save.
constexpr int64_t kMinPlanChunk = 4096, kMaxPlanChunks = 64;

int64_t plan_chunks(const RoutePlanParams& p) {
  return std::clamp<int64_t>(p.items() / std::max(kMinPlanChunk, p.segments()), 1, kMaxPlanChunks);
}

}  // namespace

int64_t mom_route_workspace(const MomRouteParams& params) {
  return loss_blocks(params) * (params.num_memories + 1) * 2 * 8;
}

Error mom_route_fwd(const MomRouteParams& params, const Launch& launch) {
  const MomCpuKernels& kernels = mom_kernels(params.dtype);
  const int64_t row_work = params.num_memories * (params.topk + 8);
  launch.parallel_for(params.rows, grain(row_work),
                      [&](int64_t begin, int64_t end) { kernels.route_fwd(params, begin, end); });
  if (!params.with_losses) return nullptr;
  launch.parallel_for(loss_blocks(params), grain(row_work * kLossRows), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) kernels.route_partial(params, block);
  });
  kernels.route_losses(params);
  return nullptr;
}

Error mom_route_bwd(const MomRouteParams& params, const Launch& launch) {
  launch.parallel_for(params.rows, grain(params.num_memories * (params.topk + 16)),
                      [&](int64_t begin, int64_t end) { mom_kernels(params.dtype).route_bwd(params, begin, end); });
  return nullptr;
}

int64_t route_plan_workspace(const RoutePlanParams& params) {
  return (params.segments() + 1) * (plan_chunks(params) + 2) * 8;
}

Error route_plan(const RoutePlanParams& p, const Launch& launch) {
  const int64_t num_segments = p.segments(), num_chunks = plan_chunks(p);
  int64_t* const totals = static_cast<int64_t*>(p.workspace);  // [S + 1]
  int64_t* const dropped = totals + num_segments + 1;          // [S + 1] where a segment's dropped choices begin
  int64_t* const ranks = dropped + num_segments + 1;           // [chunks, S + 1] of a chunk's next choice
  const auto for_each_chunk = [&](const auto& body) {
    launch.parallel_for(num_chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        body(ranks + chunk * (num_segments + 1), p.tokens * chunk / num_chunks, p.tokens * (chunk + 1) / num_chunks);
      }
    });
  };
  for_each_chunk([&](int64_t* counts, int64_t begin, int64_t end) {
    std::fill(counts, counts + num_segments + 1, 0);
    for_each_choice(p, begin, end, [&](int64_t, int64_t segment) { ++counts[segment]; });
  });
  std::fill(totals, totals + num_segments + 1, 0);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    for (int64_t s = 0; s <= num_segments; ++s) {
      int64_t& rank = ranks[chunk * (num_segments + 1) + s];
      totals[s] += std::exchange(rank, totals[s]);
    }
  }

  const auto kept = [&](int64_t segment) {
    if (segment == num_segments) return int64_t{0};
    const bool is_bounded = p.capacity >= 0 && segment % p.memories() < p.num_memories;
    return is_bounded ? std::min(totals[segment], p.capacity) : totals[segment];
  };
  int64_t position = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    p.offsets[s] = static_cast<int32_t>(position), p.counts[s] = static_cast<int32_t>(totals[s]);
    position += kept(s);
  }
  p.offsets[num_segments] = static_cast<int32_t>(position);
  for (int64_t s = 0; s <= num_segments; ++s) dropped[s] = position, position += totals[s] - kept(s);

  for_each_chunk([&](int64_t* next_rank, int64_t begin, int64_t end) {
    for_each_choice(p, begin, end, [&](int64_t row, int64_t s) {
      const int64_t rank = next_rank[s]++, num_kept = kept(s);
      const int64_t first = p.drop_oldest ? totals[s] - num_kept : 0;
      const bool is_kept = rank >= first && rank < first + num_kept;
      const int64_t to = is_kept ? p.offsets[s] + rank - first : dropped[s] + (rank < first ? rank : rank - num_kept);
      p.rows[to] = static_cast<int32_t>(row), p.positions[row] = static_cast<int32_t>(to);
    });
  });
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
