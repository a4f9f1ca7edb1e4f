"""Fake kernels and autograd formulas of `torch.ops.remora.segment_pool_*`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)

MODES = ("sum", "mean", "last", "max", "softmax", "weighted")  # PoolMode
LINEAR = tuple(MODES.index(mode) for mode in ("sum", "mean", "last"))  # their gradient needs nothing but dy
MAX, SOFTMAX = MODES.index("max"), MODES.index("softmax")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::segment_pool_fwd")
def _fwd_fake(
    x: Tensor, gate: Tensor | None, slot_bias: Tensor | None, segment_ids: Tensor | None,
    segment_starts: Tensor | None, seq_offsets: Tensor | None, window_offsets: Tensor | None, size: int, stride: int,
    num_windows: int, mode: int, dual: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, heads, channels = x.shape
    shape = (batch, num_windows, heads, channels // 2 if dual else channels)
    return (
        x.new_empty(shape),
        x.new_empty(shape if save and mode == MAX else (0,), dtype=torch.int32),
        x.new_empty(shape if save and mode == SOFTMAX else (0,), dtype=_wide(x)),
    )


@torch.library.register_fake("remora::segment_pool_bwd")
def _bwd_fake(
    dy: Tensor, x: Tensor | None, gate: Tensor | None, slot_bias: Tensor | None, segment_ids: Tensor | None,
    segment_starts: Tensor | None, seq_offsets: Tensor | None, window_offsets: Tensor | None, y: Tensor | None,
    arg: Tensor | None, lse: Tensor | None, seqlen: int, size: int, stride: int, mode: int, dual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, heads, channels = dy.shape
    channels *= 2 if dual else 1
    return (
        dy.new_empty((batch, seqlen, heads, channels)),
        dy.new_empty((0,) if gate is None else (batch, seqlen, heads, channels)),
        dy.new_empty((0,) if slot_bias is None else (size, heads, channels), dtype=_wide(dy)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, slot_bias, *layout, ctx.size, ctx.stride, _, ctx.mode, ctx.dual, save = inputs
    y, arg, lse = output
    ctx.seqlen, ctx.can_differentiate = x.shape[1], save or ctx.mode not in (MAX, SOFTMAX)
    reads = {
        MAX: (None, None, None, None, arg, None),
        SOFTMAX: (x, gate, slot_bias, y, None, lse),
        MODES.index("weighted"): (x, gate, slot_bias, None, None, None),
    }
    ctx.save_for_backward(*reads.get(ctx.mode, (None,) * 6), *layout)
    ctx.mark_non_differentiable(arg, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    if not ctx.can_differentiate:
        raise RuntimeError("segment_pool_fwd was called with save=False: it has no gradient")
    x, gate, slot_bias, y, arg, lse, *layout = ctx.saved_tensors
    dx, dgate, dslot_bias = torch.ops.remora.segment_pool_bwd(
        dy.contiguous(), x, gate, slot_bias, *layout, y, arg, lse, ctx.seqlen, ctx.size, ctx.stride, ctx.mode, ctx.dual
    )
    return (dx, None if gate is None else dgate, None if slot_bias is None else dslot_bias, *[None] * 10)


def _save_transposed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, _, _, _, *layout, _, _, _, _, ctx.size, ctx.stride, ctx.mode, ctx.dual = inputs
    ctx.num_windows = dy.shape[1]
    ctx.save_for_backward(*layout)


def _backward_transposed(ctx: Any, d_dx: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradient of a linear pooling is linear too: its own is the pooling."""
    if ctx.mode not in LINEAR:
        raise RuntimeError(f"segment_pool of mode {MODES[ctx.mode]!r} has no second derivative")
    options = (*ctx.saved_tensors, ctx.size, ctx.stride, ctx.num_windows, ctx.mode, ctx.dual, False)
    return (torch.ops.remora.segment_pool_fwd(d_dx.contiguous(), None, None, *options)[0], *[None] * 15)


torch.library.register_autograd("remora::segment_pool_fwd", _backward, setup_context=_save)
torch.library.register_autograd("remora::segment_pool_bwd", _backward_transposed, setup_context=_save_transposed)
