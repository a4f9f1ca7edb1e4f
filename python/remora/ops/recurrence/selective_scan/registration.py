"""Fake kernels and autograd formulas of `torch.ops.remora.selective_scan_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)

SAVE_INTERVAL = 64  # tokens between two saved states, kScanInterval


def _new_like_u(u: Tensor) -> Tensor:
    batch, channels, seqlen = u.shape
    if u.stride(1) == 1 and u.stride(2) != 1:
        return u.new_empty((batch, seqlen, channels)).transpose(1, 2)
    return u.new_empty(u.shape)


def _num_seqs(u: Tensor, cu_seqlens: Tensor | None) -> int:
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("remora::selective_scan_fwd")
def _fwd_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, delta_softplus: bool,
    reverse: bool, output_final_state: bool, save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_seqs = _num_seqs(u, cu_seqlens)
    slots = u.shape[0] * u.shape[2] // SAVE_INTERVAL + num_seqs
    return (
        _new_like_u(u),
        A.new_empty((num_seqs, *A.shape) if output_final_state else (0,)),
        A.new_empty((slots, *A.shape) if save_states else (0,)),
    )


@torch.library.register_fake("remora::selective_scan_bwd")
def _bwd_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, cu_seqlens: Tensor | None, saved_states: Tensor, d_out: Tensor,
    d_final_state: Tensor | None, has_initial_state: bool, delta_softplus: bool, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, groups, states, seqlen = B.shape
    return (
        _new_like_u(u),
        _new_like_u(u),
        A.new_empty(A.shape),
        u.new_empty((batch, seqlen, groups, states)).permute(0, 2, 3, 1),
        u.new_empty((batch, seqlen, groups, states)).permute(0, 2, 3, 1),
        A.new_empty((0,) if D is None else D.shape),
        u.new_empty((0,)) if z is None else _new_like_u(u),
        A.new_empty((0,) if delta_bias is None else delta_bias.shape),
        A.new_empty((_num_seqs(u, cu_seqlens), *A.shape) if has_initial_state else (0,)),
    )


@torch.library.register_fake("remora::selective_scan_step_")
def _step_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor, state_indices: Tensor | None, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    return u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, cu_seqlens, ctx.delta_softplus, ctx.reverse, _, save_states = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.has_initial_state, ctx.has_saved_states = initial_state is not None, save_states
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final_state: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, saved_states = ctx.saved_tensors
    if not ctx.has_saved_states:
        raise RuntimeError("selective_scan_fwd was called with save_states=False: it has no gradient")
    d_out = torch.zeros_like(tensors[0]) if d_out is None else d_out
    if d_final_state is not None:
        d_final_state = d_final_state.contiguous() if d_final_state.numel() else None
    grads = torch.ops.remora.selective_scan_bwd(
        *tensors, cu_seqlens, saved_states, d_out, d_final_state, ctx.has_initial_state, ctx.delta_softplus, ctx.reverse
    )
    given = [*(tensor is not None for tensor in tensors), ctx.has_initial_state]
    return (*(grad if is_given else None for grad, is_given in zip(grads, given, strict=True)), *[None] * 5)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("the selective scan has no second derivative")


torch.library.register_autograd("remora::selective_scan_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::selective_scan_bwd", _no_second_derivative, setup_context=_save_nothing)
