// Hands the tasks of prefix attention to threads.
#include "segment/prefix_attention/cpu.h"

#include <algorithm>

#include "common/cpu/tasks.h"
#include "segment/prefix_attention/launch.h"

namespace remora {
namespace {

constexpr Error kNoMemory = "out of memory for the scratch buffers of prefix_attention";

/// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 18;

/// The backward pass goes through a sequence once if there are enough sequences and key heads for the threads, and the
/// gradients of its keys fit a cache.
constexpr int64_t kMinSequenceTasks = 8, kMaxSequenceGradients = 1 << 20;

int64_t num_keys(const PrefixAttentionInputs& in) {
  int64_t keys = 1;
  for (const AttentionKeys& source : in.sources) keys += std::min<int64_t>(source.length, source.rule.width);
  return keys;
}

int64_t grain(const PrefixAttentionInputs& in, int64_t rows) {
  return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, rows * num_keys(in) * in.shape.head_dim));
}

template <class Body>
bool for_each_block(const PrefixAttentionInputs& in, const AttentionSlots& slots, const Launch& launch,
                    int64_t scratch_bytes, const Body& body) {
  const int64_t heads = in.shape.num_kv_heads;
  return run_tasks(launch.parallel_for, slots.count() * heads, grain(in, kCpuBlockRows), scratch_bytes,
                   [&](int64_t i, void* scratch) { body(i / heads, i % heads, scratch); });
}

}  // namespace

int64_t prefix_attention_fwd_workspace(const PrefixAttentionFwdParams&) { return 0; }

Error prefix_attention_fwd(const PrefixAttentionFwdParams& params, const Launch& launch) {
  const PrefixAttentionCpuKernels& kernels = prefix_attention_kernels(params.in.dtype);
  const AttentionSlots slots = params.in.row_slots(kCpuBlockRows);
  const bool ok = for_each_block(params.in, slots, launch, kernels.fwd_scratch(params.in),
                                 [&](int64_t i, int64_t kv_head, void* scratch) {
                                   // late rows see most: they go first
                                   kernels.fwd(params, slots.count() - 1 - i, kv_head, scratch);
                                 });
  return ok ? nullptr : kNoMemory;
}

int64_t prefix_attention_bwd_workspace(const PrefixAttentionBwdParams& params) {
  const AttentionShape& s = params.in.shape;
  return 2 * s.batch * s.seqlen * s.num_heads * size_of(params.in.state_dtype);
}

Error prefix_attention_bwd(const PrefixAttentionBwdParams& params, const Launch& launch) {
  const PrefixAttentionCpuKernels& kernels = prefix_attention_kernels(params.in.dtype);
  const PrefixAttentionInputs& in = params.in;
  const AttentionShape& s = in.shape;
  constexpr int64_t kTokens = 16;
  const int64_t tokens = s.batch * s.seqlen;
  bool ok = run_tasks(
      launch.parallel_for, (tokens + kTokens - 1) / kTokens, grain(in, kTokens), 64,
      [&](int64_t i, void*) { kernels.bwd_tokens(params, i * kTokens, std::min(kTokens, tokens - i * kTokens)); });
  if (params.dsink) {
    ok &= run_tasks(launch.parallel_for, s.num_heads, 1, 64,
                    [&](int64_t head, void*) { kernels.bwd_sink(params, head); });
  }

  const int64_t keys = in.sources[0].length + in.sources[1].length;
  if (s.num_seqs * s.num_kv_heads >= kMinSequenceTasks && keys * s.head_dim <= kMaxSequenceGradients) {
    // pseudo-sequences before and behind those of cu_seqlens
    const int64_t extra = in.cu_seqlens ? 1 : 0, heads = s.num_kv_heads;
    ok &= run_tasks(
        launch.parallel_for, (s.num_seqs + 2 * extra) * heads, 1, kernels.bwd_scratch(in, keys),
        [&](int64_t i, void* scratch) { kernels.bwd_sequence(params, i / heads - extra, i % heads, scratch); });
    return ok ? nullptr : kNoMemory;
  }
  const int64_t scratch_bytes = kernels.bwd_scratch(in, kCpuBlockKeys);
  const AttentionSlots rows = in.row_slots(kCpuBlockRows);
  ok &= for_each_block(in, rows, launch, scratch_bytes, [&](int64_t i, int64_t kv_head, void* scratch) {
    kernels.bwd_queries(params, rows.count() - 1 - i, kv_head, scratch);
  });
  for (int source = 0; source < kNumKeySources; ++source) {
    if (in.sources[source].length == 0) continue;
    ok &= for_each_block(in, in.key_slots(source, kCpuBlockKeys), launch, scratch_bytes,
                         [&](int64_t slot, int64_t kv_head, void* scratch) {
                           kernels.bwd_keys(params, source, slot, kv_head, scratch);
                         });
  }
  return ok ? nullptr : kNoMemory;
}

}  // namespace remora
