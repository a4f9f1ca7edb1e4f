// Torch side of segment pooling: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "segment/segment_pool/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

/// What says which tokens a window covers.
struct PoolLayout {
  const OptionalTensor &segment_ids, &segment_starts, &seq_offsets, &window_offsets;
  int64_t size, stride;
  bool dual;
};

PoolShape pool_shape(int64_t batch, int64_t seqlen, int64_t heads, int64_t channels, int64_t num_windows,
                     const PoolLayout& layout, Allocations& allocations) {
  STD_TORCH_CHECK(layout.size >= 1 && layout.stride >= 1, "size and stride must be positive");
  STD_TORCH_CHECK(!layout.dual || layout.size == layout.stride, "dual needs size == stride");
  STD_TORCH_CHECK(layout.segment_ids.has_value() == layout.segment_starts.has_value(),
                  "segment_ids and segment_starts come together");
  const bool is_ragged = layout.segment_starts.has_value(), is_packed = layout.seq_offsets.has_value();
  STD_TORCH_CHECK(!is_ragged || (layout.size == 1 && layout.stride == 1 && !layout.dual && !is_packed),
                  "ragged segments have size 1 and stride 1, are not dual and not packed");
  STD_TORCH_CHECK(is_packed == layout.window_offsets.has_value() && (!is_packed || batch == 1),
                  "seq_offsets and window_offsets come together, with B == 1");
  const int64_t num_seqs = is_packed ? layout.seq_offsets->numel() - 1 : 0;
  STD_TORCH_CHECK(!is_packed || num_seqs >= 1, "seq_offsets needs at least two entries");
  // Without offsets windows are not looked up but computed.
  STD_TORCH_CHECK(
      is_ragged || is_packed || num_windows == 0 ||
          (num_windows - 1 <= seqlen / layout.stride && (num_windows - 1) * layout.stride + layout.size <= seqlen),
      "num_windows windows must lie within T tokens");
  check_dense(layout.segment_ids, "segment_ids", {batch, seqlen}, ScalarType::Int);
  check_dense(layout.segment_starts, "segment_starts", {batch, num_windows + 1}, ScalarType::Int);
  check_dense(layout.seq_offsets, "seq_offsets", {num_seqs + 1}, ScalarType::Int);
  check_dense(layout.window_offsets, "window_offsets", {num_seqs + 1}, ScalarType::Int);
  allocations.input(layout.segment_ids, "segment_ids"), allocations.input(layout.segment_starts, "segment_starts");
  allocations.input(layout.seq_offsets, "seq_offsets"), allocations.input(layout.window_offsets, "window_offsets");
  const auto offsets = [](const OptionalTensor& x) { return static_cast<const int32_t*>(data_or_null(x)); };
  return {.batch = batch,
          .seqlen = seqlen,
          .heads = heads,
          .channels = channels,
          .num_windows = num_windows,
          .size = layout.size,
          .stride = layout.stride,
          .num_seqs = num_seqs,
          .dual = layout.dual,
          .segment_starts = offsets(layout.segment_starts),
          .segment_ids = offsets(layout.segment_ids),
          .seq_offsets = offsets(layout.seq_offsets),
          .window_offsets = offsets(layout.window_offsets)};
}

PoolMode pool_mode(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode < kNumPoolModes, "mode is unknown");
  return static_cast<PoolMode>(mode);
}

ScalarType wide_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

/// x, gate and slot_bias in the params, with the heads as channels of one head where nothing tells them apart.
template <class Params>
void fill_inputs(Params& params, const OptionalTensor& x, const OptionalTensor& gate, const OptionalTensor& slot_bias,
                 Allocations& allocations) {
  PoolShape& s = params.shape;
  bool collapse = !s.dual;
  for (const auto& [tensor, name] : {std::tuple(x, "x"), std::tuple(gate, "gate")}) {
    if (!tensor.has_value()) continue;
    check_shape(*tensor, name, {s.batch, s.seqlen, s.heads, s.input_channels()});
    STD_TORCH_CHECK(dtype_of(*tensor, name) == params.dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(tensor->stride(3) == 1, name, " must have contiguous channels");
    collapse = collapse && (s.heads == 1 || tensor->stride(2) == s.channels);
    allocations.input(*tensor, name);
  }
  check_dense(slot_bias, "slot_bias", {s.size, s.heads, s.input_channels()}, wide_type(params.dtype));
  STD_TORCH_CHECK(!has_logits(params.mode) || gate.has_value() || slot_bias.has_value(),
                  "softmax and weighted need gate or slot_bias");
  STD_TORCH_CHECK(has_logits(params.mode) || (!gate.has_value() && !slot_bias.has_value()),
                  "gate and slot_bias belong to softmax and weighted");
  STD_TORCH_CHECK(!slot_bias.has_value() || !s.is_ragged(), "slot_bias needs windows of one size");
  allocations.input(slot_bias, "slot_bias");
  params.x = data_or_null(x), params.gate = data_or_null(gate), params.slot_bias = data_or_null(slot_bias);
  const auto strides = [](const OptionalTensor& t) {
    return t.has_value() ? PoolStrides{t->stride(0), t->stride(1), t->stride(2)} : PoolStrides{};
  };
  params.x_stride = strides(x), params.gate_stride = strides(gate);
  if (collapse) s.channels *= s.heads, s.heads = 1;
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& x, const OptionalTensor& gate, const OptionalTensor& slot_bias,
                                       const OptionalTensor& segment_ids, const OptionalTensor& segment_starts,
                                       const OptionalTensor& seq_offsets, const OptionalTensor& window_offsets,
                                       int64_t size, int64_t stride, int64_t num_windows, int64_t mode, bool dual,
                                       bool save) {
  const DeviceScope device(x);
  Allocations allocations;
  STD_TORCH_CHECK(x.dim() == 4 && (!dual || x.size(3) % 2 == 0), "x must be [B, T, H, C], C even if dual");
  SegmentPoolFwdParams params{};
  params.dtype = dtype_of(x, "x"), params.mode = pool_mode(mode);
  params.shape =
      pool_shape(x.size(0), x.size(1), x.size(2), dual ? x.size(3) / 2 : x.size(3), num_windows,
                 {segment_ids, segment_starts, seq_offsets, window_offsets, size, stride, dual}, allocations);
  const PoolShape whole = params.shape;
  fill_inputs(params, x, gate, slot_bias, allocations);
  const auto new_output = [&](bool is_wanted, ScalarType type) {
    return is_wanted ? new_tensor(x, {whole.batch, num_windows, whole.heads, whole.channels}, type)
                     : new_tensor(x, {0}, type);
  };
  Tensor y = new_output(true, x.scalar_type());
  Tensor arg = new_output(save && params.mode == PoolMode::kMax, ScalarType::Int);
  Tensor lse = new_output(save && params.mode == PoolMode::kSoftmax, wide_type(params.dtype));
  if (y.numel() == 0) return {y, arg, lse};
  if (whole.seqlen == 0) {
    return {torch::stable::zero_(y), torch::stable::fill_(arg, -1.), torch::stable::zero_(lse)};
  }
  params.y = y.mutable_data_ptr(), params.lse = data_or_null(lse);
  params.arg = static_cast<int32_t*>(data_or_null(arg));
  allocations.output(y, "y"), allocations.output(arg, "arg"), allocations.output(lse, "lse");
  check_launch(segment_pool_fwd(params, launch_on(x)));
  return {y, arg, lse};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& gate,
                                       const OptionalTensor& slot_bias, const OptionalTensor& segment_ids,
                                       const OptionalTensor& segment_starts, const OptionalTensor& seq_offsets,
                                       const OptionalTensor& window_offsets, const OptionalTensor& y,
                                       const OptionalTensor& arg, const OptionalTensor& lse, int64_t seqlen,
                                       int64_t size, int64_t stride, int64_t mode, bool dual) {
  const DeviceScope device(dy);
  Allocations allocations;
  STD_TORCH_CHECK(dy.dim() == 4 && dy.is_contiguous() && seqlen >= 0, "dy must be contiguous [B, S, H, D]");
  const int64_t batch = dy.size(0), num_windows = dy.size(1), heads = dy.size(2), channels = dy.size(3);
  SegmentPoolBwdParams params{};
  params.dtype = dtype_of(dy, "dy"), params.mode = pool_mode(mode);
  params.shape =
      pool_shape(batch, seqlen, heads, channels, num_windows,
                 {segment_ids, segment_starts, seq_offsets, window_offsets, size, stride, dual}, allocations);
  fill_inputs(params, x, gate, slot_bias, allocations);
  const bool is_softmax = params.mode == PoolMode::kSoftmax;
  STD_TORCH_CHECK(!has_logits(params.mode) || x.has_value(), "softmax and weighted need x");
  STD_TORCH_CHECK(params.mode != PoolMode::kMax || arg.has_value(), "max needs arg");
  STD_TORCH_CHECK(!is_softmax || (y.has_value() && lse.has_value()), "softmax needs y and lse");
  check_dense(y, "y", {batch, num_windows, heads, channels}, dy.scalar_type());
  check_dense(arg, "arg", {batch, num_windows, heads, channels}, ScalarType::Int);
  check_dense(lse, "lse", {batch, num_windows, heads, channels}, wide_type(params.dtype));

  const int64_t input_channels = dual ? 2 * channels : channels;
  const auto new_input_gradient = [&](bool is_wanted) {
    return is_wanted ? new_tensor(dy, {batch, seqlen, heads, input_channels}, dy.scalar_type())
                     : new_tensor(dy, {0}, dy.scalar_type());
  };
  Tensor dx = new_input_gradient(true), dgate = new_input_gradient(gate.has_value());
  Tensor dslot_bias = slot_bias.has_value() ? new_tensor(dy, {size, heads, input_channels}, wide_type(params.dtype))
                                            : new_tensor(dy, {0}, wide_type(params.dtype));
  if (dx.numel() == 0 || num_windows == 0) {
    return {torch::stable::zero_(dx), torch::stable::zero_(dgate), torch::stable::zero_(dslot_bias)};
  }
  params.y = data_or_null(y), params.lse = data_or_null(lse), params.dy = dy.const_data_ptr();
  params.arg = static_cast<const int32_t*>(data_or_null(arg));
  params.dx = dx.mutable_data_ptr(), params.dgate = data_or_null(dgate);
  params.dslot_bias = data_or_null(dslot_bias);
  const Tensor workspace = new_workspace(dy, segment_pool_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.input(y, "y"), allocations.input(arg, "arg"), allocations.input(lse, "lse");
  allocations.input(dy, "dy"), allocations.output(dx, "dx"), allocations.output(dgate, "dgate");
  allocations.output(dslot_bias, "dslot_bias"), allocations.output(workspace, "workspace");
  check_launch(segment_pool_bwd(params, launch_on(dy)));
  return {dx, dgate, dslot_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("segment_pool_fwd", TORCH_BOX(&fwd));
  m.impl("segment_pool_bwd", TORCH_BOX(&bwd));
}

}  // namespace remora
