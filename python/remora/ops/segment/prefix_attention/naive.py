"""The definition of prefix attention: one masked softmax over all keys of a token."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_prefix(T: int, S: int, stride: int, size: int, offset: int) -> Tensor:
    """[T]: how many summaries each token sees."""
    return ((torch.arange(T) + 1 - size - offset).div(stride, rounding_mode="floor") + 1).clamp(0, S)


def naive_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_visible: Tensor,
    k_self: Tensor | None = None,
    v_self: Tensor | None = None,
    window: int = 0,
    window_offset: int = 0,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One batch of whole sequences: n_visible [B, T] or [T], bias [B, H, S] or broadcast to it."""
    B, T, H, D = q.shape
    S, repeat = k.shape[1], H // k.shape[2]
    scale = D**-0.5 if scale is None else scale

    def heads(x: Tensor) -> Tensor:
        return x.repeat_interleave(repeat, 2)

    def scores(keys: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
        dots = torch.einsum("bthd,bshd->bhts", q, heads(keys)) * scale
        dots = dots if bias is None else dots + bias.expand(B, H, S)[:, :, None]
        return dots.masked_fill(~visible.to(q.device), -torch.inf)

    parts = [scores(k, torch.arange(S) < n_visible.cpu().reshape(-1, 1, T, 1), bias)]
    values = [heads(v).transpose(1, 2)]
    if k_win is not None and v_win is not None:
        last, key = torch.arange(T)[:, None] - window_offset, torch.arange(k_win.shape[1])
        parts.append(scores(k_win, (key <= last) & (key > last - window)))
        values.append(heads(v_win).transpose(1, 2))
    if k_self is not None and v_self is not None:
        parts.append((torch.einsum("bthd,bthd->bht", q, heads(k_self)) * scale)[..., None])
    if sink is not None:
        parts.append(sink.to(q.dtype)[None, :, None, None].expand(B, H, T, 1))
    logits = torch.cat(parts, -1)
    is_empty = torch.isneginf(logits).all(-1)
    safe = torch.where(is_empty[..., None], 0, logits)  # whose gradient is not NaN
    lse = safe.logsumexp(-1)
    weights = torch.where(torch.isneginf(logits), 0, (safe - lse[..., None]).exp())
    keys = sum(x.shape[2] for x in values)
    o = _weighted(weights[..., :keys], torch.cat(values, 2))
    if v_self is not None:
        o = o + weights[..., keys, None] * heads(v_self).transpose(1, 2)
    return o.transpose(1, 2), lse.masked_fill(is_empty, -torch.inf).transpose(1, 2)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Weights @ values, where a weight of zero selects its value away."""
    bad = ~torch.isfinite(values.detach())
    product = weights @ torch.where(bad, 0, values)
    if not bad.any():
        return product
    chosen = torch.where(weights[..., None] != 0, weights[..., None] * values[:, :, None], 0)
    return torch.where(bad[:, :, None], chosen, 0).sum(3) + product
