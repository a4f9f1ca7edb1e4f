"""Attention to chosen blocks in plain PyTorch: every query meets every key once per listed block, most of them masked.
The oracle of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remora.ops.segment.topk_chunks.naive import sequence_of


def naive_block_mask(
    T: int, S: int, idx: Tensor, block: int, causal: bool, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> Tensor:
    """[B, T, Hs, n, S] whether a query may read a key in a listed block."""
    if cu_seqlens is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    masks = []
    for t in range(T):
        local, begin, end = sequence_of(t, T, S, cu_seqlens, cu_seqlens_k)
        tokens = T
        if cu_seqlens is not None:
            n = int((cu_seqlens <= t).sum()) - 1
            tokens = int(cu_seqlens[n + 1] - cu_seqlens[n]) if n + 1 < len(cu_seqlens) else 0
        visible = min(local + 1 + end - begin - tokens, end - begin) if causal else end - begin
        key = torch.arange(S) - begin
        in_block = (key >= 0) & (key.div(block, rounding_mode="floor") == idx[:, t, :, :, None])
        masks.append(in_block & (key < visible))
    return torch.stack(masks, dim=1)


def naive_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, block: int, *, weight: Tensor | None = None, causal: bool = True,
    scale: float | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`remora.ops.gather_attention` from its definition, in the dtype of q; `weight` makes it two_level.
    Differentiable.
    """
    _, T, H, D = q.shape
    S, Hk, lists = k.shape[1], k.shape[2], idx.shape[2]
    k, v = (x.repeat_interleave(H // Hk, dim=2) for x in (k, v))
    mask = naive_block_mask(T, S, idx, block, causal, cu_seqlens, cu_seqlens_k).repeat_interleave(H // lists, dim=2)
    x = torch.einsum("bthd,bshd->bths", q, k) * (D**-0.5 if scale is None else scale)
    x = x[:, :, :, None].expand(mask.shape)  # [B, T, H, n, S]
    dims = (-2, -1) if weight is None else (-1,)
    has_keys = mask.any(-1) if weight is not None else mask.flatten(-2).any(-1)
    spread = has_keys[..., None] if weight is not None else has_keys[..., None, None]
    lse = torch.where(spread, torch.where(mask, x, -torch.inf), 0).logsumexp(dims)
    shift = lse[..., None] if weight is not None else lse[..., None, None]
    p = torch.where(mask, (x - shift).exp(), 0)
    if weight is not None:
        p = p * weight.to(p.dtype).repeat_interleave(H // lists, dim=2)[..., None]
    o = torch.einsum("bthns,bshd->bthd", p, v)
    return o, torch.where(has_keys, lse, -torch.inf).to(torch.promote_types(q.dtype, torch.float32))
