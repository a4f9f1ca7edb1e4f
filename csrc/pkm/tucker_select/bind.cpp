// Torch side of the bilinear selection: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "pkm/tucker_select/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

std::tuple<Tensor, Tensor> select(const Tensor& query, const Tensor& keys, const Tensor& index, const Tensor& core,
                                  int64_t topk, int64_t positive) {
  const DeviceScope device(query);
  STD_TORCH_CHECK(query.dim() == 5 && keys.dim() == 5 && index.dim() == 4,
                  "query must be [T, H, 2, r, ds], keys [H, 2, r, n, ds], index [T, H, 2, m]");
  TuckerSelectParams params{};
  params.dtype = dtype_of(query, "query");
  const ScalarType wide = params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  params.tokens = query.size(0), params.heads = query.size(1), params.rank = query.size(3), params.dims = query.size(4);
  params.num_keys = keys.size(3), params.candidates = index.size(3), params.positive = positive, params.topk = topk;
  STD_TORCH_CHECK(params.rank >= 1 && params.rank <= 8 && params.candidates >= 1 && params.candidates <= 1024,
                  "r must be in 1...8, m in 1...1024");
  STD_TORCH_CHECK(params.num_keys >= 1 && params.num_keys < INT32_MAX && params.dims >= 1, "n and ds must be positive");
  STD_TORCH_CHECK(positive >= 1 && positive <= params.candidates, "positive must be in 1...m");
  STD_TORCH_CHECK(topk >= 1 && topk <= 1024 && topk <= params.num_pairs(), "topk must be in 1...min(pairs, 1024)");
  const int64_t T = params.tokens, H = params.heads, r = params.rank;
  check_dense(query, "query", {T, H, 2, r, params.dims}, query.scalar_type());
  check_dense(keys, "keys", {H, 2, r, params.num_keys, params.dims}, query.scalar_type());
  check_dense(index, "index", {T, H, 2, params.candidates}, ScalarType::Int);
  check_dense(core, "core", {H, r, r}, wide);
  Tensor chosen = new_tensor(query, {T, H, 2, topk}, ScalarType::Int);
  Tensor sub_scores = new_tensor(query, {T, H, 2, r, topk}, wide);
  if (chosen.numel() == 0) return {chosen, sub_scores};
  params.query = query.const_data_ptr(), params.keys = keys.const_data_ptr(), params.core = core.const_data_ptr();
  params.index = static_cast<const int32_t*>(index.const_data_ptr());
  params.chosen = static_cast<int32_t*>(chosen.mutable_data_ptr()), params.sub_scores = sub_scores.mutable_data_ptr();
  Allocations allocations;
  allocations.input(query, "query"), allocations.input(keys, "keys"), allocations.input(index, "index");
  allocations.input(core, "core"), allocations.output(chosen, "chosen"), allocations.output(sub_scores, "sub_scores");
  check_launch(tucker_select(params, launch_on(query)));
  return {chosen, sub_scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) { m.impl("tucker_select", TORCH_BOX(&select)); }

}  // namespace remora
