"""Linear attention with scalar decay step by step in plain PyTorch: slow, differentiable, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and returns of `remora.ops.chunk_simple_gla`; computes in the widest dtype among q, g and float32, so
    float64 inputs give a float64 result.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    for gate in (g, g_gamma):
        dtype = dtype if gate is None else torch.promote_types(dtype, gate.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    decay = v.new_zeros(B, T, HV)
    for gate in (g, g_gamma):
        decay = decay if gate is None else decay + gate.to(dtype)
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
            write = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            state = state * decay[:, t].exp()[..., None, None] + write
            o[t] = scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        states.append(state)
    out = torch.stack(o, dim=1) if T else v.new_zeros(B, 0, HV, V)
    if not output_final_state:
        return out, None
    final = states[0] if cu_seqlens is None else torch.cat(states)
    return out, final.transpose(-1, -2) if state_v_first else final
