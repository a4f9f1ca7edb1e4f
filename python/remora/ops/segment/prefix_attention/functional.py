"""Prefix attention: what users call. Arguments are checked and brought into the operators' form here."""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.segment.offsets import summary_offsets

MAX_HEAD_DIM = 256
LIMIT = 2**30 - 2  # of lengths, strides and offsets: sums of two fit 32 bits


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check_pair(
    k: Tensor | None, v: Tensor | None, name: str, legend: str, shape: list[int | None], q: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """k_<name> and v_<name>, given together or not at all."""
    if k is None and v is None:
        return None, None
    for x, which in ((k, f"k{name}"), (v, f"v{name}")):
        if x is None:
            raise ValueError(f"k{name} and v{name} must be given together, got only one of them")
        check.is_tensor(x, which)
        check.has_dtype(x, which, (q.dtype,))
        check.has_shape(x, which, legend, shape)
        check.same_device(x, which, q, "q")
    assert k is not None
    assert v is not None
    if v.shape != k.shape:
        raise ValueError(f"v{name} must have the shape of k{name} ({list(k.shape)}), got {list(v.shape)}")
    return _dense_rows(k), _dense_rows(v)


def _check_offsets(offsets: Tensor, name: str, q: Tensor, size: int) -> Tensor:
    check.has_dtype(offsets, name, (torch.int32, torch.int64))
    check.same_device(offsets, name, q, "q")
    # kernels clamp them; that they do not fall, they have to rely on
    return offsets.clamp(0, size).cummax(0).values.to(torch.int32).contiguous()


def _check_bias(bias: Tensor, B: int, H: int, S: int, q: Tensor, dtype: torch.dtype) -> Tensor:
    check.is_tensor(bias, "bias")
    check.has_dtype(bias, "bias", check.FLOATS)
    check.same_device(bias, "bias", q, "q")
    allowed = ([S], [H, S], [B, H, S])
    if list(bias.shape) not in allowed:
        raise ValueError(f"bias must have shape [S], [H, S] or [B, H, S] = {[B, H, S]}, got {list(bias.shape)}")
    return _dense_rows(bias.to(dtype)).expand(B, H, S)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stride: int | None = None,
    size: int | None = None,
    offset: int | None = None,
    n_visible: Tensor | None = None,
    k_self: Tensor | None = None,
    v_self: Tensor | None = None,
    window: int = 0,
    window_offset: int = 0,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to a growing prefix of summaries, to itself and to a band of tokens; differentiable.

    One softmax runs over all that a token sees:

    * summaries j < n(t), with n(t) = floor((t + 1 - size - offset) / stride) + 1 within 0...S: summary j stands for
      tokens j stride ... j stride + size - 1 of its sequence and is seen `offset` tokens after its last one. Or n(t) is
      given by `n_visible`, or it is S (neither `stride` nor `n_visible`);
    * its own key and value (`k_self`, `v_self`); with them `offset` is 1 by default, so that n(t) = floor(t / stride):
      the rule of SCOUT (arXiv 2509.00935);
    * rows t - window_offset - window + 1 ... t - window_offset of `k_win`, `v_win`;
    * a logit per head without a value (`sink`).

    A token that sees nothing has o = 0 and lse = -inf. Keys that a token does not see have no part in its results,
    whatever they hold. Sums run in a fixed order: results are bitwise reproducible, and those of a sequence do not
    depend on its neighbours. The result of another call over other keys can be joined with `merge_attention`.

    Args:
        q: [B, T, H, D]; float32, bfloat16 or float16 (float64 on the CPU); D up to 256.
        k, v: [B, S, Hk, D] summaries, in the dtype of q. Hk divides H: query head h reads head h // (H // Hk).
        stride, size, offset: the rule above; `size` is `stride` by default, `offset` 0 (1 with `k_self`). A negative
            offset puts the first query at position -offset of its sequence.
        n_visible: [B, T] int32 or int64; negative is nothing, more than S everything.
        k_self, v_self: [B, T, Hk, D].
        window, window_offset: rows of k_win that a token sees, and how far behind it the last of them lies; negative if
            the first query stands behind the first row of k_win.
        k_win, v_win: [B, Tw, Hk, D]; with `cu_seqlens`, Tw = T.
        bias: [S], [H, S] or [B, H, S], added to the scaled scores of the summaries, float32 (float64 for float64 q).
        sink: [H].
        scale: of the scores q . k; default D ** -0.5.
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T (B = 1). Counting restarts in each.
        cu_seqlens_k: [N + 1] offsets of their summaries along S; default `summary_offsets(cu_seqlens, stride, size)`.
            Rows of k behind the last are not read, and their gradients are zero.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, T, H], the natural logarithm of the sum of exponentials, float32
        (float64 for float64 q).

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device, size or offset is not allowed, or arguments exclude each other.
    """
    check.is_tensor(q, "q")
    _ext.require_backend(q, "q")
    check.has_dtype(q, "q", check.FLOATS if _ext.runs_on_cpu_kernels(q) else check.FLOATS[1:])
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {list(q.shape)}")
    B, T, H, D = q.shape
    check.in_range(D, "the head size D of q", 1, MAX_HEAD_DIM)
    check.is_tensor(k, "k")
    check.is_tensor(v, "v")
    dense_k, dense_v = _check_pair(k, v, "", "[B, S, Hk, D]", [B, None, None, D], q)
    assert dense_k is not None
    S, Hk = k.shape[1:3]
    if Hk == 0 or H % Hk != 0:
        raise ValueError(f"the heads of q must be a multiple of those of k (Hk = {Hk}), got H = {H}")
    check.in_range(T, "T", 0, LIMIT)
    check.in_range(S, "S", 0, LIMIT)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k_self, v_self = _check_pair(k_self, v_self, "_self", "[B, T, Hk, D]", [B, T, Hk, D], q)

    step, shift = 1, LIMIT
    if stride is not None:
        if n_visible is not None:
            raise ValueError("stride and n_visible exclude each other, got both")
        size = stride if size is None else size
        offset = int(k_self is not None) if offset is None else offset
        check.in_range(stride, "stride", 1, LIMIT // 2)
        check.in_range(size, "size", 1, LIMIT // 2)
        check.in_range(offset, "offset", -LIMIT // 2, LIMIT // 2)
        step, shift = stride, 1 - size - offset
    elif size is not None or offset is not None:
        raise ValueError("size and offset need stride")
    if n_visible is not None:
        check.is_tensor(n_visible, "n_visible")
        check.has_dtype(n_visible, "n_visible", (torch.int32, torch.int64))
        check.has_shape(n_visible, "n_visible", "[B, T]", [B, T])
        check.same_device(n_visible, "n_visible", q, "q")
        n_visible = n_visible.clamp(0, S).to(torch.int32).contiguous()

    check.in_range(window, "window", 0, LIMIT)
    check.in_range(window_offset, "window_offset", -LIMIT, LIMIT)
    rows = T if cu_seqlens is not None else None
    legend = "[B, Tw, Hk, D]" if rows is None else "[B, T, Hk, D] (with cu_seqlens)"
    k_win, v_win = _check_pair(k_win, v_win, "_win", legend, [B, rows, Hk, D], q)
    if (k_win is None) != (window == 0):
        raise ValueError(f"k_win and v_win go with a window of 1 or more, got window = {window}")
    if bias is not None:
        bias = _check_bias(bias, B, H, S, q, dtype)
    if sink is not None:
        check.is_tensor(sink, "sink")
        check.has_dtype(sink, "sink", check.FLOATS)
        check.has_shape(sink, "sink", "[H]", [H])
        check.same_device(sink, "sink", q, "q")
        sink = sink.to(dtype).contiguous()

    if cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, B, T)
        cu_seqlens = _check_offsets(cu_seqlens, "cu_seqlens", q, T)
        if cu_seqlens_k is None:
            if stride is None:
                raise ValueError("cu_seqlens without stride needs cu_seqlens_k")
            cu_seqlens_k = summary_offsets(cu_seqlens, stride, size)
        check.is_tensor(cu_seqlens_k, "cu_seqlens_k")
        check.has_shape(cu_seqlens_k, "cu_seqlens_k", "[N + 1] (as cu_seqlens)", list(cu_seqlens.shape))
        if cu_seqlens_k.device.type == "cpu" and not torch.compiler.is_compiling() and int(cu_seqlens_k[-1]) > S:
            raise ValueError(
                f"k must have a row for every summary of cu_seqlens ({int(cu_seqlens_k[-1])}), got S = {S}"
            )
        cu_seqlens_k = _check_offsets(cu_seqlens_k, "cu_seqlens_k", q, S)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens")

    o, lse = torch.ops.remora.prefix_attention_fwd(
        _dense_rows(q), dense_k, dense_v, k_self, v_self, k_win, v_win, bias, sink, n_visible, cu_seqlens,
        cu_seqlens_k, step, shift, window, -window_offset, D**-0.5 if scale is None else float(scale),
    )  # fmt: skip
    return o, lse
