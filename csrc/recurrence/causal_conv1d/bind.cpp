// Torch side of the causal convolution: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "recurrence/causal_conv1d/launch.h"
#include "recurrence/token_inputs.h"

namespace remora {
namespace {

struct ConvInputs {
  Tensor x;
  CausalConv1dShape shape;
  DType dtype;
  ScalarType weight_type;

  ConvInputs(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cu_seqlens,
             const OptionalTensor& rows)
      : x(with_dense_rows(x_in)), dtype(dtype_of(x_in, "x")) {
    STD_TORCH_CHECK(x.dim() == 3, "x must be [B, T, D]");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1 && weight.size(1) <= kConvMaxWidth,
                    "weight must be [D, W] with W in 1...8");
    const int64_t num_channels = x.size(2);
    shape = {.sequences = {.batch = x.size(0),
                           .seqlen = x.size(1),
                           .num_heads = 1,
                           .num_value_heads = 1,
                           .head_dim = num_channels,
                           .value_dim = num_channels,
                           .num_seqs = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : x.size(0)},
             .num_channels = num_channels,
             .width = static_cast<int>(weight.size(1))};
    weight_type = scalar_type_of(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
    check_dense(weight, "weight", {num_channels, shape.width}, weight_type);
    check_dense(bias, "bias", {num_channels}, weight_type);
    check_offsets(shape.sequences, cu_seqlens, rows);
  }

  Tensor new_state() const {
    return new_tensor(x, {shape.sequences.num_seqs, shape.width - 1, shape.num_channels}, x.scalar_type());
  }
  void check_state(const OptionalTensor& state, const char* name) const {
    check_dense(state, name, {shape.sequences.num_seqs, shape.width - 1, shape.num_channels}, x.scalar_type());
  }
  bool empty() const { return x.numel() == 0 || shape.sequences.num_seqs == 0; }

  template <class Params>
  void fill(Params& params, const Tensor& weight, const OptionalTensor& bias, Allocations& allocations) const {
    params.shape = shape, params.dtype = dtype;
    params.x = x.const_data_ptr(), params.x_stride = {x.stride(0), x.stride(1)};
    params.weight = weight.const_data_ptr(), params.bias = data_or_null(bias);
    allocations.input(x, "x"), allocations.input(weight, "weight"), allocations.input(bias, "bias");
  }
};

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                               const OptionalTensor& rows, bool use_silu, bool output_final_state) {
  const DeviceScope device(x);
  const ConvInputs in(x, weight, bias, cu_seqlens, rows);
  in.check_state(initial_state, "initial_state");
  Tensor y = new_tensor(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor final_state = output_final_state ? in.new_state() : none_like(x);
  if (in.empty()) return {y, output_final_state ? pass_state(final_state, initial_state) : final_state};

  Allocations allocations;
  CausalConv1dFwdParams params{};
  in.fill(params, weight, bias, allocations);
  params.use_silu = use_silu;
  params.initial_state = data_or_null(initial_state);
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.y = y.mutable_data_ptr(), params.final_state = data_or_null(final_state);
  allocations.input(initial_state, "initial_state"), allocations.input(cu_seqlens, "cu_seqlens");
  allocations.input(rows, "rows"), allocations.output(y, "y"), allocations.output(final_state, "final_state");
  check_launch(causal_conv1d_fwd(params, launch_on(x)));
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                               const OptionalTensor& rows, const Tensor& d_y_in,
                                               const OptionalTensor& d_final_state, bool use_silu) {
  const DeviceScope device(x);
  const ConvInputs in(x, weight, bias, cu_seqlens, rows);
  const Tensor d_y = torch::stable::contiguous(d_y_in);
  in.check_state(initial_state, "initial_state"), in.check_state(d_final_state, "d_final_state");
  check_dense(d_y, "d_y", {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor dx = new_tensor(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor dweight = new_tensor(x, {weight.size(0), weight.size(1)}, in.weight_type);
  Tensor dbias = bias.has_value() ? new_tensor(x, {weight.size(0)}, in.weight_type) : none_like(weight);
  Tensor d_initial_state = initial_state.has_value() ? in.new_state() : none_like(x);
  if (in.empty()) {
    return {dx, torch::stable::zero_(dweight), torch::stable::zero_(dbias),
            initial_state.has_value() ? pass_state(d_initial_state, d_final_state) : d_initial_state};
  }

  Allocations allocations;
  CausalConv1dBwdParams params{};
  in.fill(params, weight, bias, allocations);
  params.use_silu = use_silu;
  params.initial_state = data_or_null(initial_state);
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.d_y = d_y.const_data_ptr(), params.d_final_state = data_or_null(d_final_state);
  params.dx = dx.mutable_data_ptr(), params.dweight = dweight.mutable_data_ptr(), params.dbias = data_or_null(dbias);
  params.d_initial_state = data_or_null(d_initial_state);
  const Tensor workspace = new_workspace(x, causal_conv1d_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.input(initial_state, "initial_state"), allocations.input(cu_seqlens, "cu_seqlens");
  allocations.input(rows, "rows"), allocations.input(d_y, "d_y"), allocations.input(d_final_state, "d_final_state");
  allocations.output(dx, "dx"), allocations.output(dweight, "dweight"), allocations.output(dbias, "dbias");
  allocations.output(d_initial_state, "d_initial_state"), allocations.output(workspace, "workspace");
  check_launch(causal_conv1d_bwd(params, launch_on(x)));
  return {dx, dweight, dbias, d_initial_state};
}

Tensor step_(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& state,
             const OptionalTensor& state_indices, const OptionalTensor& memories, int64_t num_memories, bool use_silu) {
  const DeviceScope device(x);
  ConvInputs in(x, weight, bias, std::nullopt, std::nullopt);
  RecurrenceShape& s = in.shape.sequences;
  STD_TORCH_CHECK(memories.has_value() || s.seqlen == 1, "x must hold one token of each sequence");
  const int64_t num_tokens = memories.has_value() ? s.seqlen : s.batch;
  s.num_seqs = s.batch * s.seqlen;
  STD_TORCH_CHECK(state.dim() == 3, "state must have three dimensions");
  check_dense(state, "state", {state.size(0), in.shape.width - 1, in.shape.num_channels}, x.scalar_type());
  check_memories(state_indices, memories, num_memories, {s.batch, s.seqlen}, num_tokens, state.size(0));
  Tensor y = new_tensor(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  if (in.empty()) return y;

  Allocations allocations;
  CausalConv1dStepParams params{};
  in.fill(params, weight, bias, allocations);
  params.use_silu = use_silu;
  params.state_indices = static_cast<const int32_t*>(data_or_null(state_indices));
  params.memories = static_cast<const int32_t*>(data_or_null(memories)), params.num_memories = num_memories;
  params.state = data_or_null(state), params.num_slots = state.size(0), params.y = y.mutable_data_ptr();
  allocations.input(state_indices, "state_indices"), allocations.input(memories, "memories");
  allocations.input(state, "state"), allocations.output(y, "y");
  check_launch(causal_conv1d_step(params, launch_on(x)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&bwd));
  m.impl("causal_conv1d_step_", TORCH_BOX(&step_));
}

}  // namespace remora
