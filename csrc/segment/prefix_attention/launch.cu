// CUDA entry points of prefix attention.
#include "segment/prefix_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "segment/prefix_attention/launch.cuh"

namespace remora {
namespace {

constexpr Error kNoFloat64 = "prefix_attention on CUDA supports float32, bfloat16 and float16";

constexpr int64_t kMaxDecodeTokens = 8, kMinKeysPerSplit = 512, kMaxSplits = 32;

template <class Params, class Bf16, class Fp16, class Fp32>
Error dispatch(const Params& params, bool is_aligned, const Launch& launch, Bf16 bf16, Fp16 fp16, Fp32 fp32) {
  switch (params.in.dtype) {
    case DType::kBFloat16:
      return bf16(params, is_aligned, launch);
    case DType::kFloat16:
      return fp16(params, is_aligned, launch);
    case DType::kFloat32:
      return fp32(params, is_aligned, launch);
    default:
      return kNoFloat64;
  }
}

/// Whether every row of a tensor can be read in pieces of 16 bytes.
bool is_aligned(const void* data, const AttentionStrides& stride, int64_t element_size) {
  return (reinterpret_cast<uintptr_t>(data) | stride.batch * element_size | stride.token * element_size |
          stride.head * element_size) %
             16 ==
         0;
}

bool is_aligned(const PrefixAttentionInputs& in) {
  const int64_t size = size_of(in.dtype);
  bool aligned = in.shape.head_dim * size % 16 == 0 && is_aligned(in.q, in.q_stride, size) &&
                 is_aligned(in.k_self, in.k_self_stride, size) && is_aligned(in.v_self, in.v_self_stride, size);
  for (const AttentionKeys& keys : in.sources) {
    aligned = aligned && is_aligned(keys.k, keys.k_stride, size) && is_aligned(keys.v, keys.v_stride, size);
  }
  return aligned;
}

}  // namespace

AttentionSplits::AttentionSplits(const PrefixAttentionInputs& in) {
  const int64_t summaries = in.sources[0].length, band = in.sources[1].length;
  num_splits = 1;
  if (in.shape.seqlen <= kMaxDecodeTokens) {
    const int64_t keys = std::max(summaries, band);
    num_splits = static_cast<int>(std::clamp<int64_t>(keys / kMinKeysPerSplit, 1, kMaxSplits));
  }
  for (int i = 0; i < 2; ++i) {
    keys_per_split[i] = (in.sources[i].length + num_splits - 1) / num_splits;
  }
}

int64_t prefix_attention_fwd_workspace(const PrefixAttentionFwdParams& params) {
  const AttentionShape& s = params.in.shape;
  const int64_t num_splits = AttentionSplits(params.in).num_splits;
  return num_splits == 1 ? 0 : num_splits * s.batch * s.seqlen * s.num_heads * (s.head_dim + 1) * 4;
}

Error prefix_attention_fwd(const PrefixAttentionFwdParams& params, const Launch& launch) {
  return dispatch(params, is_aligned(params.in), launch, prefix_attention_fwd_of<__nv_bfloat16>,
                  prefix_attention_fwd_of<__half>, prefix_attention_fwd_of<float>);
}

int64_t prefix_attention_bwd_workspace(const PrefixAttentionBwdParams& params) {
  const AttentionShape& s = params.in.shape;
  return 2 * s.batch * s.seqlen * s.num_heads * 4;
}

Error prefix_attention_bwd(const PrefixAttentionBwdParams& params, const Launch& launch) {
  const bool aligned = is_aligned(params.in) && is_aligned(params.o, {}, 1) &&
                       is_aligned(params.d_o, params.d_o_stride, size_of(params.in.dtype));
  return dispatch(params, aligned, launch, prefix_attention_bwd_of<__nv_bfloat16>, prefix_attention_bwd_of<__half>,
                  prefix_attention_bwd_of<float>);
}

}  // namespace remora
