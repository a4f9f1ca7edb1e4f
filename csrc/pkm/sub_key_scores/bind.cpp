// Torch side of the scores of chosen sub-keys: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "pkm/sub_key_scores/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

SubKeyScoresParams shared_params(const Tensor& query, const Tensor& keys, const Tensor& index,
                                 Allocations& allocations) {
  STD_TORCH_CHECK(query.dim() == 3 && query.is_contiguous(), "query must be contiguous [T, G, ds]");
  STD_TORCH_CHECK(keys.dim() == 3 && index.dim() == 3, "keys must be [G, n, ds], index [T, G, m]");
  SubKeyScoresParams params{};
  params.dtype = dtype_of(query, "query");
  params.tokens = query.size(0), params.groups = query.size(1), params.dims = query.size(2);
  params.num_keys = keys.size(1), params.chosen = index.size(2);
  STD_TORCH_CHECK(params.num_keys >= 1 && params.num_keys < INT32_MAX && params.chosen <= 1024 && params.dims >= 1,
                  "n and ds must be positive, m at most 1024");
  check_dense(keys, "keys", {params.groups, params.num_keys, params.dims}, query.scalar_type());
  check_dense(index, "index", {params.tokens, params.groups, params.chosen}, ScalarType::Int);
  params.query = data_or_null(query), params.keys = data_or_null(keys);
  params.index = static_cast<const int32_t*>(data_or_null(index));
  allocations.input(query, "query"), allocations.input(keys, "keys"), allocations.input(index, "index");
  return params;
}

ScalarType wide_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

Tensor fwd(const Tensor& query, const Tensor& keys, const Tensor& index) {
  const DeviceScope device(query);
  Allocations allocations;
  SubKeyScoresParams params = shared_params(query, keys, index, allocations);
  Tensor scores = new_tensor(query, {params.tokens, params.groups, params.chosen}, wide_type(params.dtype));
  if (scores.numel() == 0) return scores;
  params.scores = scores.mutable_data_ptr();
  allocations.output(scores, "scores");
  check_launch(sub_key_scores_fwd(params, launch_on(query)));
  return scores;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& query, const Tensor& keys, const Tensor& index, const Tensor& d_scores,
                               int64_t score, double tau, double eps) {
  const DeviceScope device(query);
  Allocations allocations;
  SubKeyScoresParams params = shared_params(query, keys, index, allocations);
  STD_TORCH_CHECK(score >= 0 && score <= 2 && (score == 0 || eps > 0), "score must be 0...2, eps positive");
  params.score = {static_cast<ScoreFunction::Kind>(score), tau, eps};
  check_dense(d_scores, "d_scores", {params.tokens, params.groups, params.chosen}, wide_type(params.dtype));
  Tensor d_query = new_tensor(query, {params.tokens, params.groups, params.dims}, query.scalar_type());
  Tensor d_keys = new_tensor(keys, {params.groups, params.num_keys, params.dims}, keys.scalar_type());
  if (d_query.numel() == 0) return {d_query, torch::stable::zero_(d_keys)};
  params.d_scores = data_or_null(d_scores);
  params.d_query = d_query.mutable_data_ptr(), params.d_keys = d_keys.mutable_data_ptr();
  const Tensor workspace = new_workspace(query, sub_key_scores_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.input(d_scores, "d_scores"), allocations.output(d_query, "d_query");
  allocations.output(d_keys, "d_keys"), allocations.output(workspace, "workspace");
  check_launch(sub_key_scores_bwd(params, launch_on(query)));
  return {d_query, d_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("sub_key_scores_fwd", TORCH_BOX(&fwd));
  m.impl("sub_key_scores_bwd", TORCH_BOX(&bwd));
}

}  // namespace remora
