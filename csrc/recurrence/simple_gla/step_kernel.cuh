// One token of linear attention with scalar decay, for the step kernel of the family.
//
//   S = e^g S + k v^T      o = scale (e^g S_old^T q + (k . q) v), so that one pass over the old state is enough
#pragma once
#include "recurrence/simple_gla/params.h"
#include "recurrence/step_kernel.cuh"

namespace remora {

template <int kRows, class Sum>
__device__ __forceinline__ void step_token(const SimpleGlaStepParams& op, int64_t gate_offset, int64_t,
                                           const float (&q)[kRows], const float (&k)[kRows], const float (&v)[4],
                                           Sum sum_rows, float (&state)[kRows][4], float (&o)[4]) {
  const float g = op.g != nullptr ? static_cast<const float*>(op.g)[gate_offset] : 0.f;
  const float decay = expf(g < -88.f ? -88.f : g), scale = static_cast<float>(op.scale);

  float sums[5] = {};  // S^T q, k . q
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = fmaf(state[i][j], q[i], sums[j]);
    sums[4] = fmaf(k[i], q[i], sums[4]);
  }
  sum_rows(sums);
  const float kq = sums[4] * scale;
#pragma unroll
  for (int j = 0; j < 4; ++j) o[j] = fmaf(decay * scale, sums[j], kq * v[j]);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state[i][j] = fmaf(k[i], v[j], decay * state[i][j]);
  }
}

}  // namespace remora
