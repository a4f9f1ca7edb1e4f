"""Fake kernels and autograd formulas of weighted bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("remora::slot_plan")
def _plan_fake(
    indices: Tensor, num_rows: int, groups: int, layer_rows: int, offset: int, row_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M = indices.numel()
    R = min(M, num_rows)
    order, rows, starts, counts = (indices.new_empty((size,), dtype=torch.int32) for size in (M, R, R + 1, 2))
    return order, rows, starts, counts


@torch.library.register_fake("remora::memory_bag_fwd")
def _fwd_fake(
    indices: Tensor, table: Tensor, weights: Tensor | None, order: Tensor | None, rows: Tensor | None,
    starts: Tensor | None, num_rows: Tensor | None, row_mask: Tensor | None, row_grad: Tensor | None,
    buffer: Tensor | None, groups: int, layer_rows: int, offset: int,
) -> Tensor:  # fmt: skip
    return table.new_empty((indices.shape[0], groups, table.shape[1]))


@torch.library.register_fake("remora::memory_bag_bwd_weights")
def _bwd_weights_fake(
    indices: Tensor, table: Tensor, d_out: Tensor, heads: int, groups: int, layer_rows: int, offset: int
) -> Tensor:
    return table.new_empty((*indices.shape, heads), dtype=_wide(table))


@torch.library.register_fake("remora::memory_bag_bwd")
def _bwd_fake(
    indices: Tensor, table: Tensor | None, weights: Tensor | None, d_out: Tensor, order: Tensor, rows: Tensor,
    starts: Tensor, num_rows: Tensor, heads: int, table_rows: int, groups: int, layer_rows: int, offset: int,
    dense: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d, wide = d_out.shape[2], _wide(d_out)
    d_table = d_out.new_empty((table_rows, d)) if dense else d_out.new_empty((rows.shape[0], d), dtype=wide)
    return d_table, d_out.new_empty((0,) if table is None else (*indices.shape, heads), dtype=wide)


@torch.library.register_fake("remora::memory_bag_bwd_")
def _bwd_accumulate_fake(
    indices: Tensor, table: Tensor | None, weights: Tensor | None, d_out: Tensor, order: Tensor, rows: Tensor,
    starts: Tensor, num_rows: Tensor, buffer: Tensor, heads: int, groups: int, layer_rows: int, offset: int,
) -> Tensor:  # fmt: skip
    return d_out.new_empty((0,) if table is None else (*indices.shape, heads), dtype=_wide(d_out))


def _bag(indices: Tensor, table: Tensor, weights: Tensor | None, groups: int, layer_rows: int, offset: int) -> Tensor:
    """The forward operator without a plan."""
    out: Tensor = torch.ops.remora.memory_bag_fwd(
        indices, table, weights, None, None, None, None, None, None, None, groups, layer_rows, offset
    )
    return out


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.map = inputs[10:]


def _fwd_backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    indices, table, weights, order, rows, starts, num_rows, row_mask, row_grad, buffer = ctx.saved_tensors
    wants_table, wants_weights = ctx.needs_input_grad[1] and row_grad is None, ctx.needs_input_grad[2]
    wants_rows = ctx.needs_input_grad[8]
    heads = 1 if weights is None else weights.shape[2]
    d_out = d_out.contiguous()
    d_table = d_weights = d_rows = None
    if not wants_table and not wants_rows:
        if wants_weights:
            d_weights = torch.ops.remora.memory_bag_bwd_weights(indices, table, d_out, heads, *ctx.map)
        return None, None, d_weights, *[None] * 10
    if order is None:
        order, rows, starts, num_rows = torch.ops.remora.slot_plan(indices, table.shape[0], *ctx.map, row_mask)
    inputs = (indices, table if wants_weights else None, weights, d_out, order, rows, starts, num_rows)
    if buffer is not None:
        if torch.is_grad_enabled():
            raise RuntimeError("memory_bag with accumulate has no second derivative")
        d_weights = torch.ops.remora.memory_bag_bwd_(*inputs, buffer, heads, *ctx.map)
    else:
        d_table, d_weights = torch.ops.remora.memory_bag_bwd(*inputs, heads, table.shape[0], *ctx.map, wants_table)
        if wants_rows:
            d_table, d_rows = None, d_table
    return None, d_table, d_weights if wants_weights else None, *[None] * 5, d_rows, *[None] * 4


def _save_bwd_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, table, d_out, _, *ctx.map = inputs
    ctx.save_for_backward(indices, table, d_out)


def _bwd_weights_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    indices, table, d_out = ctx.saved_tensors
    grad = grad.contiguous()
    d_table = d_d_out = None
    if ctx.needs_input_grad[1]:
        plan = torch.ops.remora.slot_plan(indices, table.shape[0], *ctx.map, None)
        d_table, _ = torch.ops.remora.memory_bag_bwd(
            indices, None, grad, d_out, *plan, grad.shape[2], table.shape[0], *ctx.map, True
        )
    if ctx.needs_input_grad[2]:
        d_d_out = _bag(indices, table, grad, *ctx.map)
    return None, d_table, d_d_out, *[None] * 4


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.heads, ctx.table_rows, *ctx.map, ctx.dense = inputs[8:]
    ctx.set_materialize_grads(False)


def _segment_of_lookups(indices: Tensor, order: Tensor, starts: Tensor, num_rows: Tensor) -> Tensor:
    """Number in plan.rows of the row of every lookup, -1 for those that give no row a gradient."""
    at = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    segment = torch.searchsorted(starts, at, right=True) - 1
    segment = torch.where(segment < num_rows[0], segment, -1)
    return torch.empty_like(segment).scatter_(0, order.long(), segment).view(indices.shape)


def _bwd_backward(ctx: Any, d_d_table: Tensor | None, d_d_weights: Tensor | None) -> tuple[Any, ...]:
    """The gradients are bags and segment sums again: d_table is linear in weights and d_out, d_weights in table and
    d_out.
    """
    indices, table, weights, d_out, order, rows, starts, num_rows = ctx.saved_tensors
    groups, layer_rows, _ = ctx.map
    grads: dict[str, Tensor | None] = {"table": None, "weights": None, "d_out": None}
    if d_d_table is not None:
        # Read the rows by their numbers in the plan: compact, and without those whose gradient went nowhere.
        segment = _segment_of_lookups(indices, order, starts, num_rows)
        R = rows.shape[0]
        if groups > 1:
            segment = torch.where(segment >= 0, indices.long() // max(layer_rows, 1) * R + segment, -1)
        by_segment = (
            d_d_table.index_select(0, rows.long().clamp(max=max(ctx.table_rows - 1, 0))) if ctx.dense else d_d_table
        )
        by_segment = by_segment.to(d_out.dtype).contiguous()
        if ctx.needs_input_grad[2]:
            grads["weights"] = torch.ops.remora.memory_bag_bwd_weights(
                segment, by_segment, d_out, ctx.heads, groups, R, 0
            )
        if ctx.needs_input_grad[3]:
            grads["d_out"] = _bag(segment, by_segment, weights, groups, R, 0)
    if d_d_weights is not None and table is not None:
        d_d_weights = d_d_weights.contiguous()
        if ctx.needs_input_grad[1]:
            grads["table"], _ = torch.ops.remora.memory_bag_bwd(
                indices, None, d_d_weights, d_out, order, rows, starts, num_rows, ctx.heads, ctx.table_rows, *ctx.map,
                True,
            )  # fmt: skip
        if ctx.needs_input_grad[3]:
            through = _bag(indices, table, d_d_weights, *ctx.map)
            grads["d_out"] = through if grads["d_out"] is None else grads["d_out"] + through
    return None, grads["table"], grads["weights"], grads["d_out"], *[None] * 10


torch.library.register_autograd("remora::memory_bag_fwd", _fwd_backward, setup_context=_save_fwd)
torch.library.register_autograd(
    "remora::memory_bag_bwd_weights", _bwd_weights_backward, setup_context=_save_bwd_weights
)
torch.library.register_autograd("remora::memory_bag_bwd", _bwd_backward, setup_context=_save_bwd)


@torch.library.register_fake("remora::peer_bag_fwd")
def _peer_fwd_fake(
    indices: Tensor, table: Tensor, x: Tensor, weights: Tensor | None, order: Tensor | None, rows: Tensor | None,
    starts: Tensor | None, num_rows: Tensor | None, row_mask: Tensor | None, row_grad: Tensor | None,
    buffer: Tensor | None, groups: int, layer_rows: int, offset: int, act: int,
) -> Tensor:  # fmt: skip
    return table.new_empty((indices.shape[0], table.shape[1] - x.shape[1]))


@torch.library.register_fake("remora::peer_bag_bwd")
def _peer_bwd_fake(
    indices: Tensor, table: Tensor, x: Tensor, weights: Tensor | None, d_out: Tensor, order: Tensor | None,
    rows: Tensor | None, starts: Tensor | None, num_rows: Tensor | None, groups: int, layer_rows: int, offset: int,
    act: int, dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if rows is None:
        d_table = table.new_empty((0,))
    elif dense:
        d_table = table.new_empty(table.shape)
    else:
        d_table = table.new_empty((rows.shape[0], table.shape[1]), dtype=_wide(table))
    d_weights = table.new_empty((0,) if weights is None else weights.shape, dtype=_wide(table))
    return d_table, x.new_empty(x.shape), d_weights


@torch.library.register_fake("remora::peer_bag_bwd_")
def _peer_bwd_accumulate_fake(
    indices: Tensor, table: Tensor, x: Tensor, weights: Tensor | None, d_out: Tensor, order: Tensor, rows: Tensor,
    starts: Tensor, num_rows: Tensor, buffer: Tensor, groups: int, layer_rows: int, offset: int, act: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), table.new_empty((0,) if weights is None else weights.shape, dtype=_wide(table))


def _save_peer_fwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:11])
    *ctx.map, ctx.act = inputs[11:]


def _peer_fwd_backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    indices, table, x, weights, order, rows, starts, num_rows, row_mask, row_grad, buffer = ctx.saved_tensors
    wants_table, wants_rows = ctx.needs_input_grad[1] and row_grad is None, ctx.needs_input_grad[9]
    inputs = (indices, table, x, weights, d_out.contiguous())
    plan: tuple[Tensor | None, ...] = (None, None, None, None)
    if wants_table or wants_rows:
        plan = (order, rows, starts, num_rows)
        if order is None:
            plan = torch.ops.remora.slot_plan(indices, table.shape[0], *ctx.map, row_mask)
    d_table = d_rows = None
    if wants_table and buffer is not None:
        d_x, d_weights = torch.ops.remora.peer_bag_bwd_(*inputs, *plan, buffer, *ctx.map, ctx.act)
    else:
        d_table, d_x, d_weights = torch.ops.remora.peer_bag_bwd(*inputs, *plan, *ctx.map, ctx.act, wants_table)
        d_table, d_rows = d_table if wants_table else None, d_table if wants_rows else None
    return None, d_table, d_x, None if weights is None else d_weights, *[None] * 5, d_rows, *[None] * 5


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("peer_bag has no second derivative")


torch.library.register_autograd("remora::peer_bag_fwd", _peer_fwd_backward, setup_context=_save_peer_fwd)
torch.library.register_autograd("remora::peer_bag_bwd", _no_second_derivative, setup_context=_save_nothing)
