"""Fake kernels and autograd formulas of `torch.ops.remora.vq_assign` and `code_prefix_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::vq_assign")
def _assign_fake(x: Tensor, codebook: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:3], dtype=_wide(x)), x.new_empty(x.shape[:3], dtype=torch.int32)


@torch.library.register_fake("remora::code_prefix_fwd")
def _prefix_fwd_fake(
    idx: Tensor, v: Tensor, initial_count: Tensor | None, initial_mean: Tensor | None, n_code: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, T, D = v.shape
    N = (T + chunk - 1) // chunk
    return (
        v.new_empty((B, H, N, n_code), dtype=_wide(v)),
        v.new_empty((B, H, N, n_code, D)),
        v.new_empty((B, H, n_code), dtype=_wide(v)),
        v.new_empty((B, H, n_code, D), dtype=_wide(v)),
    )


@torch.library.register_fake("remora::code_prefix_bwd")
def _prefix_bwd_fake(
    idx: Tensor, initial_count: Tensor | None, final_count: Tensor, d_mean: Tensor, d_final_mean: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, _, S, D = d_mean.shape
    return (
        d_mean.new_empty((*idx.shape, D)),
        d_mean.new_empty((0,) if initial_count is None else (B, H, S, D), dtype=_wide(d_mean)),
    )


def _save_assign(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codebook, _ = inputs
    ctx.save_for_backward(x, codebook, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _assign_backward(ctx: Any, d_err2: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    """Of the distances by x; the codes are what moving averages make of them."""
    if d_err2 is None:
        return None, None, None
    x, codebook, idx = ctx.saved_tensors
    nearest = codebook[torch.arange(x.shape[1], device=x.device)[:, None], idx.clamp(min=0).long()]
    d_x = 2 * d_err2[..., None] * (x.to(d_err2.dtype) - nearest.to(d_err2.dtype))
    return torch.where((idx >= 0)[..., None], d_x, 0).to(x.dtype), None, None


def _save_prefix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    idx, v, initial_count, _, _, ctx.chunk = inputs
    log_count, mean, final_count, _ = output
    ctx.save_for_backward(idx, initial_count, final_count)
    ctx.mean_shape, ctx.dtype = mean.shape, v.dtype
    ctx.mark_non_differentiable(log_count, final_count)
    ctx.set_materialize_grads(False)


def _prefix_backward(
    ctx: Any, _: Any, d_mean: Tensor | None, __: Any, d_final_mean: Tensor | None
) -> tuple[Tensor | None, ...]:
    idx, initial_count, final_count = ctx.saved_tensors
    if d_mean is None:
        d_mean = final_count.new_zeros(ctx.mean_shape, dtype=ctx.dtype)
    dv, d_initial_mean = torch.ops.remora.code_prefix_bwd(
        idx, initial_count, final_count, d_mean.contiguous(),
        None if d_final_mean is None else d_final_mean.contiguous(), ctx.chunk,
    )  # fmt: skip
    return None, dv, None, None if initial_count is None else d_initial_mean, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("code_prefix_state has no second derivative")


torch.library.register_autograd("remora::vq_assign", _assign_backward, setup_context=_save_assign)
torch.library.register_autograd("remora::code_prefix_fwd", _prefix_backward, setup_context=_save_prefix)
torch.library.register_autograd("remora::code_prefix_bwd", _no_second_derivative, setup_context=_save_nothing)
