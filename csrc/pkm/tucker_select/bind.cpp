// Torch side of the bilinear selection: check, allocate, fill the params, launch. Compiled once per backend.
#include "pkm/tucker_select/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

Tensor select(const Tensor& sub_scores, const Tensor& core, int64_t topk, int64_t positive) {
  const DeviceScope device(sub_scores);
  STD_TORCH_CHECK(sub_scores.dim() == 5, "sub_scores must be [T, H, 2, r, m]");
  TuckerSelectParams params{};
  params.dtype = dtype_of(sub_scores, "sub_scores");
  STD_TORCH_CHECK(params.dtype == DType::kFloat64 || params.dtype == DType::kFloat32, "sub_scores has the wrong dtype");
  params.tokens = sub_scores.size(0), params.heads = sub_scores.size(1), params.rank = sub_scores.size(3);
  params.candidates = sub_scores.size(4), params.positive = positive, params.topk = topk;
  STD_TORCH_CHECK(params.rank >= 1 && params.rank <= 8 && params.candidates >= 1 && params.candidates <= 1024,
                  "r must be in 1...8, m in 1...1024");
  STD_TORCH_CHECK(positive >= 1 && positive <= params.candidates, "positive must be in 1...m");
  STD_TORCH_CHECK(topk >= 1 && topk <= 1024 && topk <= params.num_pairs(), "topk must be in 1...min(pairs, 1024)");
  check_dense(sub_scores, "sub_scores", {params.tokens, params.heads, 2, params.rank, params.candidates},
              sub_scores.scalar_type());
  check_dense(core, "core", {params.heads, params.rank, params.rank}, sub_scores.scalar_type());
  Tensor pairs = new_tensor(sub_scores, {params.tokens, params.heads, topk}, ScalarType::Int);
  if (pairs.numel() == 0) return pairs;
  params.sub_scores = sub_scores.const_data_ptr(), params.core = core.const_data_ptr();
  params.pairs = static_cast<int32_t*>(pairs.mutable_data_ptr());
  Allocations allocations;
  allocations.input(sub_scores, "sub_scores"), allocations.input(core, "core"), allocations.output(pairs, "pairs");
  check_launch(tucker_select(params, launch_on(sub_scores)));
  return pairs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) { m.impl("tucker_select", TORCH_BOX(&select)); }

}  // namespace remora
