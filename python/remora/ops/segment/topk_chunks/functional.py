"""Selection of chunks by their summaries: what users call. Arguments are checked and brought into the operators' form
here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.pkm.memory_bag import memory_bag
from remora.ops.segment.packed import chosen_rows, packed_offsets

MAX_TOPK = 512
MAX_HEAD_DIM = 256
GROUPS = ("per_head", "kv_group", "shared")
SCORES = ("dot", "relu_weighted")


@dataclass(frozen=True)
class _Inputs:
    """Checked arguments in the operators' form; `w` only for relu_weighted."""

    q: Tensor
    k_sum: Tensor
    lists: int
    w: Tensor | None
    bias: Tensor | None  # [B, Hs, S]
    scale: float
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None


def _check_bias(bias: Tensor | None, like: Tensor, wide: torch.dtype, B: int, lists: int, S: int) -> Tensor | None:
    if bias is None:
        return None
    check.is_tensor(bias, "bias")
    check.has_dtype(bias, "bias", check.FLOATS)
    check.same_device(bias, "bias", like, "q")
    shapes = {1: ("[S]", [S]), 2: ("[B, S]", [B, S])}
    check.has_shape(bias, "bias", *shapes.get(bias.dim(), ("[S], [B, S] or [B, Hs, S]", [B, lists, S])))
    bias = bias if bias.dim() == 3 else bias.view(-1, 1, S)
    return bias.to(wide).expand(B, lists, S).contiguous()


def _check_inputs(
    q: Tensor, k_sum: Tensor, group: str, score: str, w: Tensor | None, bias: Tensor | None, scale: float | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
) -> _Inputs:  # fmt: skip
    check.is_tensor(q, "q")
    check.is_tensor(k_sum, "k_sum")
    _ext.require_backend(q, "q")
    check.has_dtype(q, "q", check.FLOATS if _ext.runs_on_cpu_kernels(q) else check.FLOATS[1:])
    check.has_dtype(k_sum, "k_sum", (q.dtype,))
    check.same_device(k_sum, "k_sum", q, "q")
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {list(q.shape)}")
    B, T, H, D = q.shape
    check.has_shape(k_sum, "k_sum", "[B, S, Hk, D]", [B, None, None, D])
    S, Hk = k_sum.shape[1:3]
    check.in_range(H, "the number of heads H of q", 1, 2**31 - 1)
    if Hk == 0 or H % Hk != 0:
        raise ValueError(f"k_sum must have a number of heads Hk that divides H = {H}, got {Hk}")
    check.in_range(D, "the head size D of q and k_sum", 1, MAX_HEAD_DIM)
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(repr, GROUPS))}, got {group!r}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    if (score == "relu_weighted") != (w is not None):
        raise ValueError(f"w must be given for score='relu_weighted' and for no other, got score={score!r}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if w is not None:
        check.is_tensor(w, "w")
        check.has_dtype(w, "w", check.FLOATS)
        check.has_shape(w, "w", "[B, T, H]", [B, T, H])
        check.same_device(w, "w", q, "q")
        w = w.to(wide).contiguous()
    cu_seqlens, cu_seqlens_k = packed_offsets(cu_seqlens, cu_seqlens_k, q, S)
    lists = {"per_head": H, "kv_group": Hk, "shared": 1}[group]
    return _Inputs(
        q=q,
        k_sum=k_sum,
        lists=lists,
        w=w,
        bias=_check_bias(bias, q, wide, B, lists, S),
        scale=D**-0.5 if scale is None else float(scale),
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )


def _check_windows(stride: int | None, size: int | None, n_visible: Tensor | None, q: Tensor) -> tuple[int, int]:
    if n_visible is not None:
        if stride is not None or size is not None:
            raise ValueError("n_visible stands in place of stride and size, got both")
        check.is_tensor(n_visible, "n_visible")
        check.has_dtype(n_visible, "n_visible", (torch.int32, torch.int64))
        check.has_shape(n_visible, "n_visible", "[B, T]", q.shape[:2])
        check.same_device(n_visible, "n_visible", q, "q")
        return 0, 0
    if stride is None:
        if size is not None:
            raise ValueError(f"size needs stride, got size={size} alone")
        return 0, 0
    size = stride if size is None else size
    check.in_range(stride, "stride", 1, 2**31 - 1)
    check.in_range(size, "size", 1, 2**31 - 1)
    return stride, size


def topk_chunks(
    q: Tensor,
    k_sum: Tensor,
    k: int,
    *,
    stride: int | None = None,
    size: int | None = None,
    n_visible: Tensor | None = None,
    group: str = "per_head",
    score: str = "dot",
    w: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    force_first: int = 0,
    force_local: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best chunks for every query, by the scores of their summaries. Scores are never stored.

        x[t, h, s] = <q[t, h], k_sum[s, h // (H / Hk)]>
        score[t, a, s] = scale sum_h f(x[t, h, s]) + bias[a, s]     float32 whatever the dtype of the inputs

        "dot"            f(x) = x
        "relu_weighted"  f(x) = w[t, h] max(x, 0)

        "per_head"  a list for every query head            Hs = H
        "kv_group"  a list for the heads that share keys   Hs = Hk, summed over them
        "shared"    one list                               Hs = 1, summed over all heads

    Query t sees the first n(t) summaries of its sequence: floor((t + 1 - size) / stride) + 1, those whose window of
    `size` tokens, one every `stride`, has closed by t; or `n_visible`; or all.

    The order is total. First come the forced chunks, by index: the first `force_first` and the last `force_local` of
    the n(t). Then the others by score descending, then by index; NaN is the greatest score, -0 equals +0, -infinity is
    a score like others. Given equal scores, the result is the same to the bit on every backend. Lists are filled up
    with index -1 and score -infinity.

    No gradient: `chunk_scores` computes the scores of chosen chunks with theirs.

    Args:
        q: [B, T, H, D] float64 (CPU only), float32, bfloat16 or float16, D <= 256.
        k_sum: [B, S, Hk, D] in the dtype of q; Hk divides H.
        k: 1 ... 512.
        stride, size: of the windows that are summarised; `size` defaults to `stride`.
        n_visible: [B, T] int32 or int64, in place of stride and size; what exceeds the summaries there are is cut.
        group, score: as above.
        w: [B, T, H] of any floating dtype, for "relu_weighted".
        bias: [S], [B, S] or [B, Hs, S] of any floating dtype.
        scale: default D^-1/2.
        force_first, force_local: together at most k.
        cu_seqlens: [N + 1] int32 or int64 offsets of packed sequences of tokens (B = 1).
        cu_seqlens_k: [N + 1] offsets of their summaries, needed with cu_seqlens. Indices are relative to the sequence.

    Returns:
        idx [B, T, Hs, k] int32 and scores [B, T, Hs, k] float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    x = _check_inputs(q, k_sum, group, score, w, bias, scale, cu_seqlens, cu_seqlens_k)
    stride, size = _check_windows(stride, size, n_visible, q)
    check.in_range(k, "k", 1, MAX_TOPK)
    check.in_range(force_first, f"force_first (k = {k})", 0, k)
    check.in_range(force_local, f"force_local (k = {k}, force_first = {force_first})", 0, k - force_first)
    if n_visible is not None:
        n_visible = n_visible.clamp(0, k_sum.shape[1]).to(torch.int32).contiguous()
    with torch.no_grad():
        idx, scores = torch.ops.remora.topk_chunks_fwd(
            x.q, x.k_sum, x.w, x.bias, n_visible, x.cu_seqlens, x.cu_seqlens_k, k, x.lists, stride, size, force_first,
            force_local, x.scale,
        )  # fmt: skip
    return idx, scores


def chunk_scores(
    q: Tensor,
    k_sum: Tensor,
    idx: Tensor,
    *,
    group: str = "per_head",
    score: str = "dot",
    w: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Scores of chosen chunks, as `topk_chunks` defines them, with gradients for q, k_sum, w and bias.

    An index outside the summaries of its sequence, such as -1, has score -infinity and no gradient. Which chunks a
    query may see is not asked again. Gradients of k_sum are sums in order of the queries, without atomics.

    Args:
        idx: [B, T, Hs, k] int32 or int64, such as `topk_chunks` returns; any k, repetitions allowed.
        q, k_sum, group, score, w, bias, scale, cu_seqlens, cu_seqlens_k: as in `topk_chunks`.

    Returns:
        [B, T, Hs, k] float32 (float64 for float64). Not twice differentiable.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    x = _check_inputs(q, k_sum, group, score, w, bias, scale, cu_seqlens, cu_seqlens_k)
    check.is_tensor(idx, "idx")
    check.has_dtype(idx, "idx", (torch.int32, torch.int64))
    check.has_shape(idx, "idx", f"[B, T, Hs, k] (group={group!r})", [*q.shape[:2], x.lists, None])
    check.same_device(idx, "idx", q, "q")
    idx = idx.clamp(-1, 2**31 - 1).to(torch.int32).contiguous()
    scores: Tensor = torch.ops.remora.chunk_scores_fwd(x.q, x.k_sum, idx, x.w, x.cu_seqlens, x.cu_seqlens_k, x.scale)
    if x.bias is None:
        return scores
    rows, _ = chosen_rows(idx, x.lists, k_sum.shape[1], x.cu_seqlens, x.cu_seqlens_k)
    return scores + memory_bag(rows.view(-1, 1), x.bias.view(-1, 1)).view(scores.shape)
