// Torch side of linear attention with scalar decay: check, allocate, fill the params, launch. Compiled once per
// backend. remora.ops has told the user what is wrong with an argument before a call comes here; these checks protect
// direct callers of torch.ops.remora.
#include <tuple>

#include "recurrence/simple_gla/launch.h"
#include "recurrence/token_inputs.h"

namespace remora {
namespace {

struct Call : TokenInputs {
  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& g,
       const OptionalTensor& cu_seqlens, const OptionalTensor& rows = std::nullopt)
      : TokenInputs(q_in, k_in, v_in, g, std::nullopt, cu_seqlens, rows) {}

  Tensor none() const { return new_tensor(q, {0}, state_type); }
  Tensor new_output(int64_t heads, int64_t channels) const {
    return new_tensor(q, {shape.batch, shape.seqlen, heads, channels}, q.scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                       const OptionalTensor& rows, double scale, bool output_final_state,
                                       bool state_v_first, bool save_states) {
  const DeviceScope device(q);
  const Call in(q, k, v, g, cu_seqlens, rows);
  const RecurrenceShape& s = in.shape;
  in.check_state(initial_state, "initial_state", s.num_seqs, state_v_first);

  Tensor o = in.new_output(s.num_value_heads, s.value_dim);
  Tensor final_state = output_final_state ? in.new_state(s.num_seqs, state_v_first) : in.none();
  const ScalarType saved_type = scalar_type_of(in.saved_dtype());
  const int64_t slots = num_state_slots(s.batch * s.seqlen, s.num_seqs);
  Tensor saved = save_states ? new_tensor(q, {slots, s.num_value_heads, s.head_dim, s.value_dim}, saved_type)
                             : new_tensor(q, {0}, saved_type);
  if (in.empty()) return {o, output_final_state ? pass_state(final_state, initial_state) : final_state, saved};

  Allocations allocations;
  SimpleGlaFwdParams params{};
  in.fill(params, allocations);
  params.saved_dtype = in.saved_dtype(), params.scale = scale, params.state_v_first = state_v_first;
  params.g = data_or_null(g);
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.initial_state = data_or_null(initial_state), params.o = o.mutable_data_ptr();
  params.final_state = data_or_null(final_state), params.saved_states = data_or_null(saved);
  allocations.input(g, "g"), allocations.input(cu_seqlens, "cu_seqlens"), allocations.input(rows, "rows");
  allocations.input(initial_state, "initial_state"), allocations.output(o, "o");
  allocations.output(final_state, "final_state"), allocations.output(saved, "saved_states");

  const Launch launch = launch_on(q);
  const Tensor workspace = new_workspace(q, simple_gla_fwd_workspace(params, launch));
  allocations.output(workspace, "workspace");
  params.workspace = data_or_null(workspace);
  check_launch(simple_gla_fwd(params, launch));
  return {o, final_state, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       const OptionalTensor& g, const OptionalTensor& initial_state,
                                                       const OptionalTensor& cu_seqlens, const OptionalTensor& rows,
                                                       const Tensor& saved_states, const Tensor& d_o_in,
                                                       const OptionalTensor& d_final_state, double scale,
                                                       bool state_v_first, bool with_dg) {
  const DeviceScope device(q);
  const Call in(q, k, v, g, cu_seqlens, rows);
  const RecurrenceShape& s = in.shape;
  const Tensor d_o = torch::stable::contiguous(d_o_in);
  check_dense(d_o, "d_o", {s.batch, s.seqlen, s.num_value_heads, s.value_dim}, q.scalar_type());
  in.check_state(initial_state, "initial_state", s.num_seqs, state_v_first);
  in.check_state(d_final_state, "d_final_state", s.num_seqs, state_v_first);
  check_dense(saved_states, "saved_states",
              {num_state_slots(s.batch * s.seqlen, s.num_seqs), s.num_value_heads, s.head_dim, s.value_dim},
              scalar_type_of(in.saved_dtype()));
  STD_TORCH_CHECK(!with_dg || g.has_value(), "with_dg needs g");

  Tensor dq = in.new_output(s.num_heads, s.head_dim), dk = in.new_output(s.num_heads, s.head_dim);
  Tensor dv = in.new_output(s.num_value_heads, s.value_dim);
  Tensor dg = with_dg ? new_tensor(q, {s.batch, s.seqlen, s.num_value_heads}, in.state_type) : in.none();
  Tensor dh0 = initial_state.has_value() ? in.new_state(s.num_seqs, state_v_first) : in.none();
  if (in.empty()) return {dq, dk, dv, dg, initial_state.has_value() ? pass_state(dh0, d_final_state) : dh0};

  Allocations allocations;
  SimpleGlaBwdParams params{};
  in.fill(params, allocations);
  params.saved_dtype = in.saved_dtype(), params.scale = scale, params.state_v_first = state_v_first;
  params.g = data_or_null(g);
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens));
  params.rows = static_cast<const int32_t*>(data_or_null(rows));
  params.initial_state = data_or_null(initial_state), params.saved_states = saved_states.const_data_ptr();
  params.d_o = d_o.const_data_ptr(), params.d_final_state = data_or_null(d_final_state);
  params.dq = dq.mutable_data_ptr(), params.dk = dk.mutable_data_ptr(), params.dv = dv.mutable_data_ptr();
  params.dg = data_or_null(dg), params.d_initial_state = data_or_null(dh0);
  allocations.input(g, "g"), allocations.input(cu_seqlens, "cu_seqlens"), allocations.input(rows, "rows");
  allocations.input(initial_state, "initial_state"), allocations.input(saved_states, "saved_states");
  allocations.input(d_o, "d_o"), allocations.input(d_final_state, "d_final_state");
  allocations.output(dq, "dq"), allocations.output(dk, "dk"), allocations.output(dv, "dv");
  allocations.output(dg, "dg"), allocations.output(dh0, "d_initial_state");

  const Launch launch = launch_on(q);
  const Tensor workspace = new_workspace(q, simple_gla_bwd_workspace(params, launch));
  allocations.output(workspace, "workspace");
  params.workspace = data_or_null(workspace);
  check_launch(simple_gla_bwd(params, launch));
  return {dq, dk, dv, dg, dh0};
}

std::tuple<Tensor, Tensor> recurrent_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         double scale, bool output_final_state, bool state_v_first) {
  const DeviceScope device(q);
  const Call in(q, k, v, g, cu_seqlens);
  const RecurrenceShape& s = in.shape;
  in.check_state(initial_state, "initial_state", s.num_seqs, state_v_first);
  Tensor o = in.new_output(s.num_value_heads, s.value_dim);
  Tensor final_state = output_final_state ? in.new_state(s.num_seqs, state_v_first) : in.none();
  if (in.empty()) return {o, output_final_state ? pass_state(final_state, initial_state) : final_state};

  Allocations allocations;
  SimpleGlaStepParams params{};
  in.fill(params, allocations);
  params.scale = scale, params.state_v_first = state_v_first, params.g = data_or_null(g);
  params.cu_seqlens = static_cast<const int32_t*>(data_or_null(cu_seqlens)), params.num_memories = 1;
  params.initial_state = data_or_null(initial_state), params.final_state = data_or_null(final_state);
  params.num_slots = s.num_seqs, params.o = o.mutable_data_ptr();
  allocations.input(g, "g"), allocations.input(cu_seqlens, "cu_seqlens");
  allocations.input(initial_state, "initial_state"), allocations.output(o, "o");
  allocations.output(final_state, "final_state");
  check_launch(simple_gla_step(params, launch_on(q)));
  return {o, final_state};
}

Tensor step_(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g, const Tensor& state,
             const OptionalTensor& state_indices, const OptionalTensor& memories, int64_t num_memories, double scale,
             bool state_v_first) {
  const DeviceScope device(q);
  Call in(q, k, v, g, std::nullopt);
  RecurrenceShape& s = in.shape;
  const int64_t num_tokens = memories.has_value() ? s.seqlen : s.num_seqs;
  if (memories.has_value()) s.num_seqs = s.batch * s.seqlen;
  STD_TORCH_CHECK(state.dim() == 4, "state must have four dimensions");
  in.check_state(state, "state", state.size(0), state_v_first);
  check_memories(state_indices, memories, num_memories, {s.batch, s.seqlen}, num_tokens, state.size(0));
  Tensor o = in.new_output(s.num_value_heads, s.value_dim);
  if (in.empty()) return o;

  Allocations allocations;
  SimpleGlaStepParams params{};
  in.fill(params, allocations);
  params.scale = scale, params.state_v_first = state_v_first, params.g = data_or_null(g);
  params.state_indices = static_cast<const int32_t*>(data_or_null(state_indices));
  params.memories = static_cast<const int32_t*>(data_or_null(memories)), params.num_memories = num_memories;
  params.initial_state = data_or_null(state), params.final_state = data_or_null(state);
  params.num_slots = state.size(0), params.o = o.mutable_data_ptr();
  allocations.input(g, "g"), allocations.input(state_indices, "state_indices");
  allocations.input(memories, "memories"), allocations.input(state, "state"), allocations.output(o, "o");
  check_launch(simple_gla_step(params, launch_on(q)));
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("simple_gla_fwd", TORCH_BOX(&fwd));
  m.impl("simple_gla_bwd", TORCH_BOX(&bwd));
  m.impl("simple_gla_recurrent_fwd", TORCH_BOX(&recurrent_fwd));
  m.impl("simple_gla_step_", TORCH_BOX(&step_));
}

}  // namespace remora
