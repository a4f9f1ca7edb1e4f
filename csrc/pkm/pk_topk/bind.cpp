// Torch side of the product-key selection: check, allocate, fill the params, launch. Compiled once per backend.
#include <algorithm>
#include <tuple>

#include "pkm/pk_topk/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

constexpr int64_t kMaxKeys = 8192, kMaxTopk = 1024;

/// Scores and indices of `params`, whose inputs and sizes are set, in tensors of the given shape.
std::tuple<Tensor, Tensor> run(PkTopkParams params, const Tensor& like, std::initializer_list<int64_t> shape,
                               Allocations& allocations) {
  STD_TORCH_CHECK(params.num_keys >= 1 && params.num_keys <= kMaxKeys, "n must be in 1...8192");
  STD_TORCH_CHECK(params.candidates >= 1 && params.candidates <= std::min(params.num_keys, kMaxTopk),
                  "candidates must be in 1...min(n, 1024)");
  STD_TORCH_CHECK(params.lowest >= 0 && params.lowest <= std::min(params.num_keys - params.candidates, kMaxTopk),
                  "lowest must be in 0...min(n - candidates, 1024)");
  STD_TORCH_CHECK(
      params.output == PkTopkParams::Output::kAxes ||
          (params.topk >= 1 && params.topk <= kMaxTopk && params.topk <= params.candidates * params.candidates),
      "topk must be in 1...min(candidates^2, 1024)");
  const bool is_double = params.dtype == DType::kFloat64;
  Tensor scores = new_tensor(like, shape, is_double ? ScalarType::Double : ScalarType::Float);
  Tensor index = new_tensor(like, shape, ScalarType::Int);
  if (scores.numel() == 0) return {scores, index};
  params.scores = scores.mutable_data_ptr(), params.index = static_cast<int32_t*>(index.mutable_data_ptr());
  const Tensor workspace = new_workspace(like, pk_topk_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.output(scores, "scores"), allocations.output(index, "index"), allocations.output(workspace, "workspace");
  check_launch(pk_topk(params, launch_on(like)));
  return {scores, index};
}

PkTopkParams scored_params(const Tensor& query, const Tensor& keys, int64_t score, double tau, double eps,
                           Allocations& allocations) {
  STD_TORCH_CHECK(query.dim() == 4 && query.is_contiguous(), "query must be contiguous [T, H, 2, ds]");
  STD_TORCH_CHECK(keys.dim() == 4, "keys must be [H, 2, n, ds]");
  STD_TORCH_CHECK(score >= 0 && score <= 2 && (score == 0 || eps > 0), "score must be 0...2, eps positive");
  PkTopkParams params{};
  params.dtype = dtype_of(query, "query");
  params.tokens = query.size(0), params.heads = query.size(1), params.dims = query.size(3);
  params.num_keys = keys.size(2);
  check_shape(query, "query", {params.tokens, params.heads, 2, params.dims});
  check_dense(keys, "keys", {params.heads, 2, params.num_keys, params.dims}, query.scalar_type());
  STD_TORCH_CHECK(params.dims >= 1, "ds must be positive");
  params.score = {static_cast<ScoreFunction::Kind>(score), tau, eps};
  params.query = data_or_null(query), params.keys = data_or_null(keys);
  allocations.input(query, "query"), allocations.input(keys, "keys");
  return params;
}

std::tuple<Tensor, Tensor> topk_fwd(const Tensor& query, const Tensor& keys, int64_t topk, int64_t candidates,
                                    int64_t score, double tau, double eps) {
  const DeviceScope device(query);
  Allocations allocations;
  PkTopkParams params = scored_params(query, keys, score, tau, eps, allocations);
  params.output = PkTopkParams::Output::kPairs, params.topk = topk, params.candidates = candidates;
  return run(params, query, {params.tokens, params.heads, topk}, allocations);
}

std::tuple<Tensor, Tensor> axis_topk(const Tensor& query, const Tensor& keys, int64_t candidates, int64_t lowest,
                                     int64_t score, double tau, double eps) {
  const DeviceScope device(query);
  Allocations allocations;
  PkTopkParams params = scored_params(query, keys, score, tau, eps, allocations);
  params.output = PkTopkParams::Output::kAxes, params.candidates = candidates, params.lowest = lowest;
  return run(params, query, {params.tokens, params.heads, 2, candidates + lowest}, allocations);
}

std::tuple<Tensor, Tensor> select_fwd(const Tensor& sub_scores, int64_t topk, int64_t candidates) {
  const DeviceScope device(sub_scores);
  STD_TORCH_CHECK(sub_scores.dim() == 4 && sub_scores.size(2) == 2 && sub_scores.is_contiguous(),
                  "sub_scores must be contiguous [T, H, 2, n]");
  Allocations allocations;
  PkTopkParams params{};
  params.dtype = dtype_of(sub_scores, "sub_scores");
  params.output = PkTopkParams::Output::kPairs, params.topk = topk, params.candidates = candidates;
  params.tokens = sub_scores.size(0), params.heads = sub_scores.size(1), params.num_keys = sub_scores.size(3);
  params.sub_scores = data_or_null(sub_scores);
  allocations.input(sub_scores, "sub_scores");
  return run(params, sub_scores, {params.tokens, params.heads, topk}, allocations);
}

Tensor select_bwd(const Tensor& slots, const Tensor& d_scores, int64_t num_keys) {
  const DeviceScope device(slots);
  STD_TORCH_CHECK(slots.dim() == 3, "slots must be [T, H, k]");
  PkSelectBwdParams params{};
  params.dtype = dtype_of(d_scores, "d_scores");
  params.tokens = slots.size(0), params.heads = slots.size(1), params.topk = slots.size(2);
  params.num_keys = num_keys;
  STD_TORCH_CHECK(num_keys >= 1 && num_keys <= kMaxKeys && params.topk >= 1 && params.topk <= kMaxTopk,
                  "n must be in 1...8192, k in 1...1024");
  STD_TORCH_CHECK(params.dtype == DType::kFloat64 || params.dtype == DType::kFloat32, "d_scores has the wrong dtype");
  check_dense(slots, "slots", {params.tokens, params.heads, params.topk}, ScalarType::Int);
  check_dense(d_scores, "d_scores", {params.tokens, params.heads, params.topk}, d_scores.scalar_type());
  Tensor d_sub_scores = new_tensor(slots, {params.tokens, params.heads, 2, num_keys}, d_scores.scalar_type());
  if (d_sub_scores.numel() == 0) return d_sub_scores;
  params.slots = static_cast<const int32_t*>(slots.const_data_ptr());
  params.d_scores = d_scores.const_data_ptr(), params.d_sub_scores = d_sub_scores.mutable_data_ptr();
  Allocations allocations;
  allocations.input(slots, "slots"), allocations.input(d_scores, "d_scores");
  allocations.output(d_sub_scores, "d_sub_scores");
  check_launch(pk_select_bwd(params, launch_on(slots)));
  return d_sub_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("pk_topk_fwd", TORCH_BOX(&topk_fwd));
  m.impl("pk_axis_topk", TORCH_BOX(&axis_topk));
  m.impl("pk_select_fwd", TORCH_BOX(&select_fwd));
  m.impl("pk_select_bwd", TORCH_BOX(&select_bwd));
}

}  // namespace remora
