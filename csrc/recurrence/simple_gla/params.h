// Arguments of linear attention with scalar decay, shared by the CPU and CUDA kernels. Legend of shapes:
// docs/numerics.md. Sequences and routed rows: recurrence/shape.h.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "recurrence/shape.h"

namespace remora {

struct SimpleGlaFwdParams {
  RecurrenceShape shape;
  DType dtype;        // of q, k, v, o
  DType state_dtype;  // of g, initial_state, final_state: float32, or float64 if dtype is
  DType saved_dtype;  // of saved_states: bfloat16 if dtype is, else state_dtype
  double scale;
  bool state_v_first;  // initial_state, final_state are [N, HV, V, K]

  const void* q;  // [B, T, H, K], q_stride
  const void* k;  // [B, T, H, K], k_stride
  const void* v;  // [B, T, HV, V], v_stride
  TokenStrides q_stride, k_stride, v_stride;
  const void* g;              // [B, T, HV] log decay per step, <= 0; null: no decay
  const int32_t* cu_seqlens;  // [N + 1] or null
  const int32_t* rows;        // [B * T] or null
  const void* initial_state;  // [N, HV, K, V] or null: zero

  void* o;            // [B, T, HV, V]
  void* final_state;  // [N, HV, K, V] or null
  void*
      saved_states;  // [num_state_slots, HV, K, V] or null; for the backward pass, slots without tokens stay unwritten

  void* workspace;  // simple_gla_fwd_workspace() bytes, uninitialised, 256-byte aligned; null if 0
};

/// Token by token: the recurrent forward pass and the decode step, which updates a pool of states in place.
struct SimpleGlaStepParams {
  RecurrenceShape shape;  // num_seqs == batch unless cu_seqlens
  DType dtype, state_dtype;
  double scale;
  bool state_v_first;

  const void* q;  // [B, T, H, K], q_stride
  const void* k;  // [B, T, H, K], k_stride
  const void* v;  // [B, T, HV, V], v_stride
  TokenStrides q_stride, k_stride, v_stride;
  const void* g;                 // [B, T, HV] log decay; null: no decay
  const int32_t* cu_seqlens;     // [N + 1] or null
  const int32_t* state_indices;  // [N] or null; outside [0, num_slots): sequence skipped, its output zero
  // Routed decode, with memories: batch [B, T] holds the B choices of T sequences, one token each (num_seqs == B * T).
  // Choice b of sequence t works on slot (state_indices ? state_indices[t] : t) * num_memories + memories[b, t]; either
  // index outside its range skips it. state_indices is [T] then, and num_slots a multiple of num_memories.
  const int32_t* memories;  // [B, T] or null
  int64_t num_memories;

  const void* initial_state;  // [N or num_slots, HV, K, V] or null: zero
  void* final_state;          // same shape or null; may be initial_state (in place)
  int64_t num_slots;          // rows of the state tensors

  void* o;  // [B, T, HV, V]
};

struct SimpleGlaBwdParams {
  RecurrenceShape shape;
  DType dtype, state_dtype, saved_dtype;
  double scale;
  bool state_v_first;

  const void* q;  // [B, T, H, K], q_stride
  const void* k;  // [B, T, H, K], k_stride
  const void* v;  // [B, T, HV, V], v_stride
  TokenStrides q_stride, k_stride, v_stride;
  const void* g;              // [B, T, HV] or null
  const int32_t* cu_seqlens;  // [N + 1] or null
  const int32_t* rows;        // [B * T] or null
  const void* initial_state;  // [N, HV, K, V] or null: zero; what the first slot of a sequence holds rounded
  const void* saved_states;   // [num_state_slots, HV, K, V], as the forward pass wrote it
  const void* d_o;            // [B, T, HV, V] contiguous
  const void* d_final_state;  // as final_state, or null: zero

  void* dq;               // [B, T, H, K]
  void* dk;               // [B, T, H, K]
  void* dv;               // [B, T, HV, V]
  void* dg;               // [B, T, HV] state_dtype or null
  void* d_initial_state;  // as initial_state, or null

  void* workspace;  // simple_gla_bwd_workspace() bytes, uninitialised, 256-byte aligned; null if 0
};

}  // namespace remora
