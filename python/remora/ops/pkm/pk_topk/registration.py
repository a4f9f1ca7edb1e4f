"""Fake kernels and autograd formulas of the product-key operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ranked(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape, dtype=_wide(x)), x.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("remora::pk_topk_fwd")
def _topk_fake(
    query: Tensor, keys: Tensor, topk: int, candidates: int, score: int, tau: float, eps: float
) -> tuple[Tensor, Tensor]:
    return _ranked(query, (*query.shape[:2], topk))


@torch.library.register_fake("remora::pk_axis_topk")
def _axis_topk_fake(
    query: Tensor, keys: Tensor, candidates: int, lowest: int, score: int, tau: float, eps: float
) -> tuple[Tensor, Tensor]:
    return _ranked(query, (*query.shape[:3], candidates + lowest))


@torch.library.register_fake("remora::pk_select_fwd")
def _select_fake(sub_scores: Tensor, topk: int, candidates: int) -> tuple[Tensor, Tensor]:
    return _ranked(sub_scores, (*sub_scores.shape[:2], topk))


@torch.library.register_fake("remora::pk_select_bwd")
def _select_bwd_fake(slots: Tensor, d_scores: Tensor, num_keys: int) -> Tensor:
    return d_scores.new_empty((*slots.shape[:2], 2, num_keys))


@torch.library.register_fake("remora::tucker_select")
def _tucker_select_fake(
    query: Tensor, keys: Tensor, index: Tensor, core: Tensor, topk: int, positive: int
) -> tuple[Tensor, Tensor]:
    T, H, _, r, _ = query.shape
    return index.new_empty((T, H, 2, topk)), query.new_empty((T, H, 2, r, topk), dtype=_wide(query))


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sub_scores, _, _ = inputs
    ctx.num_keys, ctx.dtype = sub_scores.shape[3], sub_scores.dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _select_backward(ctx: Any, d_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (slots,) = ctx.saved_tensors
    d = torch.ops.remora.pk_select_bwd(slots, d_scores.contiguous(), ctx.num_keys)
    return d.to(ctx.dtype), None, None


torch.library.register_autograd("remora::pk_select_fwd", _select_backward, setup_context=_save_select)


@torch.library.register_fake("remora::sub_key_scores_fwd")
def _sub_key_scores_fake(query: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    return query.new_empty(index.shape, dtype=_wide(query))


@torch.library.register_fake("remora::sub_key_scores_bwd")
def _sub_key_scores_bwd_fake(
    query: Tensor, keys: Tensor, index: Tensor, d_scores: Tensor, score: int, tau: float, eps: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _save_sub_key_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sub_key_scores_backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
    query, keys, index = ctx.saved_tensors
    d_query, d_keys = torch.ops.remora.sub_key_scores_bwd(query, keys, index, d_scores.contiguous(), 0, 1.0, 0.0)
    return d_query, d_keys, None


torch.library.register_autograd(
    "remora::sub_key_scores_fwd", _sub_key_scores_backward, setup_context=_save_sub_key_scores
)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, _, *ctx.score = inputs
    ctx.save_for_backward(query, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx: Any, d_scores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, keys, slots = ctx.saved_tensors
    T, H, k = slots.shape
    n = keys.shape[2]
    # a row and a column for every slot; both axes get the gradient of the sum
    index = torch.stack((slots // n, slots % n), dim=2).view(T, 2 * H, k)
    d = d_scores.unsqueeze(2).expand(T, H, 2, k).reshape(T, 2 * H, k).contiguous()
    d_query, d_keys = torch.ops.remora.sub_key_scores_bwd(query.flatten(1, 2), keys.flatten(0, 1), index, d, *ctx.score)
    return d_query.view(query.shape), d_keys.view(keys.shape), None, None, None, None, None


torch.library.register_autograd("remora::pk_topk_fwd", _topk_backward, setup_context=_save_topk)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("product-key operators have no second derivative")


for _name in ("pk_select_bwd", "sub_key_scores_bwd"):
    torch.library.register_autograd(f"remora::{_name}", _no_second_derivative, setup_context=_save_nothing)
