// Every operator of remora. What each computes: the docstrings in python/remora/ops and the README of its folder.
// An optional output that was not asked for is a tensor of size zero.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(remora, m) {
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? rows, bool use_silu, bool output_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? rows, Tensor d_y, Tensor? d_final_state, bool use_silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor d_initial_state)");
  m.def(
      "causal_conv1d_step_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor? state_indices, "
      "Tensor? memories, int num_memories, bool use_silu) -> Tensor");
  m.def(
      "gated_delta_rule_fwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? rows, float scale, bool use_qk_l2norm, bool output_final_state, "
      "bool state_v_first, bool save_states) -> (Tensor o, Tensor final_state, Tensor saved_states)");
  m.def(
      "gated_delta_rule_bwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? rows, Tensor saved_states, Tensor d_o, Tensor? d_final_state, float scale, "
      "bool use_qk_l2norm, bool state_v_first) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor "
      "d_initial_state)");
  m.def(
      "gated_delta_rule_recurrent_fwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool use_qk_l2norm, bool output_final_state, bool state_v_first) "
      "-> (Tensor o, Tensor final_state)");
  m.def(
      "gated_delta_rule_step_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor(a!) state, "
      "Tensor? state_indices, Tensor? memories, int num_memories, Tensor? a_log, Tensor? dt_bias, float scale, "
      "bool use_qk_l2norm, bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first) -> Tensor");
  m.def(
      "simple_gla_fwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? rows, float scale, bool output_final_state, bool state_v_first, bool save_states) "
      "-> (Tensor o, Tensor final_state, Tensor saved_states)");
  m.def(
      "simple_gla_bwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? rows, Tensor saved_states, Tensor d_o, Tensor? d_final_state, float scale, bool state_v_first, "
      "bool with_dg) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor d_initial_state)");
  m.def(
      "simple_gla_recurrent_fwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool output_final_state, bool state_v_first) "
      "-> (Tensor o, Tensor final_state)");
  m.def(
      "simple_gla_step_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor? state_indices, "
      "Tensor? memories, int num_memories, float scale, bool state_v_first) -> Tensor");
  m.def(
      "mom_route_fwd(Tensor logits, Tensor? mask, int topk, bool renormalize, bool with_losses) "
      "-> (Tensor weights, Tensor indices, Tensor lse, Tensor losses, Tensor counts)");
  m.def(
      "mom_route_bwd(Tensor logits, Tensor? mask, Tensor weights, Tensor indices, Tensor lse, Tensor counts, "
      "Tensor d_weights, Tensor d_losses, bool renormalize, bool with_losses) -> Tensor");
  m.def(
      "route_plan(Tensor indices, Tensor? cu_seqlens, Tensor? mask, int seqlen, int num_memories, bool shared_memory, "
      "int capacity, bool drop_oldest) -> (Tensor rows, Tensor positions, Tensor cu_seqlens, Tensor counts)");
  m.def("mom_combine_fwd(Tensor o, Tensor weights) -> Tensor");
  m.def("mom_combine_bwd(Tensor o, Tensor weights, Tensor d_out) -> (Tensor, Tensor)");
  m.def(
      "sparse_update_(Tensor(a!) table, Tensor(b!)? moment, Tensor(c!) second, Tensor(d!)? last_step, "
      "Tensor(e!)? row_log_decay, Tensor rows, Tensor values, Tensor? num_rows, Tensor? grad_scale, bool all_rows, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, float log_decay, int step, "
      "bool stochastic_rounding, int seed, int column_offset) -> ()");
  m.def("row_norm(Tensor values, Tensor? num_rows) -> Tensor");
  m.def(
      "slot_plan(Tensor indices, int num_rows, int groups, int layer_rows, int offset, Tensor? row_mask) "
      "-> (Tensor order, Tensor rows, Tensor starts, Tensor num_rows)");
  m.def(
      "memory_bag_fwd(Tensor indices, Tensor table, Tensor? weights, Tensor? order, Tensor? rows, Tensor? starts, "
      "Tensor? num_rows, Tensor? row_mask, Tensor? row_grad, Tensor? buffer, int groups, int layer_rows, int offset) "
      "-> Tensor");
  m.def(
      "memory_bag_bwd_weights(Tensor indices, Tensor table, Tensor d_out, int heads, int groups, int layer_rows, "
      "int offset) -> Tensor");
  m.def(
      "memory_bag_bwd(Tensor indices, Tensor? table, Tensor? weights, Tensor d_out, Tensor order, Tensor rows, "
      "Tensor starts, Tensor num_rows, int heads, int table_rows, int groups, int layer_rows, int offset, bool dense) "
      "-> (Tensor d_table, Tensor d_weights)");
  m.def(
      "memory_bag_bwd_(Tensor indices, Tensor? table, Tensor? weights, Tensor d_out, Tensor order, Tensor rows, "
      "Tensor starts, Tensor num_rows, Tensor(a!) buffer, int heads, int groups, int layer_rows, int offset) "
      "-> Tensor d_weights");
  m.def(
      "peer_bag_fwd(Tensor indices, Tensor table, Tensor x, Tensor? weights, Tensor? order, Tensor? rows, "
      "Tensor? starts, Tensor? num_rows, Tensor? row_mask, Tensor? row_grad, Tensor? buffer, int groups, "
      "int layer_rows, int offset, int act) -> Tensor");
  m.def(
      "peer_bag_bwd(Tensor indices, Tensor table, Tensor x, Tensor? weights, Tensor d_out, Tensor? order, "
      "Tensor? rows, Tensor? starts, Tensor? num_rows, int groups, int layer_rows, int offset, int act, bool dense) "
      "-> (Tensor d_table, Tensor d_x, Tensor d_weights)");
  m.def(
      "peer_bag_bwd_(Tensor indices, Tensor table, Tensor x, Tensor? weights, Tensor d_out, Tensor order, "
      "Tensor rows, Tensor starts, Tensor num_rows, Tensor(a!) buffer, int groups, int layer_rows, int offset, "
      "int act) -> (Tensor d_x, Tensor d_weights)");
  m.def(
      "pk_topk_fwd(Tensor query, Tensor keys, int topk, int candidates, int score, float tau, float eps) "
      "-> (Tensor scores, Tensor slots)");
  m.def("pk_select_fwd(Tensor sub_scores, int topk, int candidates) -> (Tensor scores, Tensor slots)");
  m.def("pk_select_bwd(Tensor slots, Tensor d_scores, int num_keys) -> Tensor");
  m.def(
      "pk_axis_topk(Tensor query, Tensor keys, int candidates, int lowest, int score, float tau, float eps) "
      "-> (Tensor scores, Tensor indices)");
  m.def("sub_key_scores_fwd(Tensor query, Tensor keys, Tensor index) -> Tensor");
  m.def(
      "sub_key_scores_bwd(Tensor query, Tensor keys, Tensor index, Tensor d_scores, int score, float tau, float eps) "
      "-> (Tensor d_query, Tensor d_keys)");
  m.def(
      "tucker_select(Tensor query, Tensor keys, Tensor index, Tensor core, int topk, int positive) "
      "-> (Tensor chosen, Tensor sub_scores)");
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool reverse, "
      "bool output_final_state, bool save_states) -> (Tensor out, Tensor final_state, Tensor saved_states)");
  m.def(
      "selective_scan_bwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? cu_seqlens, Tensor saved_states, Tensor d_out, Tensor? d_final_state, "
      "bool has_initial_state, bool delta_softplus, bool reverse) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, "
      "Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor d_initial_state)");
  m.def(
      "selective_scan_step_(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor(a!) state, Tensor? state_indices, bool delta_softplus) -> Tensor");
  m.def(
      "segment_pool_fwd(Tensor x, Tensor? gate, Tensor? slot_bias, Tensor? segment_ids, Tensor? segment_starts, "
      "Tensor? seq_offsets, Tensor? window_offsets, int size, int stride, int num_windows, int mode, bool dual, "
      "bool save) "
      "-> (Tensor y, Tensor arg, Tensor lse)");
  m.def(
      "segment_pool_bwd(Tensor dy, Tensor? x, Tensor? gate, Tensor? slot_bias, Tensor? segment_ids, "
      "Tensor? segment_starts, Tensor? seq_offsets, Tensor? window_offsets, Tensor? y, Tensor? arg, Tensor? lse, "
      "int seqlen, int size, int stride, int mode, bool dual) -> (Tensor dx, Tensor dgate, Tensor dslot_bias)");
  m.def("vq_assign(Tensor x, Tensor codebook, Tensor? mask) -> (Tensor err2, Tensor idx)");
  m.def(
      "code_prefix_fwd(Tensor idx, Tensor v, Tensor? initial_count, Tensor? initial_mean, int n_code, int chunk) "
      "-> (Tensor log_count, Tensor mean, Tensor final_count, Tensor final_mean)");
  m.def(
      "code_prefix_bwd(Tensor idx, Tensor? initial_count, Tensor final_count, Tensor d_mean, Tensor? d_final_mean, "
      "int chunk) -> (Tensor dv, Tensor d_initial_mean)");
  m.def(
      "topk_chunks_fwd(Tensor q, Tensor k_sum, Tensor? w, Tensor? bias, Tensor? n_visible, Tensor? cu_seqlens, "
      "Tensor? cu_seqlens_k, int k, int num_lists, int stride, int size, int force_first, int force_local, "
      "float scale) -> (Tensor idx, Tensor scores)");
  m.def(
      "chunk_scores_fwd(Tensor q, Tensor k_sum, Tensor idx, Tensor? w, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
      "float scale) -> Tensor");
  m.def(
      "chunk_scores_bwd(Tensor q, Tensor k_sum, Tensor idx, Tensor? w, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
      "Tensor order, Tensor rows, Tensor starts, Tensor d_scores, float scale) -> (Tensor dq, Tensor dk_sum, "
      "Tensor dw)");
  m.def(
      "gather_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor idx, Tensor? weight, Tensor? cu_seqlens, "
      "Tensor? cu_seqlens_k, int block, bool causal, float scale) -> (Tensor o, Tensor lse)");
  m.def(
      "gather_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor idx, Tensor? weight, Tensor? cu_seqlens, "
      "Tensor? cu_seqlens_k, Tensor o, Tensor lse, Tensor order, Tensor rows, Tensor starts, Tensor d_o, "
      "Tensor? d_lse, int block, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dweight)");
  m.def(
      "prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? k_self, Tensor? v_self, Tensor? k_win, "
      "Tensor? v_win, Tensor? bias, Tensor? sink, Tensor? n_visible, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
      "int stride, int shift, int window, int window_shift, float scale) -> (Tensor o, Tensor lse)");
  m.def(
      "prefix_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor? k_self, Tensor? v_self, Tensor? k_win, "
      "Tensor? v_win, Tensor? bias, Tensor? sink, Tensor? n_visible, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
      "Tensor o, Tensor lse, Tensor d_o, Tensor? d_lse, int stride, int shift, int window, int window_shift, "
      "float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_self, Tensor dv_self, Tensor dk_win, "
      "Tensor dv_win, Tensor dbias, Tensor dsink)");
}
