// Torch side of attention to chosen blocks: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "segment/gather_attention/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

HeadStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

/// Checked inputs of every call.
struct GatherInputs {
  Tensor q, k, v;
  GatherAttentionInputs in{};
  ScalarType wide;
  Allocations allocations;

  GatherInputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& idx,
               const OptionalTensor& weight, const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
               int64_t block, bool is_causal, double scale)
      : q(with_dense_rows(q_in)), k(with_dense_rows(k_in)), v(with_dense_rows(v_in)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && idx.dim() == 4,
                    "q must be [B, T, H, D], k and v [B, S, Hk, D], idx [B, T, Hs, n]");
    in.dtype = dtype_of(q, "q");
    const int64_t batch = q.size(0), seqlen = q.size(1), num_keys = k.size(1);
    in.num_heads = q.size(2), in.num_key_heads = k.size(2), in.dim = q.size(3);
    in.num_lists = idx.size(2), in.num_chosen = idx.size(3), in.block = block;
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "q, k and v must have one dtype");
    check_shape(k, "k", {batch, num_keys, in.num_key_heads, in.dim});
    check_shape(v, "v", {batch, num_keys, in.num_key_heads, in.dim});
    STD_TORCH_CHECK(in.dim >= 1 && in.dim <= 256, "D must be in 1...256");
    STD_TORCH_CHECK(block >= 1 && block <= kMaxGatherBlock, "block must be in 1...128");
    STD_TORCH_CHECK(in.num_key_heads >= 1 && in.num_heads >= 1 && in.num_heads % in.num_key_heads == 0,
                    "the heads of k must divide the heads of q");
    STD_TORCH_CHECK(in.num_lists == in.num_heads || in.num_lists == in.num_key_heads || in.num_lists == 1,
                    "idx must have a list per head of q, per head of k, or one");
    STD_TORCH_CHECK(num_keys < INT32_MAX && idx.numel() < INT32_MAX, "2^31 - 2 keys and chosen blocks are allowed");
    STD_TORCH_CHECK(cu_seqlens.has_value() == cu_seqlens_k.has_value(), "cu_seqlens needs cu_seqlens_k");
    in.packed.batch = in.packed.num_seqs = batch, in.packed.seqlen = seqlen, in.packed.key_seqlen = num_keys;
    if (cu_seqlens.has_value()) {
      STD_TORCH_CHECK(batch == 1 && cu_seqlens->numel() >= 2, "cu_seqlens needs B == 1 and at least two entries");
      in.packed.num_seqs = cu_seqlens->numel() - 1;
      check_dense(cu_seqlens, "cu_seqlens", {in.packed.num_seqs + 1}, ScalarType::Int);
      check_dense(cu_seqlens_k, "cu_seqlens_k", {in.packed.num_seqs + 1}, ScalarType::Int);
    }
    in.packed.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
    in.packed.cu_seqlens_k = static_cast<const int32_t*>(data_or_null(cu_seqlens_k));
    wide = in.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    check_dense(idx, "idx", {batch, seqlen, in.num_lists, in.num_chosen}, ScalarType::Int);
    check_dense(weight, "weight", {batch, seqlen, in.num_lists, in.num_chosen}, wide);
    in.is_causal = is_causal, in.scale = scale;
    in.q = data_or_null(q), in.k = data_or_null(k), in.v = data_or_null(v);
    in.q_stride = strides_of(q), in.k_stride = strides_of(k), in.v_stride = strides_of(v);
    in.idx = static_cast<const int32_t*>(data_or_null(idx)), in.weight = data_or_null(weight);
    allocations.input(q, "q"), allocations.input(k, "k"), allocations.input(v, "v"), allocations.input(idx, "idx");
    allocations.input(weight, "weight"), allocations.input(cu_seqlens, "cu_seqlens");
    allocations.input(cu_seqlens_k, "cu_seqlens_k");
  }

  Tensor like_q() const { return new_tensor(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type()); }
  Tensor like_k() const { return new_tensor(k, {k.size(0), k.size(1), k.size(2), k.size(3)}, q.scalar_type()); }
  /// lse or its gradient, [B, T, H] or [B, T, H, n].
  Tensor new_lse() const {
    return in.is_two_level() ? new_tensor(q, {q.size(0), q.size(1), q.size(2), in.num_chosen}, wide)
                             : new_tensor(q, {q.size(0), q.size(1), q.size(2)}, wide);
  }
  void check_lse(const OptionalTensor& lse, const char* name) const {
    if (in.is_two_level()) {
      check_dense(lse, name, {q.size(0), q.size(1), q.size(2), in.num_chosen}, wide);
    } else {
      check_dense(lse, name, {q.size(0), q.size(1), q.size(2)}, wide);
    }
  }
};

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& idx,
                               const OptionalTensor& weight, const OptionalTensor& cu_seqlens,
                               const OptionalTensor& cu_seqlens_k, int64_t block, bool causal, double scale) {
  const DeviceScope device(q);
  GatherInputs inputs(q, k, v, idx, weight, cu_seqlens, cu_seqlens_k, block, causal, scale);
  GatherAttentionFwdParams params{};
  params.in = inputs.in;
  Tensor o = inputs.like_q(), lse = inputs.new_lse();
  if (o.numel() == 0) return {o, lse};
  params.o = o.mutable_data_ptr(), params.lse = data_or_null(lse);
  inputs.allocations.output(o, "o"), inputs.allocations.output(lse, "lse");
  check_launch(gather_attention_fwd(params, launch_on(q)));
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& idx,
                                               const OptionalTensor& weight, const OptionalTensor& cu_seqlens,
                                               const OptionalTensor& cu_seqlens_k, const Tensor& o, const Tensor& lse,
                                               const Tensor& order, const Tensor& rows, const Tensor& starts,
                                               const Tensor& d_o_in, const OptionalTensor& d_lse, int64_t block,
                                               bool causal, double scale) {
  const DeviceScope device(q);
  GatherInputs inputs(q, k, v, idx, weight, cu_seqlens, cu_seqlens_k, block, causal, scale);
  const GatherAttentionInputs& in = inputs.in;
  const Tensor d_o = with_dense_rows(d_o_in);
  check_dense(o, "o", {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  check_shape(d_o, "d_o", {q.size(0), q.size(1), q.size(2), q.size(3)});
  STD_TORCH_CHECK(d_o.scalar_type() == q.scalar_type(), "d_o must have the dtype of q");
  inputs.check_lse(lse, "lse"), inputs.check_lse(d_lse, "d_lse");
  STD_TORCH_CHECK(rows.dim() == 1, "rows must be [R]");
  check_dense(order, "order", {idx.numel()}, ScalarType::Int);
  check_dense(rows, "rows", {rows.size(0)}, ScalarType::Int);
  check_dense(starts, "starts", {rows.size(0) + 1}, ScalarType::Int);
  Tensor dq = inputs.like_q(), dk = inputs.like_k(), dv = inputs.like_k();
  Tensor dweight = new_tensor(
      q, {weight.has_value() ? q.size(0) : 0, q.size(1), in.num_lists, in.num_chosen, in.weight_parts()}, inputs.wide);
  if (dk.numel() > 0) torch::stable::zero_(dk), torch::stable::zero_(dv);
  if (in.num_lookups() == 0 || dk.numel() == 0) {
    if (dq.numel() > 0) torch::stable::zero_(dq);
    if (dweight.numel() > 0) torch::stable::zero_(dweight);
    return {dq, dk, dv, dweight};
  }
  GatherAttentionBwdParams params{};
  params.in = in;
  params.o = o.const_data_ptr(), params.lse = lse.const_data_ptr(), params.d_o = d_o.const_data_ptr();
  params.d_o_stride = strides_of(d_o), params.d_lse = data_or_null(d_lse);
  params.order = static_cast<const int32_t*>(order.const_data_ptr());
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.starts = static_cast<const int32_t*>(starts.const_data_ptr()), params.max_rows = rows.size(0);
  params.dq = dq.mutable_data_ptr(), params.dk = dk.mutable_data_ptr(), params.dv = dv.mutable_data_ptr();
  params.dweight = data_or_null(dweight);
  const Tensor workspace = new_workspace(q, gather_attention_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  Allocations& allocations = inputs.allocations;
  allocations.input(o, "o"), allocations.input(lse, "lse"), allocations.input(d_o, "d_o");
  allocations.input(d_lse, "d_lse"), allocations.input(order, "order"), allocations.input(rows, "rows");
  allocations.input(starts, "starts"), allocations.output(dq, "dq"), allocations.input(dk, "dk");
  allocations.input(dv, "dv"), allocations.output(dweight, "dweight"), allocations.output(workspace, "workspace");
  check_launch(gather_attention_bwd(params, launch_on(q)));
  return {dq, dk, dv, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("gather_attention_fwd", TORCH_BOX(&fwd));
  m.impl("gather_attention_bwd", TORCH_BOX(&bwd));
}

}  // namespace remora
