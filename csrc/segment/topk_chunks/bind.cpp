// Torch side of the selection of chunks: check, allocate, fill the params, launch. Compiled once per backend.
#include <algorithm>
#include <tuple>

#include "segment/topk_chunks/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

constexpr int64_t kMaxTopk = 512;

const int32_t* int_data(const OptionalTensor& x) { return static_cast<const int32_t*>(data_or_null(x)); }

/// Checked inputs of every call.
struct ChunkInputs {
  Tensor q, k_sum;
  ChunkScoreShape shape{};
  ScalarType wide;
  Allocations allocations;

  ChunkInputs(const Tensor& q_in, const Tensor& k_in, const OptionalTensor& w, const OptionalTensor& cu_seqlens,
              const OptionalTensor& cu_seqlens_k, int64_t num_lists, double scale)
      : q(with_dense_rows(q_in)), k_sum(with_dense_rows(k_in)) {
    STD_TORCH_CHECK(q.dim() == 4 && k_sum.dim() == 4, "q must be [B, T, H, D], k_sum [B, S, Hk, D]");
    shape.dtype = dtype_of(q, "q");
    const int64_t batch = q.size(0), seqlen = q.size(1), num_chunks = k_sum.size(1);
    shape.num_heads = q.size(2), shape.num_key_heads = k_sum.size(2), shape.dim = q.size(3);
    shape.num_lists = num_lists;
    STD_TORCH_CHECK(k_sum.scalar_type() == q.scalar_type(), "k_sum must have the dtype of q");
    check_shape(k_sum, "k_sum", {batch, num_chunks, shape.num_key_heads, shape.dim});
    STD_TORCH_CHECK(shape.dim >= 1 && shape.dim <= 256, "D must be in 1...256");
    STD_TORCH_CHECK(shape.num_key_heads >= 1 && shape.num_heads >= 1 && shape.num_heads % shape.num_key_heads == 0,
                    "the heads of k_sum must divide the heads of q");
    STD_TORCH_CHECK(num_lists == shape.num_heads || num_lists == shape.num_key_heads || num_lists == 1,
                    "there must be a list per head of q, per head of k_sum, or one");
    STD_TORCH_CHECK(num_chunks < INT32_MAX, "S must be below 2^31 - 1");
    STD_TORCH_CHECK(cu_seqlens.has_value() == cu_seqlens_k.has_value(), "cu_seqlens needs cu_seqlens_k");
    shape.packed.batch = shape.packed.num_seqs = batch;
    shape.packed.seqlen = seqlen, shape.packed.key_seqlen = num_chunks;
    if (cu_seqlens.has_value()) {
      STD_TORCH_CHECK(batch == 1 && cu_seqlens->numel() >= 2, "cu_seqlens needs B == 1 and at least two entries");
      shape.packed.num_seqs = cu_seqlens->numel() - 1;
      check_dense(cu_seqlens, "cu_seqlens", {shape.packed.num_seqs + 1}, ScalarType::Int);
      check_dense(cu_seqlens_k, "cu_seqlens_k", {shape.packed.num_seqs + 1}, ScalarType::Int);
    }
    shape.packed.cu_seqlens = int_data(cu_seqlens), shape.packed.cu_seqlens_k = int_data(cu_seqlens_k);
    wide = shape.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    check_dense(w, "w", {batch, seqlen, shape.num_heads}, wide);
    shape.is_relu = w.has_value(), shape.scale = scale;
    shape.q = data_or_null(q), shape.k_sum = data_or_null(k_sum), shape.w = data_or_null(w);
    shape.q_stride = {q.stride(0), q.stride(1), q.stride(2)};
    shape.k_stride = {k_sum.stride(0), k_sum.stride(1), k_sum.stride(2)};
    allocations.input(q, "q"), allocations.input(k_sum, "k_sum"), allocations.input(w, "w");
    allocations.input(cu_seqlens, "cu_seqlens"), allocations.input(cu_seqlens_k, "cu_seqlens_k");
  }

  int64_t batch() const { return shape.packed.batch; }
  int64_t seqlen() const { return shape.packed.seqlen; }
};

std::tuple<Tensor, Tensor> topk_fwd(const Tensor& q, const Tensor& k_sum, const OptionalTensor& w,
                                    const OptionalTensor& bias, const OptionalTensor& n_visible,
                                    const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, int64_t k,
                                    int64_t num_lists, int64_t stride, int64_t size, int64_t force_first,
                                    int64_t force_local, double scale) {
  const DeviceScope device(q);
  ChunkInputs inputs(q, k_sum, w, cu_seqlens, cu_seqlens_k, num_lists, scale);
  const ChunkScoreShape& shape = inputs.shape;
  STD_TORCH_CHECK(k >= 1 && k <= kMaxTopk, "k must be in 1...512");
  STD_TORCH_CHECK(force_first >= 0 && force_local >= 0 && force_first <= k && force_local <= k - force_first,
                  "force_first and force_local must not be negative, nor more than k together");
  STD_TORCH_CHECK(stride >= 0 && (stride == 0 || size >= 1), "stride must not be negative, size must be positive");
  check_dense(bias, "bias", {inputs.batch(), num_lists, shape.packed.key_seqlen}, inputs.wide);
  check_dense(n_visible, "n_visible", {inputs.batch(), inputs.seqlen()}, ScalarType::Int);
  Tensor idx = new_tensor(q, {inputs.batch(), inputs.seqlen(), num_lists, k}, ScalarType::Int);
  Tensor scores = new_tensor(q, {inputs.batch(), inputs.seqlen(), num_lists, k}, inputs.wide);
  if (idx.numel() == 0) return {idx, scores};
  TopkChunksParams params{};
  params.shape = shape, params.k = k, params.force_first = force_first, params.force_local = force_local;
  params.stride = stride, params.size = size;
  params.n_visible = int_data(n_visible), params.bias = data_or_null(bias);
  params.idx = static_cast<int32_t*>(idx.mutable_data_ptr()), params.scores = scores.mutable_data_ptr();
  const Tensor workspace = new_workspace(q, topk_chunks_workspace(params));
  params.workspace = data_or_null(workspace);
  inputs.allocations.input(bias, "bias"), inputs.allocations.input(n_visible, "n_visible");
  inputs.allocations.output(idx, "idx"), inputs.allocations.output(scores, "scores");
  inputs.allocations.output(workspace, "workspace");
  check_launch(topk_chunks_fwd(params, launch_on(q)));
  return {idx, scores};
}

ChunkScoresParams scores_params(ChunkInputs& inputs, const Tensor& idx) {
  STD_TORCH_CHECK(idx.numel() < INT32_MAX, "2^31 - 2 chosen chunks are allowed");
  check_dense(idx, "idx", {inputs.batch(), inputs.seqlen(), inputs.shape.num_lists, idx.size(3)}, ScalarType::Int);
  inputs.allocations.input(idx, "idx");
  ChunkScoresParams params{};
  params.shape = inputs.shape, params.k = idx.size(3), params.idx = static_cast<const int32_t*>(data_or_null(idx));
  return params;
}

Tensor scores_fwd(const Tensor& q, const Tensor& k_sum, const Tensor& idx, const OptionalTensor& w,
                  const OptionalTensor& cu_seqlens, const OptionalTensor& cu_seqlens_k, double scale) {
  const DeviceScope device(q);
  STD_TORCH_CHECK(idx.dim() == 4, "idx must be [B, T, Hs, k]");
  ChunkInputs inputs(q, k_sum, w, cu_seqlens, cu_seqlens_k, idx.size(2), scale);
  ChunkScoresParams params = scores_params(inputs, idx);
  Tensor scores = new_tensor(q, {inputs.batch(), inputs.seqlen(), idx.size(2), idx.size(3)}, inputs.wide);
  if (scores.numel() == 0) return scores;
  params.scores = scores.mutable_data_ptr();
  inputs.allocations.output(scores, "scores");
  check_launch(chunk_scores_fwd(params, launch_on(q)));
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> scores_bwd(const Tensor& q, const Tensor& k_sum, const Tensor& idx,
                                              const OptionalTensor& w, const OptionalTensor& cu_seqlens,
                                              const OptionalTensor& cu_seqlens_k, const Tensor& order,
                                              const Tensor& rows, const Tensor& starts, const Tensor& d_scores,
                                              double scale) {
  const DeviceScope device(q);
  STD_TORCH_CHECK(idx.dim() == 4, "idx must be [B, T, Hs, k]");
  ChunkInputs inputs(q, k_sum, w, cu_seqlens, cu_seqlens_k, idx.size(2), scale);
  ChunkScoresParams params = scores_params(inputs, idx);
  check_dense(d_scores, "d_scores", {inputs.batch(), inputs.seqlen(), idx.size(2), idx.size(3)}, inputs.wide);
  check_dense(order, "order", {idx.numel()}, ScalarType::Int);
  STD_TORCH_CHECK(rows.dim() == 1, "rows must be [R]");
  check_dense(rows, "rows", {rows.size(0)}, ScalarType::Int);
  check_dense(starts, "starts", {rows.size(0) + 1}, ScalarType::Int);
  const ChunkScoreShape& shape = inputs.shape;
  Tensor dq = new_tensor(q, {inputs.batch(), inputs.seqlen(), shape.num_heads, shape.dim}, q.scalar_type());
  Tensor dk = new_tensor(q, {inputs.batch(), shape.packed.key_seqlen, shape.num_key_heads, shape.dim}, q.scalar_type());
  Tensor dw = new_tensor(q, {w.has_value() ? inputs.batch() : 0, inputs.seqlen(), shape.num_heads}, inputs.wide);
  if (dk.numel() > 0) torch::stable::zero_(dk);
  if (params.num_lookups() == 0) {
    if (dq.numel() > 0) torch::stable::zero_(dq);
    if (dw.numel() > 0) torch::stable::zero_(dw);
    return {dq, dk, dw};
  }
  params.d_scores = d_scores.const_data_ptr();
  params.order = static_cast<const int32_t*>(order.const_data_ptr());
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.starts = static_cast<const int32_t*>(starts.const_data_ptr()), params.max_rows = rows.size(0);
  params.dq = dq.mutable_data_ptr(), params.dk_sum = data_or_null(dk), params.dw = data_or_null(dw);
  const Tensor workspace = new_workspace(q, chunk_scores_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  Allocations& allocations = inputs.allocations;
  allocations.input(d_scores, "d_scores"), allocations.input(order, "order"), allocations.input(rows, "rows");
  allocations.input(starts, "starts"), allocations.output(dq, "dq"), allocations.input(dk, "dk_sum");
  allocations.output(dw, "dw"), allocations.output(workspace, "workspace");
  check_launch(chunk_scores_bwd(params, launch_on(q)));
  return {dq, dk, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("topk_chunks_fwd", TORCH_BOX(&topk_fwd));
  m.impl("chunk_scores_fwd", TORCH_BOX(&scores_fwd));
  m.impl("chunk_scores_bwd", TORCH_BOX(&scores_bwd));
}

}  // namespace remora
