// Definition of prefix_attention_fwd_of.
#pragma once
#include "segment/prefix_attention/fwd_kernel.cuh"
#include "segment/prefix_attention/launch_impl.cuh"

namespace remora {

template <typename T>
Error prefix_attention_fwd_of(const PrefixAttentionFwdParams& op, bool is_aligned, const Launch& where) {
  const AttentionSplits splits(op.in);
  const AttentionShape& shape = op.in.shape;
  PrefixFwdKernelParams p{.op = op, .num_splits = splits.num_splits, .is_aligned = is_aligned};
  AttentionLauncher launch(where);
  with_head_dim(shape.head_dim, [&](auto head_dim) {
    const auto run = [&](auto is_decode) {
      constexpr int HEAD_DIM = decltype(head_dim)::value;
      constexpr bool kIsDecode = decltype(is_decode)::value;
      using Traits = PrefixFwdTraits<T, HEAD_DIM, kIsDecode>;
      for (int i = 0; i < kNumKeySources; ++i) {
        p.tiles_per_split[i] = static_cast<int>((splits.keys_per_split[i] + Traits::BLOCK_N - 1) / Traits::BLOCK_N);
      }
      launch(prefix_attention_fwd_kernel<T, HEAD_DIM, kIsDecode>, op.in.row_slots(Traits::BLOCK_M).count(),
             shape.num_kv_heads, p.num_splits, Traits::kNumThreads, Traits::SMEM_SIZE, p);
    };
    if (shape.seqlen * shape.group() <= 16) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  });
  if (p.num_splits > 1) {
    const int64_t rows = shape.batch * shape.seqlen * shape.num_heads;
    launch(prefix_attention_combine_kernel<T>, (rows + kCombineThreads / 32 - 1) / (kCombineThreads / 32), 1, 1,
           kCombineThreads, 0, p);
  }
  return launch.error();
}

}  // namespace remora
