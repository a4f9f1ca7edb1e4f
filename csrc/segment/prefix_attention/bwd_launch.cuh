// Definition of prefix_attention_bwd_of.
#pragma once
#include "segment/prefix_attention/bwd_kernels.cuh"
#include "segment/prefix_attention/launch_impl.cuh"

namespace remora {

template <typename T>
Error prefix_attention_bwd_of(const PrefixAttentionBwdParams& op, bool is_aligned, const Launch& where) {
  const AttentionShape& shape = op.in.shape;
  PrefixBwdKernelParams p{.op = op, .is_aligned = is_aligned};
  AttentionLauncher launch(where);
  constexpr int kTokens = kTokenThreads / 32;
  with_head_dim(shape.head_dim, [&](auto head_dim) {
    constexpr int HEAD_DIM = decltype(head_dim)::value;
    launch(prefix_attention_bwd_tokens_kernel<T, HEAD_DIM>, (shape.batch * shape.seqlen + kTokens - 1) / kTokens,
           shape.num_kv_heads, 1, kTokenThreads, 0, p);
    if (op.dsink != nullptr) launch(prefix_attention_bwd_sink_kernel, shape.num_heads, 1, 1, kSinkThreads, 0, p);
    using Rows = PrefixBwdRowsTraits<T, HEAD_DIM>;
    launch(prefix_attention_bwd_rows_kernel<T, HEAD_DIM>, op.in.row_slots(Rows::BLOCK_M).count(), shape.num_kv_heads, 1,
           Rows::kNumThreads, Rows::SMEM_SIZE, p);
    using Keys = PrefixBwdKeysTraits<T, HEAD_DIM>;
    for (p.source = 0; p.source < kNumKeySources; ++p.source) {
      if (op.in.sources[p.source].length == 0) continue;
      launch(prefix_attention_bwd_keys_kernel<T, HEAD_DIM>, op.in.key_slots(p.source, Keys::BLOCK_M).count(),
             shape.num_kv_heads, Keys::kIsSplit ? 2 : 1, Keys::kNumThreads, Keys::SMEM_SIZE, p);
    }
  });
  return launch.error();
}

}  // namespace remora
