"""Tucker-decomposed query-key retrieval (TDQKR): product keys whose axes interact through a small core.

Source: Huang, Min, Huang, Zhu, Zeng, Guo, Zhou, "Ultra-Sparse Memory Network", arXiv 2411.12364.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.pkm.pk_topk.functional import MAX_KEYS, MAX_TOPK, _allowed_dtypes

MAX_RANK = 8
MAX_CANDIDATES = 512  # of a sign


class TuckerPair(NamedTuple):
    """Leading singular pair u, t [H, r] of the sum of the cores, and the gap [H] between the two largest singular
    values, lambda_1 / lambda_2 (infinite for r = 1).
    """

    u: Tensor
    t: Tensor
    gap: Tensor


def tucker_pair(core: Tensor, previous: tuple[Tensor, Tensor] | None = None) -> TuckerPair:
    """The pair by which `tucker_topk` finds candidates: sum of the cores ~ lambda_1 u t^T, in float32 (float64).

    (u, t) and (-u, -t) describe the same core but opposite candidates, so the sign must not jump from one training step
    to the next: it is the one nearer to `previous`, by |u - u_prev|_1 + |t - t_prev|_1, ties to the sign of the
    decomposition; without `previous`, the sum of u is not negative. Call it once per optimizer step and keep u and t
    with the parameters. There is no gradient.

    Args:
        core: [h, H, r, r] floating point.
        previous: u and t [H, r] of the last call.

    Raises:
        TypeError, ValueError: an argument has a type, dtype or shape that is not allowed.
    """
    check.is_tensor(core, "core")
    check.has_dtype(core, "core", check.FLOATS)
    if core.dim() != 4 or core.shape[2] != core.shape[3] or 0 in core.shape:
        raise ValueError(f"core must have shape [h, H, r, r], got {list(core.shape)}")
    total = _total(core)
    left, values, right = torch.linalg.svd(total)
    u, t = left[..., 0], right[..., 0, :]
    if previous is None:
        flip = u.sum(-1) < 0
    else:
        for x, name in zip(previous, ("u", "t"), strict=True):
            check.is_tensor(x, f"previous {name}")
            check.has_shape(x, f"previous {name}", "[H, r]", u.shape)
        old_u, old_t = (x.to(u) for x in previous)
        same = (u - old_u).abs().sum(-1) + (t - old_t).abs().sum(-1)
        opposite = (u + old_u).abs().sum(-1) + (t + old_t).abs().sum(-1)
        flip = opposite < same
    sign = 1 - 2 * flip.to(u.dtype).unsqueeze(-1)
    gap = values[:, 0] / values[:, 1] if values.shape[1] > 1 else torch.full_like(values[:, 0], torch.inf)
    return TuckerPair(u * sign, t * sign, gap)


def tucker_core_penalty(core: Tensor, threshold: float = 0.15) -> Tensor:
    """Keeps the core near rank one, where candidates by the leading pair are good.

        sum over heads and l >= 2 of max(0, lambda_l - threshold)^2 / (r - 1)

    with lambda the singular values of the sum of the cores. Differentiable; zero for r = 1.

    Args:
        core: [h, H, r, r] floating point.
        threshold: singular values up to it cost nothing.
    """
    check.is_tensor(core, "core")
    check.has_dtype(core, "core", check.FLOATS)
    values = torch.linalg.svdvals(core.to(_wide(core)).sum(0))[:, 1:]
    penalty: Tensor = (values - threshold).clamp(min=0).square().sum() / max(core.shape[-1] - 1, 1)
    return penalty


def tucker_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor,
    u: Tensor,
    t: Tensor,
    k: int,
    *,
    candidates: int = 128,
    signs: str = "positive",
) -> tuple[Tensor, Tensor]:
    """The k best slots under a bilinear form of row and column scores.

        R[i, r] = <q_{0,r}, K_0[i, :, r]>       C[j, r] = <q_{1,r}, K_1[j, :, r]>
        S_c[i, j] = R[i]^T core_c C[j]          slots by S = sum_c S_c
        a[i] = u . R[i], b[j] = t . C[j]        candidates: the k1 rows of largest a, the k1 columns of largest b

    All pairs of a candidate row and a candidate column are scored with the whole core, and the k best are kept, in
    order of S descending, then rank of the row by a, then rank of the column by b (ties of a, b by index, NaN first).
    Since a b, not a + b, approximates S, two negative factors make a large score too: signs="both" adds the pairs of
    the k1 lowest rows with the k1 lowest columns. Scores are float32 whatever the dtype of the inputs.

    Args:
        query: [T, Hq, 2, rq, ds], one per rank (rq = r) or shared by the ranks (rq = 1); float64 (CPU only), float32,
            bfloat16 or float16. Head h reads query head h // (H // Hq).
        keys: [H, 2, n, ds, r] in the dtype of query, n <= 8192, r <= 8.
        core: [h, H, r, r] floating point; h scores per slot.
        u, t: [H, r] of `tucker_pair`. No gradient reaches them.
        k: 1 ... min(pairs, 1024).
        candidates: k1, at most 512; n if it is less.
        signs: "positive" or "both".

    Returns:
        scores [T, H, k, h] float32 (float64 for float64), the S_c of each slot, differentiable in query, keys and core,
        and slots [T, H, k] int32. The gradient is exact wherever the selection is locally constant.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    T, Hq, H, n, ds, r = _check(query, keys, core, u, t)
    check.in_range(candidates, "candidates", 1, MAX_CANDIDATES)
    if signs not in ("positive", "both"):
        raise ValueError(f"signs must be 'positive' or 'both', got {signs!r}")
    best = min(candidates, n)
    lowest = min(best, n - best) if signs == "both" else 0
    pairs_of_all = best * best + lowest * lowest
    check.in_range(
        k, f"k (at most the {pairs_of_all} pairs of candidates, and {MAX_TOPK})", 1, min(pairs_of_all, MAX_TOPK)
    )
    query = query.repeat_interleave(H // Hq, dim=1) if Hq != H else query
    by_rank = keys.movedim(-1, 2).contiguous()  # [H, 2, r, n, ds]
    of_rank = query.expand(T, H, 2, r, ds).contiguous()
    with torch.no_grad():
        index = _candidates(query, by_rank, u, t, best, lowest)
        chosen, sub_scores = torch.ops.remora.tucker_select(of_rank, by_rank, index, _total(core), k, best)
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
        groups_index = chosen.unsqueeze(3).expand(T, H, 2, r, k).reshape(T, H * 2 * r, k)
        groups_query, groups_keys = of_rank.view(T, H * 2 * r, ds), by_rank.view(H * 2 * r, n, ds)
        sub_scores = torch.ops.remora.sub_key_scores_fwd(groups_query, groups_keys, groups_index)
        sub_scores = sub_scores.view(T, H, 2, r, k)
    rows, columns = sub_scores.unbind(2)  # [T, H, r, k]
    scores = torch.einsum("thrk,chrs,thsk->thkc", rows, core.to(_wide(query)), columns)
    return scores, chosen[:, :, 0] * n + chosen[:, :, 1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _total(core: Tensor) -> Tensor:
    return core.detach().to(_wide(core)).sum(0)


def _check(query: Tensor, keys: Tensor, core: Tensor, u: Tensor, t: Tensor) -> tuple[int, int, int, int, int, int]:
    for x, name in ((query, "query"), (keys, "keys"), (core, "core"), (u, "u"), (t, "t")):
        check.is_tensor(x, name)
    _ext.require_backend(query, "query")
    check.has_dtype(query, "query", _allowed_dtypes(query))
    check.has_dtype(keys, "keys", (query.dtype,))
    wide = (torch.float64,) if query.dtype == torch.float64 else check.FLOATS[1:]
    for x, name in ((core, "core"), (u, "u"), (t, "t")):
        check.has_dtype(x, name, wide)
    for x, name in ((keys, "keys"), (core, "core"), (u, "u"), (t, "t")):
        check.same_device(x, name, query, "query")
    if keys.dim() != 5 or keys.shape[1] != 2 or 0 in keys.shape:
        raise ValueError(f"keys must have shape [H, 2, n, ds, r], got {list(keys.shape)}")
    H, _, n, ds, r = keys.shape
    check.in_range(n, "n of keys [H, 2, n, ds, r]", 1, MAX_KEYS)
    check.in_range(r, "r of keys [H, 2, n, ds, r]", 1, MAX_RANK)
    check.has_shape(query, "query", "[T, Hq, 2, rq, ds]", [None, None, 2, None, ds])
    T, Hq, _, rq, _ = query.shape
    if rq not in (1, r):
        raise ValueError(f"query must have rq = 1 or r = {r}, got {rq}")
    if Hq == 0 or H % Hq != 0:
        raise ValueError(f"query must have a number of heads Hq that divides H = {H}, got {Hq}")
    check.has_shape(core, "core", "[h, H, r, r]", [None, H, r, r])
    check.has_shape(u, "u", "[H, r]", [H, r])
    check.has_shape(t, "t", "[H, r]", [H, r])
    return T, Hq, H, n, ds, r


def _candidates(query: Tensor, by_rank: Tensor, u: Tensor, t: Tensor, best: int, lowest: int) -> Tensor:
    """[T, H, 2, best + lowest] rows and columns by a and b, as products of one query and one set of sub-keys."""
    wide = _wide(query)
    T, H = query.shape[:2]
    weights = torch.stack((u, t), dim=1).to(wide)  # [H, 2, r]
    if query.shape[3] == 1:  # <q, sum_r u_r K_r>
        proxy_query = query[:, :, :, 0].to(wide)
        proxy_keys = torch.einsum("harnd,har->hand", by_rank.to(wide), weights)
    else:  # the ranks side by side
        proxy_query = (query.to(wide) * weights[..., None]).reshape(T, H, 2, -1)
        proxy_keys = by_rank.to(wide).movedim(2, 3).reshape(H, 2, by_rank.shape[3], -1)
    index: Tensor = torch.ops.remora.pk_axis_topk(
        proxy_query.contiguous(), proxy_keys.contiguous(), best, lowest, 0, 1.0, 0.0
    )[1]
    return index
