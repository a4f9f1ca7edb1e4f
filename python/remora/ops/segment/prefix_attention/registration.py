"""Fake kernels and autograd formulas of `torch.ops.remora.prefix_attention_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::prefix_attention_fwd")
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, k_self: Tensor | None, v_self: Tensor | None, k_win: Tensor | None,
    v_win: Tensor | None, bias: Tensor | None, sink: Tensor | None, n_visible: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, stride: int, shift: int, window: int, window_shift: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.register_fake("remora::prefix_attention_bwd")
def _bwd_fake(
    q: Tensor, k: Tensor, v: Tensor, k_self: Tensor | None, v_self: Tensor | None, k_win: Tensor | None,
    v_win: Tensor | None, bias: Tensor | None, sink: Tensor | None, n_visible: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None,
    stride: int, shift: int, window: int, window_shift: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = (q, k, v, k_self, v_self, k_win, v_win)
    return (
        *(q.new_empty((0,) if x is None else x.shape) for x in rows),
        *(lse.new_empty((0,) if x is None else x.shape) for x in (bias, sink)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, stride, shift, window, window_shift, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = (stride, shift, window, window_shift, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, o, lse = ctx.saved_tensors
    d_o = torch.zeros_like(o) if d_o is None else d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    grads = torch.ops.remora.prefix_attention_bwd(*tensors, o, lse, d_o, d_lse, *ctx.rest)
    given = [grad if x is not None else None for grad, x in zip(grads, tensors[:9], strict=True)]
    return (*given, *[None] * 8)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("prefix attention has no second derivative")


torch.library.register_autograd("remora::prefix_attention_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::prefix_attention_bwd", _no_second_derivative, setup_context=_save_nothing)
