"""Fake kernels and autograd formulas of the routed operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::mom_route_fwd")
def _route_fwd_fake(
    logits: Tensor, mask: Tensor | None, topk: int, renormalize: bool, with_losses: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    R, M = logits.shape
    wide = _wide(logits)
    return (
        logits.new_empty((R, topk), dtype=wide),
        logits.new_empty((R, topk), dtype=torch.int32),
        logits.new_empty((R,), dtype=wide),
        logits.new_empty((2 if with_losses else 0,), dtype=wide),
        logits.new_empty((M + 1 if with_losses else 0,), dtype=torch.int32),
    )


@torch.library.register_fake("remora::mom_route_bwd")
def _route_bwd_fake(
    logits: Tensor, mask: Tensor | None, weights: Tensor, indices: Tensor, lse: Tensor, counts: Tensor,
    d_weights: Tensor, d_losses: Tensor, renormalize: bool, with_losses: bool,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


@torch.library.register_fake("remora::route_plan")
def _plan_fake(
    indices: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, seqlen: int, num_memories: int,
    shared_memory: bool, capacity: int, drop_oldest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    R, k = indices.shape
    if cu_seqlens is not None:
        num_seqs = cu_seqlens.shape[0] - 1
    else:
        num_seqs = R // seqlen if seqlen else 0
    shared = 1 if shared_memory else 0  # a bool would not do in symbolic sizes
    items, segments = R * (k + shared), num_seqs * (num_memories + shared)
    return (
        indices.new_empty((items,)), indices.new_empty((items,)), indices.new_empty((segments + 1,)),
        indices.new_empty((segments,)),
    )  # fmt: skip


@torch.library.register_fake("remora::mom_combine_fwd")
def _combine_fwd_fake(o: Tensor, weights: Tensor) -> Tensor:
    return o.new_empty(o.shape[1:])


@torch.library.register_fake("remora::mom_combine_bwd")
def _combine_bwd_fake(o: Tensor, weights: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), weights.new_empty(weights.shape)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, mask, _, ctx.renormalize, ctx.with_losses = inputs
    weights, indices, lse, _, counts = output
    ctx.save_for_backward(logits, mask, weights, indices, lse, counts)
    ctx.mark_non_differentiable(indices, lse, counts)
    ctx.set_materialize_grads(False)


def _route_backward(
    ctx: Any, d_weights: Tensor | None, _: Any, __: Any, d_losses: Tensor | None, ___: Any
) -> tuple[Tensor | None, ...]:
    logits, mask, weights, indices, lse, counts = ctx.saved_tensors
    d_weights = torch.zeros_like(weights) if d_weights is None else d_weights.contiguous()
    losses = 2 if ctx.with_losses else 0
    d_losses = weights.new_zeros(losses) if d_losses is None or not losses else d_losses.contiguous()
    d_logits = torch.ops.remora.mom_route_bwd(
        logits, mask, weights, indices, lse, counts, d_weights, d_losses, ctx.renormalize, ctx.with_losses
    )
    return d_logits, None, None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    o, weights = ctx.saved_tensors
    d_o, d_weights = torch.ops.remora.mom_combine_bwd(o, weights, d_out.contiguous())
    return d_o, d_weights


torch.library.register_autograd("remora::mom_route_fwd", _route_backward, setup_context=_save_route)
torch.library.register_autograd("remora::mom_combine_fwd", _combine_backward, setup_context=_save_combine)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("Mixture-of-Memories has no second derivative")


for _name in ("mom_route_bwd", "mom_combine_bwd"):
    torch.library.register_autograd(f"remora::{_name}", _no_second_derivative, setup_context=_save_nothing)
