"""The definition of the selective scan, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One batch of whole sequences: u, delta, z [N, D, T], A [D, S], B, C [N, G, S, T], states [N, D, S]."""
    repeat = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        state = torch.exp(step * A) * state + step * u[:, :, t, None] * B[..., t]
        y = (state * C[..., t]).sum(-1)
        outputs.append(y if D is None else y + D * u[:, :, t])
    out = torch.stack(outputs, dim=-1) if outputs else u.new_zeros(u.shape)
    return out if z is None else out * F.silu(z), state
