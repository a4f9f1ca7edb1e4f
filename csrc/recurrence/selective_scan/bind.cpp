// Torch side of the selective scan: check, allocate, fill the params, launch. Compiled once per backend. Tensors come
// in the layout of mamba: tokens are the last dimension, whatever its stride.
#include <tuple>

#include "recurrence/selective_scan/launch.h"
#include "recurrence/token_inputs.h"

namespace remora {
namespace {

ScanStrides scan_strides(const Tensor& x) { return {x.stride(0), x.stride(2), x.stride(1)}; }

struct ScanInputs {
  SelectiveScanInputs params{};
  Allocations allocations;
  ScalarType type, state_type;
  bool token_major;  // layout of what has the shape of u

  ScanInputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
             const OptionalTensor& skip, const OptionalTensor& z, const OptionalTensor& delta_bias,
             const OptionalTensor& cu_seqlens, bool delta_softplus, bool reverse) {
    STD_TORCH_CHECK(u.dim() == 3 && a.dim() == 2 && b.dim() == 4, "u must be [B, D, T], A [D, N], B [B, G, N, T]");
    params.dtype = dtype_of(u, "u");
    params.state_dtype = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    type = u.scalar_type(), state_type = scalar_type_of(params.state_dtype);
    token_major = u.stride(1) == 1 && u.stride(2) != 1;
    const int64_t batch = u.size(0), num_channels = u.size(1), seqlen = u.size(2);
    const int64_t num_groups = b.size(1), state_dim = b.size(2);
    params.shape = {.sequences = {.batch = batch,
                                  .seqlen = seqlen,
                                  .num_heads = 1,
                                  .num_value_heads = 1,
                                  .head_dim = num_channels,
                                  .value_dim = num_channels,
                                  .num_seqs = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : batch},
                    .num_channels = num_channels,
                    .num_groups = num_groups,
                    .state_dim = state_dim};
    STD_TORCH_CHECK(num_groups >= 1 && num_channels % num_groups == 0, "the groups of B must divide the channels");
    STD_TORCH_CHECK(state_dim >= 1 && state_dim <= kScanMaxStates, "N must be in 1...256");
    check_like(delta, "delta", {batch, num_channels, seqlen});
    if (z.has_value()) check_like(*z, "z", {batch, num_channels, seqlen});
    check_like(b, "B", {batch, num_groups, state_dim, seqlen}),
        check_like(c, "C", {batch, num_groups, state_dim, seqlen});
    check_dense(a, "A", {num_channels, state_dim}, state_type);
    check_dense(skip, "D", {num_channels}, state_type),
        check_dense(delta_bias, "delta_bias", {num_channels}, state_type);
    check_offsets(params.shape.sequences, cu_seqlens, std::nullopt);

    params.delta_softplus = delta_softplus, params.reverse = reverse;
    params.u = u.const_data_ptr(), params.delta = delta.const_data_ptr(), params.z = data_or_null(z);
    params.u_stride = scan_strides(u), params.delta_stride = scan_strides(delta);
    if (z.has_value()) params.z_stride = scan_strides(*z);
    params.b = b.const_data_ptr(), params.b_stride = {b.stride(0), b.stride(3), b.stride(1), b.stride(2)};
    params.c = c.const_data_ptr(), params.c_stride = {c.stride(0), c.stride(3), c.stride(1), c.stride(2)};
    params.a = a.const_data_ptr(), params.skip = data_or_null(skip), params.delta_bias = data_or_null(delta_bias);
    params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
    allocations.input(u, "u"), allocations.input(delta, "delta"), allocations.input(a, "A");
    allocations.input(b, "B"), allocations.input(c, "C"), allocations.input(skip, "D"), allocations.input(z, "z");
    allocations.input(delta_bias, "delta_bias"), allocations.input(cu_seqlens, "cu_seqlens");
  }

  void check_like(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) const {
    check_shape(x, name, shape);
    STD_TORCH_CHECK(dtype_of(x, name) == params.dtype, name, " must have the dtype of u");
  }
  void check_state(const OptionalTensor& state, const char* name) const {
    const SelectiveScanShape& s = params.shape;
    check_dense(state, name, {s.sequences.num_seqs, s.num_channels, s.state_dim}, state_type);
  }

  bool empty() const {
    const SelectiveScanShape& s = params.shape;
    return s.sequences.batch * s.sequences.seqlen * s.num_channels == 0 || s.sequences.num_seqs == 0;
  }
  Tensor new_like_u(const Tensor& u) const {
    const SelectiveScanShape& s = params.shape;
    const int64_t batch = s.sequences.batch, seqlen = s.sequences.seqlen;
    if (!token_major) return new_tensor(u, {batch, s.num_channels, seqlen}, type);
    return torch::stable::transpose(new_tensor(u, {batch, seqlen, s.num_channels}, type), 1, 2);
  }
  Tensor new_state(const Tensor& u) const {
    const SelectiveScanShape& s = params.shape;
    return new_tensor(u, {s.sequences.num_seqs, s.num_channels, s.state_dim}, state_type);
  }
};

int64_t saved_size(const SelectiveScanShape& s) {
  return num_scan_slots(s.sequences.batch * s.sequences.seqlen, s.sequences.num_seqs);
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                       const Tensor& c, const OptionalTensor& skip, const OptionalTensor& z,
                                       const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                       const OptionalTensor& cu_seqlens, bool delta_softplus, bool reverse,
                                       bool output_final_state, bool save_states) {
  const DeviceScope device(u);
  ScanInputs in(u, delta, a, b, c, skip, z, delta_bias, cu_seqlens, delta_softplus, reverse);
  const SelectiveScanShape& s = in.params.shape;
  in.check_state(initial_state, "initial_state");
  Tensor out = in.new_like_u(u);
  Tensor final_state = output_final_state ? in.new_state(u) : none_like(a);
  Tensor saved =
      save_states ? new_tensor(u, {saved_size(s), s.num_channels, s.state_dim}, in.state_type) : none_like(a);
  if (in.empty()) return {out, output_final_state ? pass_state(final_state, initial_state) : final_state, saved};

  SelectiveScanFwdParams params{};
  params.in = in.params;
  params.initial_state = data_or_null(initial_state);
  params.out = out.mutable_data_ptr(), params.out_stride = scan_strides(out);
  params.final_state = data_or_null(final_state), params.saved_states = data_or_null(saved);
  const Tensor workspace = new_workspace(u, selective_scan_fwd_workspace(params));
  params.workspace = data_or_null(workspace);
  in.allocations.input(initial_state, "initial_state"), in.allocations.output(out, "out");
  in.allocations.output(final_state, "final_state"), in.allocations.output(saved, "saved_states");
  in.allocations.output(workspace, "workspace");
  check_launch(selective_scan_fwd(params, launch_on(u)));
  return {out, final_state, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c, const OptionalTensor& skip,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& cu_seqlens,
    const Tensor& saved_states, const Tensor& d_out, const OptionalTensor& d_final_state, bool has_initial_state,
    bool delta_softplus, bool reverse) {
  const DeviceScope device(u);
  ScanInputs in(u, delta, a, b, c, skip, z, delta_bias, cu_seqlens, delta_softplus, reverse);
  const SelectiveScanShape& s = in.params.shape;
  const int64_t batch = s.sequences.batch, seqlen = s.sequences.seqlen;
  in.check_like(d_out, "d_out", {batch, s.num_channels, seqlen}), in.check_state(d_final_state, "d_final_state");
  check_dense(saved_states, "saved_states", {saved_size(s), s.num_channels, s.state_dim}, in.state_type);
  Tensor du = in.new_like_u(u), ddelta = in.new_like_u(u), dz = z.has_value() ? in.new_like_u(u) : none_like(u);
  Tensor db = new_tensor(u, {batch, seqlen, s.num_groups, s.state_dim}, in.type);
  Tensor dc = new_tensor(u, {batch, seqlen, s.num_groups, s.state_dim}, in.type);
  Tensor da = new_tensor(u, {s.num_channels, s.state_dim}, in.state_type);
  const auto channel_gradient = [&](const OptionalTensor& x) {
    return x.has_value() ? new_tensor(u, {s.num_channels}, in.state_type) : none_like(a);
  };
  Tensor dskip = channel_gradient(skip), ddelta_bias = channel_gradient(delta_bias);
  Tensor dh0 = has_initial_state ? in.new_state(u) : none_like(a);
  const auto permuted = [](const Tensor& x) {  // [B, T, G, N] to [B, G, N, T]
    return torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3);
  };
  if (in.empty()) {
    return {du,
            ddelta,
            torch::stable::zero_(da),
            permuted(db),
            permuted(dc),
            torch::stable::zero_(dskip),
            dz,
            torch::stable::zero_(ddelta_bias),
            has_initial_state ? pass_state(dh0, d_final_state) : dh0};
  }

  SelectiveScanBwdParams params{};
  params.in = in.params;
  params.saved_states = saved_states.const_data_ptr();
  params.d_out = d_out.const_data_ptr(), params.d_out_stride = scan_strides(d_out);
  params.d_final_state = data_or_null(d_final_state);
  params.du = du.mutable_data_ptr(), params.ddelta = ddelta.mutable_data_ptr(), params.dz = data_or_null(dz);
  params.d_stride = scan_strides(du);
  params.db = db.mutable_data_ptr(), params.dc = dc.mutable_data_ptr(), params.da = da.mutable_data_ptr();
  params.dskip = data_or_null(dskip), params.ddelta_bias = data_or_null(ddelta_bias);
  params.d_initial_state = data_or_null(dh0);
  const Tensor workspace = new_workspace(u, selective_scan_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  in.allocations.input(saved_states, "saved_states"), in.allocations.input(d_out, "d_out");
  in.allocations.input(d_final_state, "d_final_state");
  in.allocations.output(du, "du"), in.allocations.output(ddelta, "ddelta"), in.allocations.output(dz, "dz");
  in.allocations.output(db, "dB"), in.allocations.output(dc, "dC"), in.allocations.output(da, "dA");
  in.allocations.output(dskip, "dD"), in.allocations.output(ddelta_bias, "ddelta_bias");
  in.allocations.output(dh0, "d_initial_state"), in.allocations.output(workspace, "workspace");
  check_launch(selective_scan_bwd(params, launch_on(u)));
  return {du, ddelta, da, permuted(db), permuted(dc), dskip, dz, ddelta_bias, dh0};
}

Tensor step_(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
             const OptionalTensor& skip, const OptionalTensor& z, const OptionalTensor& delta_bias, const Tensor& state,
             const OptionalTensor& state_indices, bool delta_softplus) {
  const DeviceScope device(u);
  ScanInputs in(u, delta, a, b, c, skip, z, delta_bias, std::nullopt, delta_softplus, false);
  const SelectiveScanShape& s = in.params.shape;
  STD_TORCH_CHECK(s.sequences.seqlen == 1, "u must hold one token of each sequence");
  STD_TORCH_CHECK(state.dim() == 3, "state must have three dimensions");
  check_dense(state, "state", {state.size(0), s.num_channels, s.state_dim}, in.state_type);
  check_memories(state_indices, std::nullopt, 1, {}, s.sequences.batch, state.size(0));
  Tensor out = new_tensor(u, {s.sequences.batch, s.num_channels, 1}, in.type);
  if (in.empty()) return out;

  SelectiveScanStepParams params{};
  params.in = in.params;
  params.state_indices = static_cast<const int32_t*>(data_or_null(state_indices));
  params.state = data_or_null(state), params.num_slots = state.size(0), params.out = out.mutable_data_ptr();
  in.allocations.input(state_indices, "state_indices"), in.allocations.input(state, "state");
  in.allocations.output(out, "out");
  check_launch(selective_scan_step(params, launch_on(u)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&bwd));
  m.impl("selective_scan_step_", TORCH_BOX(&step_));
}

}  // namespace remora
