"""Product-key selection in plain PyTorch: every pair is scored and sorted. The oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_sub_scores(
    query: Tensor, keys: Tensor, score: str = "dot", tau: float = 1.0, eps: float | None = None
) -> Tensor:
    """[T, H, 2, n] scores of query halves [T, H, 2, ds] with sub-keys [H, 2, n, ds], as `remora.ops.pk_topk` defines
    them.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys = query.to(wide), keys.to(wide)
    product = torch.einsum("thad,hand->than", query, keys)
    if score == "dot":
        return product
    query_square, key_square = query.square().sum(-1, keepdim=True), keys.square().sum(-1)
    if score == "cosine":
        eps = 1e-6 if eps is None else eps
        return tau * product / ((query_square + eps).sqrt() * (key_square + eps).sqrt())
    eps = 1e-3 if eps is None else eps
    return -torch.log(eps + (query_square + key_square - 2 * product).clamp(min=0))


def naive_order(scores: Tensor) -> Tensor:
    """Indices of the last dimension by score descending, then by index; NaN first, -0 equal to +0."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def naive_pk_select(sub_scores: Tensor, k: int, candidates: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores and slots [T, H, k] of the best of all n^2 pairs of given sub-scores [T, H, 2, n], in the order of
    `remora.ops.pk_select`. Differentiable in sub_scores.
    """
    n = sub_scores.shape[-1]
    kept = n if candidates is None else candidates
    order = naive_order(sub_scores.detach())[..., :kept]
    rows, columns = sub_scores.gather(-1, order).unbind(2)
    sums = rows[..., :, None] + columns[..., None, :]
    opposite = sums.isnan() & ~rows.isnan()[..., :, None] & ~columns.isnan()[..., None, :]
    sums = torch.where(opposite, -torch.inf, sums).flatten(-2)  # position = row rank * n + column rank
    best = naive_order(sums.detach())[..., :k]
    row_index = order[:, :, 0].gather(-1, best // kept)
    column_index = order[:, :, 1].gather(-1, best % kept)
    return sums.gather(-1, best), row_index * n + column_index


def naive_pk_topk(
    query: Tensor, keys: Tensor, k: int, *, score: str = "dot", tau: float = 1.0, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """`remora.ops.pk_topk` from its definition; differentiable."""
    return naive_pk_select(naive_sub_scores(query, keys, score, tau, eps), k)


def naive_tucker_topk(
    query: Tensor, keys: Tensor, core: Tensor, u: Tensor, t: Tensor, k: int, *, candidates: int, signs: str = "positive"
) -> tuple[Tensor, Tensor]:
    """`remora.ops.tucker_topk` from its definition; differentiable in query, keys and core."""
    H, _, n, _, r = keys.shape
    query = query.repeat_interleave(H // query.shape[1], dim=1).expand(-1, -1, -1, r, -1)
    rows, columns = torch.einsum("thard,handr->thanr", query, keys).unbind(2)  # [T, H, n, r]
    form = core.sum(0)
    order = [naive_order(torch.einsum("thnr,hr->thn", x, w)) for x, w in ((rows, u), (columns, t))]
    best = min(candidates, n)
    groups = [[x[..., :best] for x in order]]
    if signs == "both" and best < n:
        groups.append([x[..., best:].flip(-1)[..., :best] for x in order])
    scores, slots = [], []
    for i, j in groups:
        row = rows.gather(2, i[..., None].expand(*i.shape, r))
        column = columns.gather(2, j[..., None].expand(*j.shape, r))
        scores.append(torch.einsum("thir,hrs,thjs->thij", row, form, column).flatten(2))
        slots.append((i[..., :, None] * n + j[..., None, :]).flatten(2))
    kept = naive_order(torch.cat(scores, -1).detach())[..., :k]
    slot = torch.cat(slots, -1).gather(-1, kept)
    row = rows.gather(2, (slot // n)[..., None].expand(*slot.shape, r))
    column = columns.gather(2, (slot % n)[..., None].expand(*slot.shape, r))
    return torch.einsum("thkr,chrs,thks->thkc", row, core, column), slot
