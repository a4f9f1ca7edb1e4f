"""Product-key memories: what users call. Arguments are checked and brought into the operators' form here.

Source: Lample, Sablayrolles, Ranzato, Denoyer, Jegou, "Large Memory Layers with Product Keys", arXiv 1907.05242.

A memory has n^2 slots; slot row * n + column is addressed by a pair of sub-keys, one of n rows and one of n columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

MAX_KEYS = 8192
MAX_TOPK = 1024
SCORES = ("dot", "cosine", "idw")
_DEFAULT_EPS = {"dot": 0.0, "cosine": 1e-6, "idw": 1e-3}


def _allowed_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return check.FLOATS if _ext.runs_on_cpu_kernels(x) else check.FLOATS[1:]


def _check_query_keys(query: Tensor, keys: Tensor) -> None:
    check.is_tensor(query, "query")
    check.is_tensor(keys, "keys")
    _ext.require_backend(query, "query")
    check.has_dtype(query, "query", _allowed_dtypes(query))
    check.has_dtype(keys, "keys", (query.dtype,))
    check.same_device(keys, "keys", query, "query")
    if query.dim() != 4 or query.shape[2] != 2 or query.shape[3] == 0:
        raise ValueError(f"query must have shape [T, H, 2, ds] with ds >= 1, got {list(query.shape)}")
    check.has_shape(keys, "keys", "[H, 2, n, ds]", [query.shape[1], 2, None, query.shape[3]])
    check.in_range(keys.shape[2], "n of keys [H, 2, n, ds]", 1, MAX_KEYS)


def _check_score(score: str, tau: float, eps: float | None) -> tuple[int, float, float]:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    eps = _DEFAULT_EPS[score] if eps is None else float(eps)
    if score != "dot" and not eps > 0:
        raise ValueError(f"eps must be positive for score={score!r}, got {eps}")
    return SCORES.index(score), float(tau), eps


def _check_topk(k: int, candidates: int | None, n: int) -> int:
    """Returns how many of an axis are kept: k unless the caller wants fewer."""
    check.in_range(k, f"k (at most n^2 with n = {n}, and {MAX_TOPK})", 1, min(n * n, MAX_TOPK))
    if candidates is None:
        return min(k, n)
    check.in_range(candidates, f"candidates (n = {n})", 1, min(n, MAX_TOPK))
    if candidates * candidates < k:
        raise ValueError(f"candidates must have a square of at least k = {k}, got {candidates}")
    return min(candidates, k)


def pk_topk(
    query: Tensor,
    keys: Tensor,
    k: int,
    *,
    score: str = "dot",
    tau: float = 1.0,
    eps: float | None = None,
    candidates: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best slots of a product-key memory for every token and head: scores and selection in one kernel.

        s_a[i] = score(q_a, K_a[i])     a = 0: rows, a = 1: columns; float32 whatever the dtype of the inputs
        S[i, j] = s_0[i] + s_1[j]       one float32 addition; the k best of all n^2, exactly

        "dot"     <q, K>
        "cosine"  tau <q, K> / (sqrt(<q, q> + eps) sqrt(<K, K> + eps))        eps = 1e-6
        "idw"     -log(eps + |q - K|^2)                                       eps = 1e-3

    The order is total. Rows and columns are ranked by score descending, then by index. Pairs are ordered by sum
    descending, then by rank of the row, then by rank of the column; NaN is the greatest score, -0 equals +0, and
    opposite infinities add up to -infinity. Given equal sub-scores, the result is the same to the bit on every backend.

    Args:
        query: [T, H, 2, ds] float64 (CPU only), float32, bfloat16 or float16.
        keys: [H, 2, n, ds] in the dtype of query, n <= 8192.
        k: 1 ... min(n^2, 1024).
        score: "dot", "cosine" or "idw".
        tau: temperature of "cosine".
        eps: positive; default above.
        candidates: keep so many of each axis, fewer than k: an approximation that misses slots. None: exact.

    Returns:
        scores [T, H, k] float32 (float64 for float64), differentiable in query and keys, and slots [T, H, k] int32,
        both in the order above. The gradient is exact wherever the selection is locally constant; there is no second
        derivative.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    _check_query_keys(query, keys)
    kind, tau, eps = _check_score(score, tau, eps)
    kept = _check_topk(k, candidates, keys.shape[2])
    scores, slots = torch.ops.remora.pk_topk_fwd(query.contiguous(), keys.contiguous(), k, kept, kind, tau, eps)
    return scores, slots


def pk_select(sub_scores: Tensor, k: int, *, candidates: int | None = None) -> tuple[Tensor, Tensor]:
    """The selection of `pk_topk` from given sub-scores: the k best sums of a row and a column, in its order.

    Args:
        sub_scores: [T, H, 2, n] float64 (CPU only), float32, bfloat16 or float16, n <= 8192.
        k, candidates: as in `pk_topk`.

    Returns:
        scores [T, H, k] float32 (float64 for float64), differentiable in sub_scores, and slots [T, H, k] int32.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    check.is_tensor(sub_scores, "sub_scores")
    _ext.require_backend(sub_scores, "sub_scores")
    check.has_dtype(sub_scores, "sub_scores", _allowed_dtypes(sub_scores))
    check.has_shape(sub_scores, "sub_scores", "[T, H, 2, n]", [None, None, 2, None])
    n = sub_scores.shape[3]
    check.in_range(n, "n of sub_scores [T, H, 2, n]", 1, MAX_KEYS)
    scores, slots = torch.ops.remora.pk_select_fwd(sub_scores.contiguous(), k, _check_topk(k, candidates, n))
    return scores, slots
