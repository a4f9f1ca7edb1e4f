// Torch side of prefix attention: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "segment/prefix_attention/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

AttentionStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

Tensor none_like(const Tensor& like) { return new_tensor(like, {0}, like.scalar_type()); }

struct PrefixInputs {
  PrefixAttentionInputs params{};
  Allocations allocations;
  ScalarType type, state_type;

  PrefixInputs(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_self,
               const OptionalTensor& v_self, const OptionalTensor& k_win, const OptionalTensor& v_win,
               const OptionalTensor& bias, const OptionalTensor& sink, const OptionalTensor& n_visible,
               const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, int64_t stride, int64_t shift,
               int64_t window, int64_t window_shift, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q must be [B, T, H, D], k [B, S, Hk, D]");
    params.dtype = dtype_of(q, "q");
    params.state_dtype = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    type = q.scalar_type(), state_type = scalar_type_of(params.state_dtype);
    const int64_t batch = q.size(0), seqlen = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
    const int64_t num_keys = k.size(1), num_kv_heads = k.size(2);
    STD_TORCH_CHECK(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, "the heads of k must divide those of q");
    STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim, "D must be in 1...256");
    constexpr int64_t kLimit = 1 << 30;
    STD_TORCH_CHECK(seqlen < kLimit && num_keys < kLimit, "T and S must be below 2^30");
    STD_TORCH_CHECK(stride >= 1 && stride <= kLimit && shift >= -kLimit && shift < kLimit, "stride or shift too large");
    STD_TORCH_CHECK(window >= 0 && window <= kLimit && window_shift >= -kLimit && window_shift < kLimit,
                    "window or window_shift too large");
    params.shape = {.batch = batch,
                    .seqlen = seqlen,
                    .num_heads = num_heads,
                    .num_kv_heads = num_kv_heads,
                    .head_dim = head_dim,
                    .num_seqs = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : batch};
    STD_TORCH_CHECK(cu_seqlens.has_value() == cu_seqlens_k.has_value(), "cu_seqlens needs cu_seqlens_k");
    STD_TORCH_CHECK(!cu_seqlens.has_value() || (batch == 1 && params.shape.num_seqs >= 1),
                    "cu_seqlens needs B == 1 and at least two entries");
    STD_TORCH_CHECK(k_self.has_value() == v_self.has_value(), "k_self needs v_self");
    STD_TORCH_CHECK(k_win.has_value() == v_win.has_value(), "k_win needs v_win");
    check_dense(cu_seqlens, "cu_seqlens", {params.shape.num_seqs + 1}, ScalarType::Int);
    check_dense(cu_seqlens_k, "cu_seqlens_k", {params.shape.num_seqs + 1}, ScalarType::Int);
    check_dense(n_visible, "n_visible", {batch, seqlen}, ScalarType::Int);
    check_dense(sink, "sink", {num_heads}, state_type);

    params.scale = scale;
    params.q = rows(q, "q", {batch, seqlen, num_heads, head_dim}, params.q_stride);
    if (k_self.has_value()) {
      params.k_self = rows(*k_self, "k_self", {batch, seqlen, num_kv_heads, head_dim}, params.k_self_stride);
      params.v_self = rows(*v_self, "v_self", {batch, seqlen, num_kv_heads, head_dim}, params.v_self_stride);
    }
    params.sink = data_or_null(sink);
    params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
    AttentionKeys& prefix = params.sources[0];
    fill(prefix, k, v, "k", "v", num_keys, cu_seqlens_k);
    prefix.rule = {static_cast<int32_t>(stride), static_cast<int32_t>(shift), INT32_MAX};
    prefix.n_visible = static_cast<const int32_t*>(data_or_null(n_visible));
    if (bias.has_value()) {
      check_shape(*bias, "bias", {batch, num_heads, num_keys});
      STD_TORCH_CHECK(bias->scalar_type() == state_type, "bias has the wrong dtype");
      STD_TORCH_CHECK(bias->stride(2) == 1 || num_keys <= 1, "bias must be contiguous along the summaries");
      prefix.bias = bias->const_data_ptr(), prefix.bias_batch = bias->stride(0), prefix.bias_head = bias->stride(1);
    }
    AttentionKeys& band = params.sources[1];
    if (k_win.has_value() && window > 0) {
      STD_TORCH_CHECK(k_win->dim() == 4 && k_win->size(1) < kLimit, "k_win must be [B, Tw, Hk, D], Tw below 2^30");
      fill(band, *k_win, *v_win, "k_win", "v_win", k_win->size(1), cu_seqlens);
    }
    band.rule = {1, static_cast<int32_t>(window_shift), static_cast<int32_t>(window)};
    allocations.input(bias, "bias"), allocations.input(sink, "sink"), allocations.input(n_visible, "n_visible");
    allocations.input(cu_seqlens, "cu_seqlens"), allocations.input(cu_seqlens_k, "cu_seqlens_k");
  }

  const void* rows(const Tensor& x, const char* name, std::initializer_list<int64_t> shape, AttentionStrides& stride) {
    check_shape(x, name, shape);
    STD_TORCH_CHECK(dtype_of(x, name) == params.dtype, name, " must have the dtype of q");
    STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, name, " must be contiguous along D");
    stride = strides_of(x);
    allocations.input(x, name);
    return x.numel() > 0 ? x.const_data_ptr() : nullptr;
  }

  void fill(AttentionKeys& keys, const Tensor& k, const Tensor& v, const char* k_name, const char* v_name,
            int64_t length, const OptionalTensor& offsets) {
    const AttentionShape& s = params.shape;
    keys.k = rows(k, k_name, {s.batch, length, s.num_kv_heads, s.head_dim}, keys.k_stride);
    keys.v = rows(v, v_name, {s.batch, length, s.num_kv_heads, s.head_dim}, keys.v_stride);
    keys.length = length;
    keys.offsets = static_cast<const int32_t*>(data_or_null(offsets));
  }

  bool empty() const { return params.shape.batch * params.shape.seqlen * params.shape.num_heads == 0; }
};

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_self,
                               const OptionalTensor& v_self, const OptionalTensor& k_win, const OptionalTensor& v_win,
                               const OptionalTensor& bias, const OptionalTensor& sink, const OptionalTensor& n_visible,
                               const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, int64_t stride,
                               int64_t shift, int64_t window, int64_t window_shift, double scale) {
  const DeviceScope device(q);
  PrefixInputs in(q, k, v, k_self, v_self, k_win, v_win, bias, sink, n_visible, cu_seqlens, cu_seqlens_k, stride, shift,
                  window, window_shift, scale);
  const AttentionShape& s = in.params.shape;
  Tensor o = new_tensor(q, {s.batch, s.seqlen, s.num_heads, s.head_dim}, in.type);
  Tensor lse = new_tensor(q, {s.batch, s.seqlen, s.num_heads}, in.state_type);
  if (in.empty()) return {o, lse};

  PrefixAttentionFwdParams params{};
  params.in = in.params;
  params.o = o.mutable_data_ptr(), params.lse = lse.mutable_data_ptr();
  const Tensor workspace = new_workspace(q, prefix_attention_fwd_workspace(params));
  params.workspace = data_or_null(workspace);
  in.allocations.output(o, "o"), in.allocations.output(lse, "lse"), in.allocations.output(workspace, "workspace");
  check_launch(prefix_attention_fwd(params, launch_on(q)));
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_self, const OptionalTensor& v_self,
    const OptionalTensor& k_win, const OptionalTensor& v_win, const OptionalTensor& bias, const OptionalTensor& sink,
    const OptionalTensor& n_visible, const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
    const Tensor& o, const Tensor& lse, const Tensor& d_o, const OptionalTensor& d_lse, int64_t stride, int64_t shift,
    int64_t window, int64_t window_shift, double scale) {
  const DeviceScope device(q);
  PrefixInputs in(q, k, v, k_self, v_self, k_win, v_win, bias, sink, n_visible, cu_seqlens, cu_seqlens_k, stride, shift,
                  window, window_shift, scale);
  const AttentionShape& s = in.params.shape;
  check_dense(o, "o", {s.batch, s.seqlen, s.num_heads, s.head_dim}, in.type);
  check_dense(lse, "lse", {s.batch, s.seqlen, s.num_heads}, in.state_type);
  check_dense(d_lse, "d_lse", {s.batch, s.seqlen, s.num_heads}, in.state_type);
  PrefixAttentionBwdParams params{};
  params.d_o = in.rows(d_o, "d_o", {s.batch, s.seqlen, s.num_heads, s.head_dim}, params.d_o_stride);
  const auto gradient_of = [&](const OptionalTensor& x) {
    return x.has_value() ? new_tensor(q, {x->size(0), x->size(1), x->size(2), x->size(3)}, in.type) : none_like(q);
  };
  Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v);
  Tensor dk_self = gradient_of(k_self), dv_self = gradient_of(v_self);
  Tensor dk_win = gradient_of(k_win), dv_win = gradient_of(v_win);
  Tensor dbias = bias.has_value() ? new_tensor(q, {s.batch, s.num_heads, k.size(1)}, in.state_type) : none_like(lse);
  Tensor dsink = sink.has_value() ? new_tensor(q, {s.num_heads}, in.state_type) : none_like(lse);
  if (in.params.sources[1].length == 0) torch::stable::zero_(dk_win), torch::stable::zero_(dv_win);
  if (in.empty()) {
    for (Tensor* x : {&dk, &dv, &dk_win, &dv_win, &dbias, &dsink}) torch::stable::zero_(*x);
    return {dq, dk, dv, dk_self, dv_self, dk_win, dv_win, dbias, dsink};
  }

  params.in = in.params;
  params.o = o.const_data_ptr(), params.lse = lse.const_data_ptr(), params.d_lse = data_or_null(d_lse);
  params.dq = dq.mutable_data_ptr();
  params.dk[0] = data_or_null(dk), params.dv[0] = data_or_null(dv);
  params.dk[1] = data_or_null(dk_win), params.dv[1] = data_or_null(dv_win);
  params.dk_self = data_or_null(dk_self), params.dv_self = data_or_null(dv_self);
  params.dbias = data_or_null(dbias), params.dsink = data_or_null(dsink);
  const Tensor workspace = new_workspace(q, prefix_attention_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  in.allocations.input(o, "o"), in.allocations.input(lse, "lse"), in.allocations.input(d_lse, "d_lse");
  in.allocations.output(dq, "dq"), in.allocations.output(dk, "dk"), in.allocations.output(dv, "dv");
  in.allocations.output(dk_self, "dk_self"), in.allocations.output(dv_self, "dv_self");
  in.allocations.output(dk_win, "dk_win"), in.allocations.output(dv_win, "dv_win");
  in.allocations.output(dbias, "dbias"), in.allocations.output(dsink, "dsink");
  in.allocations.output(workspace, "workspace");
  check_launch(prefix_attention_bwd(params, launch_on(q)));
  return {dq, dk, dv, dk_self, dv_self, dk_win, dv_win, dbias, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("prefix_attention_fwd", TORCH_BOX(&fwd));
  m.impl("prefix_attention_bwd", TORCH_BOX(&bwd));
}

}  // namespace remora
