"""Selection of chunks in plain PyTorch: every chunk is scored and sorted. The oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_all_scores(
    q: Tensor, k_sum: Tensor, lists: int, *, w: Tensor | None = None, bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """[B, T, Hs, S] scores of all chunks, as `remora.ops.topk_chunks` defines them. Differentiable."""
    B, T, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k_sum.to(wide).repeat_interleave(H // k_sum.shape[2], dim=2)
    products = torch.einsum("bthd,bshd->bths", q.to(wide), keys)
    if w is not None:
        products = products.relu() * w.to(wide)[..., None]
    scores = products.view(B, T, lists, H // lists, -1).sum(3) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + (bias if bias.dim() == 3 else bias.view(-1, 1, bias.shape[-1])).to(wide)[:, None]
    return scores


def sequence_of(t: int, T: int, S: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[int, int, int]:
    """Where token t stands in its sequence, and the part [begin, end) of S keys that belongs to it."""
    if cu_seqlens is None or cu_seqlens_k is None:
        return t, 0, S
    offsets, offsets_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for n in range(len(offsets) - 1):
        if offsets[n] <= t < offsets[n + 1]:
            return t - offsets[n], offsets_k[n], offsets_k[n + 1]
    return 0, 0, 0


def naive_topk_chunks(
    q: Tensor, k_sum: Tensor, k: int, *, lists: int, stride: int | None = None, size: int | None = None,
    n_visible: Tensor | None = None, w: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
    force_first: int = 0, force_local: int = 0, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`remora.ops.topk_chunks` from its definition."""
    B, T, S = *q.shape[:2], k_sum.shape[1]
    scores = naive_all_scores(q, k_sum, lists, w=w, bias=bias, scale=scale)
    idx = torch.full((B, T, lists, k), -1, dtype=torch.int32)
    best = torch.full((B, T, lists, k), -torch.inf, dtype=scores.dtype)
    for b in range(B):
        for t in range(T):
            local, begin, end = sequence_of(t, T, S, cu_seqlens, cu_seqlens_k)
            n = end - begin
            if n_visible is not None:
                n = min(max(int(n_visible[b, t]), 0), n)
            elif stride is not None:
                n = min(max((local + 1 - (size or stride)) // stride + 1, 0), n)
            first = min(force_first, n)
            forced = [*range(first), *range(n - min(force_local, n - first), n)]
            others = torch.tensor([s for s in range(n) if s not in forced], dtype=torch.long)
            for a in range(lists):
                row = scores[b, t, a, begin : begin + n]
                order = row[others].argsort(descending=True, stable=True)
                chosen = torch.cat([torch.tensor(forced, dtype=torch.long), others[order]])[:k]
                idx[b, t, a, : len(chosen)] = chosen.int()
                best[b, t, a, : len(chosen)] = row[chosen]
    return idx, best


def naive_chunk_scores(
    q: Tensor, k_sum: Tensor, idx: Tensor, *, w: Tensor | None = None, bias: Tensor | None = None,
    scale: float | None = None, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`remora.ops.chunk_scores` from its definition. Differentiable."""
    _, T, lists, _ = idx.shape
    S = k_sum.shape[1]
    scores = naive_all_scores(q, k_sum, lists, w=w, bias=bias, scale=scale)
    ranges = [sequence_of(t, T, S, cu_seqlens, cu_seqlens_k)[1:] for t in range(T)]
    begin, end = (torch.tensor(x, dtype=torch.long)[:, None, None] for x in zip(*ranges, strict=True))
    is_chunk = (idx >= 0) & (idx < end - begin)
    return torch.where(is_chunk, scores.gather(-1, torch.where(is_chunk, idx + begin, 0)), -torch.inf)
