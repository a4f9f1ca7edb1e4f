"""The gated delta rule step by step in plain PyTorch: slow, differentiable, the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and returns of `remora.ops.chunk_gated_delta_rule`; computes in the widest dtype among q, beta, g and
    float32, so float64 inputs give a float64 result.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, beta.dtype), torch.float32)
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    g = torch.zeros_like(beta) if g is None else g.to(dtype)
    if use_gate_in_kernel:
        assert A_log is not None
        g = -A_log.to(dtype).exp() * F.softplus(g if dt_bias is None else g + dt_bias.to(dtype))
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    scale = K**-0.5 if scale is None else scale

    bounds = [(0, T)] if cu_seqlens is None else list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    o = [v.new_zeros(B, HV, V) for _ in range(T)]
    states = []
    for n, (begin, end) in enumerate(bounds):
        state = v.new_zeros(B, HV, K, V)
        if initial_state is not None:
            rows = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = (rows.transpose(-1, -2) if state_v_first else rows).to(dtype)
        for t in range(begin, end):
            state = state * g[:, t].exp()[..., None, None]
            residual = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * residual)
            o[t] = scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        states.append(state)
    out = torch.stack(o, dim=1) if T else v.new_zeros(B, 0, HV, V)
    if not output_final_state:
        return out, None
    final = states[0] if cu_seqlens is None else torch.cat(states)
    return out, final.transpose(-1, -2) if state_v_first else final
