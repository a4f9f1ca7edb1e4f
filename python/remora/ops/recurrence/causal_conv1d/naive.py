"""The definition of the causal convolution, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One batch of whole sequences: x [N, T, D], weight [D, W], states [N, W - 1, D]."""
    tail = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], tail, x.shape[2])
    history = torch.cat([initial_state, x], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        y = torch.einsum("nwd,dw->nd", history[:, t : t + tail + 1], weight)
        y = y if bias is None else y + bias
        outputs.append(F.silu(y) if activation == "silu" else y)
    y = torch.stack(outputs, dim=1) if outputs else x.new_zeros(x.shape)
    return y, history[:, x.shape[1] :]
