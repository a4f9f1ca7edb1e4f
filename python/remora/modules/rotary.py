"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def token_positions(seqlen: int, start: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Positions `[T]` of the tokens of a call within their sequence, the first of which stands at `start`; with
    `cu_seqlens` every packed sequence counts from zero.
    """
    tokens = torch.arange(start, start + seqlen, device=device)
    if cu_seqlens is None:
        return tokens
    begins = cu_seqlens.to(tokens.dtype)
    return tokens - begins[torch.searchsorted(begins, tokens, right=True) - 1]


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn channel pairs `(i, i + D / 2)` of `x` `[B, T, H, D]` by `positions[t] theta^(-2 i / D)`.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021). Angles are computed in
    fp32 (fp64 for fp64 inputs).
    """
    half = x.shape[-1] // 2
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(half, device=x.device, dtype=compute_dtype) / half
    angles = (positions.to(compute_dtype)[:, None] * theta**-exponents)[:, None]  # [T, 1, D / 2]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.to(compute_dtype).split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
