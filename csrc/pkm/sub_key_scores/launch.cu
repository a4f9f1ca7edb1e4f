// CUDA entry points of the scores of chosen sub-keys.
#include "pkm/sub_key_scores/launch.h"

#include <algorithm>

#include "pkm/sub_key_scores/kernels.cuh"

namespace remora {
namespace {

constexpr Error kNoFloat64 = "sub_key_scores on CUDA: float64 is not supported";

Error message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// CTAs of a span of tokens.
int64_t num_key_ctas(const SubKeyScoresParams& p) {
  return p.groups * ceil_div(p.num_keys, kKeyBlock) * ceil_div(p.dims, kChannelBlock);
}

/// Spans that make about 1024 CTAs: they fill a device, and the workspace stays at 32 MiB. A function of the shape
/// alone.
int64_t num_spans(const SubKeyScoresParams& p) {
  return std::clamp<int64_t>(1024 / num_key_ctas(p), 1, std::min<int64_t>(32, ceil_div(p.tokens, 64)));
}

/// The parts of the workspace; counts bytes on a null pointer.
int64_t carve(SubKeyBwdKernelParams& params) {
  const SubKeyScoresParams& p = params.p;
  const int64_t num_entries = p.tokens * p.groups * p.chosen, num_rows = params.num_spans * p.groups * p.num_keys;
  const bool is_dot = p.score.kind == ScoreFunction::Kind::kDot;
  int64_t used = 0;
  const auto take = [&](auto*& part, int64_t count) {
    using Element = std::remove_reference_t<decltype(*part)>;
    if (p.workspace != nullptr) part = reinterpret_cast<Element*>(static_cast<char*>(p.workspace) + used);
    used += count * static_cast<int64_t>(sizeof(Element));
  };
  take(params.entry_keys, num_entries), take(params.entry_products, num_entries);
  take(params.entry_squares, is_dot ? 0 : num_entries);
  take(params.partial, num_rows * p.dims), take(params.partial_squares, is_dot ? 0 : num_rows);
  return used;
}

SubKeyBwdKernelParams bwd_params(const SubKeyScoresParams& p) {
  SubKeyBwdKernelParams params{.p = p, .num_spans = num_spans(p)};
  params.span_tokens = ceil_div(p.tokens, params.num_spans);
  return params;
}

template <typename T>
Error fwd(const SubKeyScoresParams& p, const Launch& launch) {
  const int64_t num_ctas = ceil_div(p.tokens * p.groups, kRowWarps);
  if (num_ctas > INT32_MAX) return "sub_key_scores: too many tokens";
  sub_key_scores_fwd_kernel<T>
      <<<static_cast<unsigned>(num_ctas), 32 * kRowWarps, 0, static_cast<cudaStream_t>(launch.stream)>>>(p);
  return message_of(cudaGetLastError());
}

template <typename T>
Error bwd(const SubKeyScoresParams& p, const Launch& launch) {
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  SubKeyBwdKernelParams params = bwd_params(p);
  carve(params);
  const int64_t num_row_ctas = ceil_div(p.tokens * p.groups, kRowWarps);
  const int64_t num_ctas = params.num_spans * num_key_ctas(p);
  const int64_t num_reduce_ctas = ceil_div(p.groups * p.num_keys * p.dims, kReduceThreads);
  if (std::max({num_row_ctas, num_ctas, num_reduce_ctas}) > INT32_MAX) return "sub_key_scores: too many tokens";
  const int64_t smem_size = kRowWarps * 16 * p.chosen;
  sub_key_scores_bwd_query_kernel<T>
      <<<static_cast<unsigned>(num_row_ctas), 32 * kRowWarps, smem_size, stream>>>(params);
  sub_key_scores_bwd_keys_kernel<T><<<static_cast<unsigned>(num_ctas), kChannelBlock, 0, stream>>>(params);
  sub_key_scores_reduce_kernel<T><<<static_cast<unsigned>(num_reduce_ctas), kReduceThreads, 0, stream>>>(params);
  return message_of(cudaGetLastError());
}

}  // namespace

Error sub_key_scores_fwd(const SubKeyScoresParams& params, const Launch& launch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return fwd<float>(params, launch);
    case DType::kBFloat16:
      return fwd<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return fwd<__half>(params, launch);
    default:
      return kNoFloat64;
  }
}

int64_t sub_key_scores_workspace(const SubKeyScoresParams& p) {
  SubKeyBwdKernelParams params = bwd_params(p);
  return carve(params);
}

Error sub_key_scores_bwd(const SubKeyScoresParams& params, const Launch& launch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return bwd<float>(params, launch);
    case DType::kBFloat16:
      return bwd<__nv_bfloat16>(params, launch);
    case DType::kFloat16:
      return bwd<__half>(params, launch);
    default:
      return kNoFloat64;
  }
}

}  // namespace remora
