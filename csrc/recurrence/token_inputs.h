// What the bindings of the recurrences share: the checked tensors of a call and its states.
#pragma once
#include <tuple>

#include "recurrence/shape.h"
#include "torch/stable.h"

namespace remora {

inline void check_offsets(const RecurrenceShape& shape, const OptionalTensor& cu_seqlens, const OptionalTensor& rows) {
  if (cu_seqlens.has_value()) {
    STD_TORCH_CHECK((shape.batch == 1 || rows.has_value()) && shape.num_seqs >= 1,
                    "cu_seqlens needs B == 1 (or rows) and at least two entries");
    check_dense(*cu_seqlens, "cu_seqlens", {shape.num_seqs + 1}, ScalarType::Int);
  }
  STD_TORCH_CHECK(!rows.has_value() || cu_seqlens.has_value(), "rows needs cu_seqlens");
  STD_TORCH_CHECK(!rows.has_value() || shape.batch * shape.seqlen <= INT32_MAX, "rows allows 2^31 - 1 rows");
  check_dense(rows, "rows", {shape.batch * shape.seqlen}, ScalarType::Int);
}

/// What tells a step on `num_slots` states which one each token works on; `num_tokens` without their choices.
inline void check_memories(const OptionalTensor& state_indices, const OptionalTensor& memories, int64_t num_memories,
                           std::initializer_list<int64_t> tokens_shape, int64_t num_tokens, int64_t num_slots) {
  check_dense(state_indices, "state_indices", {num_tokens}, ScalarType::Int);
  check_dense(memories, "memories", tokens_shape, ScalarType::Int);
  STD_TORCH_CHECK(num_memories >= 1 && num_slots % num_memories == 0,
                  "state must have a multiple of num_memories rows");
  STD_TORCH_CHECK(memories.has_value() || num_memories == 1, "num_memories needs memories");
  STD_TORCH_CHECK(state_indices.has_value() || num_slots == num_tokens * num_memories,
                  "state must have one row per sequence (and memory) if state_indices is not given");
}

/// [B, T, H, D] tensors of a call, with the last dimension made contiguous.
struct TokenInputs {
  Tensor q, k, v;
  RecurrenceShape shape;
  DType dtype, state_dtype;
  ScalarType state_type;

  TokenInputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& g,
              const OptionalTensor& beta, const OptionalTensor& cu_seqlens, const OptionalTensor& rows = std::nullopt)
      : q(with_dense_rows(q_in)), k(with_dense_rows(k_in)), v(with_dense_rows(v_in)), dtype(dtype_of(q_in, "q")) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "q, k and v must be [B, T, heads, channels]");
    shape = {.batch = q.size(0),
             .seqlen = q.size(1),
             .num_heads = q.size(2),
             .num_value_heads = v.size(2),
             .head_dim = q.size(3),
             .value_dim = v.size(3),
             .num_seqs = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : q.size(0)};
    check_shape(k, "k", {shape.batch, shape.seqlen, shape.num_heads, shape.head_dim});
    check_shape(v, "v", {shape.batch, shape.seqlen, shape.num_value_heads, shape.value_dim});
    STD_TORCH_CHECK(dtype_of(k, "k") == dtype && dtype_of(v, "v") == dtype, "q, k and v must have one dtype");
    STD_TORCH_CHECK(shape.num_heads > 0 && shape.num_value_heads % shape.num_heads == 0,
                    "the heads of v must be a multiple of the heads of q");
    STD_TORCH_CHECK(shape.head_dim >= 1 && shape.head_dim <= 256 && shape.value_dim >= 1 && shape.value_dim <= 256,
                    "K and V must be in 1...256");
    state_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    state_type = scalar_type_of(state_dtype);
    check_dense(g, "g", {shape.batch, shape.seqlen, shape.num_value_heads}, state_type);
    check_dense(beta, "beta", {shape.batch, shape.seqlen, shape.num_value_heads}, state_type);
    check_offsets(shape, cu_seqlens, rows);
  }

  DType saved_dtype() const { return dtype == DType::kBFloat16 ? dtype : state_dtype; }
  Tensor new_state(int64_t rows, bool v_first) const {
    return v_first ? new_tensor(q, {rows, shape.num_value_heads, shape.value_dim, shape.head_dim}, state_type)
                   : new_tensor(q, {rows, shape.num_value_heads, shape.head_dim, shape.value_dim}, state_type);
  }
  void check_state(const OptionalTensor& state, const char* name, int64_t rows, bool v_first) const {
    const auto [rank1, rank2] =
        v_first ? std::tuple(shape.value_dim, shape.head_dim) : std::tuple(shape.head_dim, shape.value_dim);
    check_dense(state, name, {rows, shape.num_value_heads, rank1, rank2}, state_type);
  }

  template <class Params>
  void fill(Params& params, Allocations& allocations) const {
    params.shape = shape;
    params.dtype = dtype, params.state_dtype = state_dtype;
    params.q = q.const_data_ptr(), params.k = k.const_data_ptr(), params.v = v.const_data_ptr();
    params.q_stride = {q.stride(0), q.stride(1), q.stride(2)};
    params.k_stride = {k.stride(0), k.stride(1), k.stride(2)};
    params.v_stride = {v.stride(0), v.stride(1), v.stride(2)};
    allocations.input(q, "q"), allocations.input(k, "k"), allocations.input(v, "v");
  }
  bool empty() const { return shape.batch * shape.seqlen == 0 || shape.num_seqs == 0; }
};

inline Tensor none_like(const Tensor& like) { return new_tensor(like, {0}, like.scalar_type()); }

/// Without tokens the state passes through.
inline Tensor pass_state(Tensor to, const OptionalTensor& from) {
  return from.has_value() ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
}

}  // namespace remora
