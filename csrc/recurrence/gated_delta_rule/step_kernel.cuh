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

template <int kRows>
__device__ __forceinline__ void step_token(const GatedDeltaRuleStepParams& op, int64_t gate_offset, int64_t head,
                                           const float (&q)[kRows], const float (&k)[kRows], const float (&v)[4],
                                           float (&state)[kRows][4], float (&o)[4]) {
  const float2 gates = load_gates(op, gate_offset, head);
  const float decay = expf(gates.x), beta = gates.y;

  float kq = 0.f, kk = 0.f, qq = 0.f, sk[4] = {}, sq[4] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    kq = fmaf(k[i], q[i], kq);
    kk = fmaf(k[i], k[i], kk);
    qq = fmaf(q[i], q[i], qq);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sk[j] = fmaf(state[i][j], k[i], sk[j]);
      sq[j] = fmaf(state[i][j], q[i], sq[j]);
    }
  }
  float rstd_k = 1.f, scale_q = static_cast<float>(op.scale);
  if (op.use_qk_l2norm) {
    rstd_k = rsqrtf(sum_step_rows(kk) + 1e-6f);
    scale_q *= rsqrtf(sum_step_rows(qq) + 1e-6f);
  }
  kq = sum_step_rows(kq) * rstd_k * scale_q;
  float u[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u[j] = beta * fmaf(-decay * rstd_k, sum_step_rows(sk[j]), v[j]);
    o[j] = fmaf(decay * scale_q, sum_step_rows(sq[j]), kq * u[j]);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state[i][j] = fmaf(k[i] * rstd_k, u[j], decay * state[i][j]);
  }
}

}  // namespace remora
