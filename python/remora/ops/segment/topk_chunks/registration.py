"""Fake kernels and autograd formulas of the selection of chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)
from remora.ops.segment.packed import chosen_rows


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::topk_chunks_fwd")
def _topk_fake(
    q: Tensor, k_sum: Tensor, w: Tensor | None, bias: Tensor | None, n_visible: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, k: int, num_lists: int, stride: int, size: int,
    force_first: int, force_local: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*q.shape[:2], num_lists, k)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=_wide(q))


@torch.library.register_fake("remora::chunk_scores_fwd")
def _scores_fake(
    q: Tensor, k_sum: Tensor, idx: Tensor, w: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(idx.shape, dtype=_wide(q))


@torch.library.register_fake("remora::chunk_scores_bwd")
def _scores_bwd_fake(
    q: Tensor, k_sum: Tensor, idx: Tensor, w: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    order: Tensor, rows: Tensor, starts: Tensor, d_scores: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dw = q.new_empty((0 if w is None else q.shape[0], *q.shape[1:3]), dtype=_wide(q))
    return q.new_empty(q.shape), k_sum.new_empty(k_sum.shape), dw


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("the selection of chunks has no gradient: chunk_scores has that of the chosen scores")


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("chunk_scores has no second derivative")


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _scores_backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
    q, k_sum, idx, w, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
    S, Hk = k_sum.shape[1:3]
    lookups, num_rows = chosen_rows(idx, min(idx.shape[2], Hk), S, cu_seqlens, cu_seqlens_k)
    order, rows, starts, _ = torch.ops.remora.slot_plan(lookups, num_rows, 1, num_rows, 0, None)
    dq, dk_sum, dw = torch.ops.remora.chunk_scores_bwd(
        q, k_sum, idx, w, cu_seqlens, cu_seqlens_k, order, rows, starts, d_scores.contiguous(), ctx.scale
    )
    return dq, dk_sum, None, None if w is None else dw, None, None, None


torch.library.register_autograd("remora::topk_chunks_fwd", _no_gradient, setup_context=_save_nothing)
torch.library.register_autograd("remora::chunk_scores_fwd", _scores_backward, setup_context=_save_scores)
torch.library.register_autograd("remora::chunk_scores_bwd", _no_second_derivative, setup_context=_save_nothing)
