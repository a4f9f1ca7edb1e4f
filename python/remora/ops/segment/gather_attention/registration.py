"""Fake kernels and autograd formulas of attention to chosen blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)
from remora.ops.segment.packed import chosen_rows


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::gather_attention_fwd")
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, weight: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = q.shape[:3] if weight is None else (*q.shape[:3], idx.shape[3])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=_wide(q))


def _weight_parts(q: Tensor, k: Tensor, idx: Tensor) -> int:
    """weight_parts() in params.h."""
    H, Hk, lists = q.shape[2], k.shape[2], idx.shape[2]
    unit_heads = min(H // lists, H // Hk)
    return Hk // min(lists, Hk) * ((unit_heads + 15) // 16)


@torch.library.register_fake("remora::gather_attention_bwd")
def _bwd_fake(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, weight: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, o: Tensor, lse: Tensor, order: Tensor, rows: Tensor, starts: Tensor, d_o: Tensor,
    d_lse: Tensor | None, block: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch = 0 if weight is None else q.shape[0]
    dweight = q.new_empty((batch, *idx.shape[1:], _weight_parts(q, k, idx)), dtype=_wide(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, idx, weight, cu_seqlens, cu_seqlens_k, o, lse = ctx.saved_tensors
    S, Hk = k.shape[1:3]
    lookups, num_rows = chosen_rows(idx, min(idx.shape[2], Hk), S, cu_seqlens, cu_seqlens_k, ctx.block)
    order, rows, starts, _ = torch.ops.remora.slot_plan(lookups, num_rows, 1, num_rows, 0, None)
    d_o = torch.zeros_like(o) if d_o is None else d_o
    d_lse = None if d_lse is None else d_lse.contiguous()
    dq, dk, dv, dweight = torch.ops.remora.gather_attention_bwd(
        q, k, v, idx, weight, cu_seqlens, cu_seqlens_k, o, lse, order, rows, starts, d_o, d_lse, ctx.block, ctx.causal,
        ctx.scale,
    )  # fmt: skip
    return dq, dk, dv, None, None if weight is None else dweight.sum(-1), *[None] * 5


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("gather_attention has no second derivative")


torch.library.register_autograd("remora::gather_attention_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::gather_attention_bwd", _no_second_derivative, setup_context=_save_nothing)
