"""Fake kernels and autograd formulas of `torch.ops.remora.simple_gla_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)
from remora.ops.recurrence.fakes import new_saved_states, new_state, state_dtype


@torch.library.register_fake("remora::simple_gla_fwd")
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    rows: Tensor | None, scale: float, output_final_state: bool, state_v_first: bool, save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    state = new_state(q, v, cu_seqlens, state_v_first, output_final_state)
    return q.new_empty(v.shape), state, new_saved_states(q, v, cu_seqlens, save_states)


@torch.library.register_fake("remora::simple_gla_bwd")
def _bwd_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    rows: Tensor | None, saved_states: Tensor, d_o: Tensor, d_final_state: Tensor | None, scale: float,
    state_v_first: bool, with_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(v.shape[:3] if with_dg else (0,), dtype=state_dtype(q))
    d_state = new_state(q, v, cu_seqlens, state_v_first, initial_state is not None)
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), dg, d_state


@torch.library.register_fake("remora::simple_gla_recurrent_fwd")
def _recurrent_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, state_v_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(v.shape), new_state(q, v, cu_seqlens, state_v_first, output_final_state)


@torch.library.register_fake("remora::simple_gla_step_")
def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, state_indices: Tensor | None,
    memories: Tensor | None, num_memories: int, scale: float, state_v_first: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, initial_state, cu_seqlens, rows, ctx.scale, _, ctx.state_v_first, saved = inputs
    if not saved:
        raise RuntimeError("simple_gla_fwd needs save_states=True for a gradient")
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, rows, output[2])
    ctx.set_materialize_grads(False)


def _save_recurrent(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, initial_state, cu_seqlens, ctx.scale, _, ctx.state_v_first = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, None)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, saved_states: Tensor, d_o: Tensor | None, d_final_state: Tensor | None) -> list[Tensor | None]:
    """Of q, k, v, g, initial_state."""
    q, k, v, g, initial_state, cu_seqlens, rows = ctx.saved_tensors[:7]
    d_o = q.new_zeros(v.shape) if d_o is None else d_o.contiguous()
    if d_final_state is not None:
        d_final_state = d_final_state.contiguous() if d_final_state.numel() else None
    with_dg = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_state = torch.ops.remora.simple_gla_bwd(
        q, k, v, g, initial_state, cu_seqlens, rows, saved_states, d_o, d_final_state, ctx.scale, ctx.state_v_first,
        with_dg,
    )  # fmt: skip
    return [dq, dk, dv, dg if with_dg else None, None if initial_state is None else d_state]


def _backward(
    ctx: Any, d_o: Tensor | None, d_final_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, ctx.saved_tensors[7], d_o, d_final_state), *[None] * 6)


def _recurrent_backward(ctx: Any, d_o: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same function in chunked form: its states are recomputed, so the forward pass keeps only its inputs."""
    saved_states = torch.ops.remora.simple_gla_fwd(*ctx.saved_tensors, ctx.scale, False, ctx.state_v_first, True)[2]
    return (*_gradients(ctx, saved_states, d_o, d_final_state), *[None] * 4)


torch.library.register_autograd("remora::simple_gla_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::simple_gla_recurrent_fwd", _recurrent_backward, setup_context=_save_recurrent)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("linear attention with scalar decay has no second derivative")


torch.library.register_autograd("remora::simple_gla_bwd", _no_second_derivative, setup_context=_save_nothing)
