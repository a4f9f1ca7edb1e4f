// One token of the gated delta rule, for the step kernel of the family.
//
//   p = S^T k, w = S^T q      one pass over the old state
//   u = beta (v - e^g p)      o = scale (e^g w + (k . q) u)      S = e^g S + k u^T
#pragma once
#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/step_kernel.cuh"

namespace remora {

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

/// Log decay and beta of one token after the maps that the step fuses.
__device__ __forceinline__ float2 load_gates(const GatedDeltaRuleStepParams& op, int64_t offset, int64_t head) {
  float g = op.g != nullptr ? static_cast<const float*>(op.g)[offset] : 0.f;
  if (op.a_log != nullptr) {
    const float bias = op.dt_bias != nullptr ? static_cast<const float*>(op.dt_bias)[head] : 0.f;
    g = -expf(static_cast<const float*>(op.a_log)[head]) * softplus(g + bias);
  }
  float beta = static_cast<const float*>(op.beta)[offset];
  if (op.use_beta_sigmoid) beta = 1.f / (1.f + expf(-beta));
  if (op.allow_neg_eigval) beta *= 2.f;
  return {g < -88.f ? -88.f : g, beta};
}

template <int kRows, class Sum>
__device__ __forceinline__ void step_token(const GatedDeltaRuleStepParams& op, int64_t gate_offset, int64_t head,
                                           const float (&q)[kRows], const float (&k)[kRows], const float (&v)[4],
                                           Sum sum_rows, float (&state)[kRows][4], float (&o)[4]) {
  const float2 gates = load_gates(op, gate_offset, head);
  const float decay = expf(gates.x), beta = gates.y;

  float sums[11] = {};  // S^T k, S^T q, k . q, k . k, q . q
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j] = fmaf(state[i][j], k[i], sums[j]);
      sums[4 + j] = fmaf(state[i][j], q[i], sums[4 + j]);
    }
    sums[8] = fmaf(k[i], q[i], sums[8]);
    sums[9] = fmaf(k[i], k[i], sums[9]);
    sums[10] = fmaf(q[i], q[i], sums[10]);
  }
  sum_rows(sums);
  const float rstd_k = op.use_qk_l2norm ? rsqrtf(sums[9] + 1e-6f) : 1.f;
  const float scale_q = static_cast<float>(op.scale) * (op.use_qk_l2norm ? rsqrtf(sums[10] + 1e-6f) : 1.f);
  const float kq = sums[8] * rstd_k * scale_q;
  float u[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u[j] = beta * fmaf(-decay * rstd_k, sums[j], v[j]);
    o[j] = fmaf(decay * scale_q, sums[4 + j], kq * u[j]);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state[i][j] = fmaf(k[i] * rstd_k, u[j], decay * state[i][j]);
  }
}

}  // namespace remora
