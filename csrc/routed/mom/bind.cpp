// Torch side of Mixture-of-Memories: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "routed/mom/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

MomRouteParams route_params(const Tensor& logits, const OptionalTensor& mask, int64_t topk, bool renormalize,
                            bool with_losses, Allocations& allocations) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [R, M]");
  STD_TORCH_CHECK(topk >= 1 && topk <= logits.size(1) && logits.size(1) < INT32_MAX, "topk must be in 1...M");
  check_dense(mask, "mask", {logits.size(0)}, ScalarType::Byte);
  allocations.input(logits, "logits"), allocations.input(mask, "mask");
  MomRouteParams params{};
  params.dtype = dtype_of(logits, "logits");
  params.rows = logits.size(0), params.num_memories = logits.size(1), params.topk = topk;
  params.renormalize = renormalize, params.with_losses = with_losses;
  params.logits = logits.const_data_ptr(), params.mask = static_cast<const uint8_t*>(data_or_null(mask));
  return params;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_fwd(const Tensor& logits, const OptionalTensor& mask,
                                                             int64_t topk, bool renormalize, bool with_losses) {
  const DeviceScope device(logits);
  Allocations allocations;
  MomRouteParams params = route_params(logits, mask, topk, renormalize, with_losses, allocations);
  const ScalarType wide = wide_type(logits);
  Tensor weights = new_tensor(logits, {params.rows, topk}, wide);
  Tensor indices = new_tensor(logits, {params.rows, topk}, ScalarType::Int);
  Tensor lse = new_tensor(logits, {params.rows}, wide);
  Tensor losses = new_tensor(logits, {with_losses ? 2 : 0}, wide);
  Tensor counts = new_tensor(logits, {with_losses ? params.num_memories + 1 : 0}, ScalarType::Int);
  if (params.rows == 0) {
    torch::stable::zero_(losses), torch::stable::zero_(counts);
    return {weights, indices, lse, losses, counts};
  }
  params.weights = weights.mutable_data_ptr(), params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  params.lse = lse.mutable_data_ptr(), params.losses = data_or_null(losses);
  params.counts = static_cast<int32_t*>(data_or_null(counts));
  const Tensor workspace = new_workspace(logits, with_losses ? mom_route_workspace(params) : 0);
  params.workspace = data_or_null(workspace);
  allocations.output(weights, "weights"), allocations.output(indices, "indices"), allocations.output(lse, "lse");
  allocations.output(losses, "losses"), allocations.output(counts, "counts");
  allocations.output(workspace, "workspace");
  check_launch(mom_route_fwd(params, launch_on(logits)));
  return {weights, indices, lse, losses, counts};
}

Tensor route_bwd(const Tensor& logits, const OptionalTensor& mask, const Tensor& weights, const Tensor& indices,
                 const Tensor& lse, const Tensor& counts, const Tensor& d_weights, const Tensor& d_losses,
                 bool renormalize, bool with_losses) {
  const DeviceScope device(logits);
  Allocations allocations;
  STD_TORCH_CHECK(weights.dim() == 2, "weights must be [R, k]");
  MomRouteParams params = route_params(logits, mask, weights.size(1), renormalize, with_losses, allocations);
  const ScalarType wide = wide_type(logits);
  check_dense(weights, "weights", {params.rows, params.topk}, wide);
  check_dense(indices, "indices", {params.rows, params.topk}, ScalarType::Int);
  check_dense(lse, "lse", {params.rows}, wide);
  check_dense(counts, "counts", {with_losses ? params.num_memories + 1 : 0}, ScalarType::Int);
  check_dense(d_weights, "d_weights", {params.rows, params.topk}, wide);
  check_dense(d_losses, "d_losses", {with_losses ? 2 : 0}, wide);
  Tensor d_logits = new_tensor(logits, {params.rows, params.num_memories}, logits.scalar_type());
  if (params.rows == 0) return d_logits;
  params.weights = weights.mutable_data_ptr(), params.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  params.lse = lse.mutable_data_ptr(), params.counts = static_cast<int32_t*>(data_or_null(counts));
  params.d_weights = d_weights.const_data_ptr(), params.d_losses = data_or_null(d_losses);
  params.d_logits = d_logits.mutable_data_ptr();
  allocations.input(weights, "weights"), allocations.input(indices, "indices"), allocations.input(lse, "lse");
  allocations.input(counts, "counts"), allocations.input(d_weights, "d_weights");
  allocations.input(d_losses, "d_losses"), allocations.output(d_logits, "d_logits");
  check_launch(mom_route_bwd(params, launch_on(logits)));
  return d_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(const Tensor& indices, const OptionalTensor& cu_seqlens,
                                                const OptionalTensor& mask, int64_t seqlen, int64_t num_memories,
                                                bool shared_memory, int64_t capacity, bool drop_oldest) {
  const DeviceScope device(indices);
  STD_TORCH_CHECK(indices.dim() == 2 && indices.size(1) >= 1, "indices must be [R, k]");
  RoutePlanParams params{};
  params.seqlen = seqlen, params.tokens = indices.size(0), params.topk = indices.size(1);
  STD_TORCH_CHECK(seqlen >= 0 && num_memories >= 1 && (seqlen == 0 ? params.tokens == 0 : params.tokens % seqlen == 0),
                  "seqlen must divide the tokens, num_memories must be positive");
  STD_TORCH_CHECK(!cu_seqlens.has_value() || cu_seqlens->numel() >= 2, "cu_seqlens needs two entries");
  params.num_seqs = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : (seqlen == 0 ? 0 : params.tokens / seqlen);
  params.num_memories = num_memories, params.shared_memory = shared_memory;
  params.capacity = capacity, params.drop_oldest = drop_oldest;
  STD_TORCH_CHECK(params.items() < INT32_MAX && params.segments() < INT32_MAX, "route_plan allows 2^31 - 2 choices");
  check_dense(indices, "indices", {params.tokens, params.topk}, ScalarType::Int);
  check_dense(mask, "mask", {params.tokens}, ScalarType::Byte);
  if (cu_seqlens.has_value()) check_dense(*cu_seqlens, "cu_seqlens", {params.num_seqs + 1}, ScalarType::Int);
  Tensor rows = new_tensor(indices, {params.items()}, ScalarType::Int);
  Tensor positions = new_tensor(indices, {params.items()}, ScalarType::Int);
  Tensor offsets = new_tensor(indices, {params.segments() + 1}, ScalarType::Int);
  Tensor counts = new_tensor(indices, {params.segments()}, ScalarType::Int);
  if (params.items() == 0) {
    return {rows, positions, torch::stable::zero_(offsets), torch::stable::zero_(counts)};
  }
  Allocations allocations;
  allocations.input(indices, "indices"), allocations.input(cu_seqlens, "cu_seqlens"), allocations.input(mask, "mask");
  params.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
  params.mask = static_cast<const uint8_t*>(data_or_null(mask));
  params.rows = static_cast<int32_t*>(rows.mutable_data_ptr());
  params.positions = static_cast<int32_t*>(positions.mutable_data_ptr());
  params.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  params.counts = static_cast<int32_t*>(data_or_null(counts));
  const Tensor workspace = new_workspace(indices, route_plan_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.output(rows, "rows"), allocations.output(positions, "positions");
  allocations.output(offsets, "offsets"), allocations.output(counts, "counts");
  allocations.output(workspace, "workspace");
  check_launch(route_plan(params, launch_on(indices)));
  return {rows, positions, offsets, counts};
}

MomCombineParams combine_params(const Tensor& o, const Tensor& weights, Allocations& allocations) {
  STD_TORCH_CHECK(o.dim() == 3 && o.is_contiguous() && weights.dim() == 2, "o must be [J, R, D], weights [R, k]");
  MomCombineParams params{};
  params.dtype = dtype_of(o, "o");
  params.choices = o.size(0), params.rows = o.size(1), params.channels = o.size(2), params.topk = weights.size(1);
  STD_TORCH_CHECK(params.choices == params.topk || params.choices == params.topk + 1, "o must have k or k + 1 choices");
  check_dense(weights, "weights", {params.rows, params.topk}, wide_type(o));
  params.o = data_or_null(o), params.weights = data_or_null(weights);
  allocations.input(o, "o"), allocations.input(weights, "weights");
  return params;
}

Tensor combine_fwd(const Tensor& o, const Tensor& weights) {
  const DeviceScope device(o);
  Allocations allocations;
  MomCombineParams params = combine_params(o, weights, allocations);
  Tensor out = new_tensor(o, {params.rows, params.channels}, o.scalar_type());
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  allocations.output(out, "out");
  check_launch(mom_combine_fwd(params, launch_on(o)));
  return out;
}

std::tuple<Tensor, Tensor> combine_bwd(const Tensor& o, const Tensor& weights, const Tensor& d_out) {
  const DeviceScope device(o);
  Allocations allocations;
  MomCombineParams params = combine_params(o, weights, allocations);
  check_dense(d_out, "d_out", {params.rows, params.channels}, o.scalar_type());
  Tensor d_o = new_tensor(o, {params.choices, params.rows, params.channels}, o.scalar_type());
  Tensor d_weights = new_tensor(o, {params.rows, params.topk}, wide_type(o));
  if (d_o.numel() == 0) return {d_o, torch::stable::zero_(d_weights)};
  params.d_out = d_out.const_data_ptr(), params.d_o = d_o.mutable_data_ptr();
  params.d_weights = d_weights.mutable_data_ptr();
  allocations.input(d_out, "d_out"), allocations.output(d_o, "d_o"), allocations.output(d_weights, "d_weights");
  check_launch(mom_combine_bwd(params, launch_on(o)));
  return {d_o, d_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("mom_route_fwd", TORCH_BOX(&route_fwd));
  m.impl("mom_route_bwd", TORCH_BOX(&route_bwd));
  m.impl("route_plan", TORCH_BOX(&plan));
  m.impl("mom_combine_fwd", TORCH_BOX(&combine_fwd));
  m.impl("mom_combine_bwd", TORCH_BOX(&combine_bwd));
}

}  // namespace remora
