"""Fake kernels and autograd formulas of `torch.ops.remora.causal_conv1d_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _new_state(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_seqs = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((num_seqs, weight.shape[1] - 1, x.shape[2]))


@torch.library.register_fake("remora::causal_conv1d_fwd")
def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    use_silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    state = _new_state(x, weight, cu_seqlens) if output_final_state else x.new_empty((0,))
    return x.new_empty(x.shape), state


@torch.library.register_fake("remora::causal_conv1d_bwd")
def _bwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    d_y: Tensor,
    d_final_state: Tensor | None,
    use_silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((0,)) if initial_state is None else _new_state(x, weight, cu_seqlens),
    )


@torch.library.register_fake("remora::causal_conv1d_step_")
def _step_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    memories: Tensor | None,
    num_memories: int,
    use_silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, initial_state, cu_seqlens, rows, ctx.use_silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens, rows)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, cu_seqlens, rows = ctx.saved_tensors
    d_y = x.new_zeros(x.shape) if d_y is None else d_y.contiguous()
    if d_final_state is not None:
        d_final_state = d_final_state.contiguous() if d_final_state.numel() else None
    dx, dweight, dbias, d_initial_state = torch.ops.remora.causal_conv1d_bwd(
        x, weight, bias, initial_state, cu_seqlens, rows, d_y, d_final_state, ctx.use_silu
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else d_initial_state,
        *[None] * 4,
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("the causal convolution has no second derivative")


torch.library.register_autograd("remora::causal_conv1d_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::causal_conv1d_bwd", _no_second_derivative, setup_context=_save_nothing)
