"""Row gradients between the backward pass that makes them and the optimizer that uses them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from remora.ops import SlotPlan, row_norm, slot_plan

_ATTRIBUTE = "_remora_row_gradients"


class RowGradient(NamedTuple):
    """The gradient of a table [N, d], its rows without a gradient left out.

    Attributes:
        rows: [C] int32, distinct and rising; the first `num_rows` count.
        values: [C, d] float32 (float64 for a float64 table).
        num_rows: [1] int32.
        scale: float32 scalar that multiplies the values, or None.
    """

    rows: Tensor
    values: Tensor
    num_rows: Tensor
    scale: Tensor | None = None


@dataclass
class _Recorded:
    """What the forward passes since the last `zero_grad` read of a table, and the factor of clipping."""

    parts: list[tuple[SlotPlan, Tensor]] = field(default_factory=list)
    scale: Tensor | None = None


def record_rows(table: Tensor, plan: SlotPlan) -> Tensor:
    """Return the leaf that collects the gradient of the rows of `plan`, and have `row_gradient(table)` find it.

    Give it to `memory_bag` or `peer_bag` as `row_grad`. A table may be read several times between two steps, by several
    layers or micro-batches; `row_gradient` adds up what they leave.
    """
    leaf = plan.row_grad(table)
    recorded = table.__dict__.setdefault(_ATTRIBUTE, _Recorded())
    recorded.parts.append((plan, leaf))
    return leaf


def forget_rows(table: Tensor) -> None:
    """Drop what `record_rows` recorded."""
    table.__dict__.pop(_ATTRIBUTE, None)


@torch.no_grad()
def row_gradient(table: Tensor) -> RowGradient | None:
    """The row gradient of a table since the last `zero_grad`, or None if no backward pass left one.

    Several parts are merged on the device, the host waiting for nothing; a row's parts are added in the order of the
    forward passes.
    """
    recorded = table.__dict__.get(_ATTRIBUTE)
    if recorded is None:
        return None
    parts = [(plan, leaf.grad) for plan, leaf in recorded.parts if leaf.grad is not None]
    if not parts:
        return None
    if len(parts) > 1:
        parts = [_merge(parts, table.shape[0])]
        recorded.parts = [(parts[0][0], _filled(table, *parts[0]))]
    plan, values = parts[0]
    return RowGradient(plan.rows, values, plan.num_rows[:1], recorded.scale)


def _filled(table: Tensor, plan: SlotPlan, values: Tensor) -> Tensor:
    leaf = plan.row_grad(table)
    leaf.grad = values
    return leaf


def _merge(parts: list[tuple[SlotPlan, Tensor]], num_rows: int) -> tuple[SlotPlan, Tensor]:
    """Union of the rows: the rows of all parts are lookups of one bag each, whose table gradient is their sum."""
    rows = []
    for plan, _ in parts:
        counts = torch.arange(plan.rows.shape[0], device=plan.rows.device) < plan.num_rows[0]
        rows.append(torch.where(counts, plan.rows, -1))
    indices = torch.cat(rows)[:, None]
    plan = slot_plan(indices, num_rows)
    d_out = torch.cat([values for _, values in parts])[:, None]
    values, _ = torch.ops.remora.memory_bag_bwd(indices, None, None, d_out, *plan, 1, num_rows, 1, num_rows, 0, False)
    return plan, values


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients, dense ones and row gradients, by min(1, max_norm / norm); return their joint norm.

    Nothing waits for the device. Dense gradients are scaled in place as by `torch.nn.utils.clip_grad_norm_`; the factor
    of row gradients is left for the optimizer, which multiplies while it reads them.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    parameters = [p for p in parameters if p.requires_grad]
    dense = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in dense]
    tables = []
    for p in parameters:
        gradient = row_gradient(p)
        if gradient is not None:
            norms.append(row_norm(gradient.values, gradient.num_rows).float())
            tables.append(p)
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in dense:
        grad.mul_(scale.to(grad.device, grad.dtype))
    for table in tables:
        table.__dict__[_ATTRIBUTE].scale = scale.to(table.device)
    return total
