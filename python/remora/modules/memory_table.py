"""Tables of values that memory layers read: one layer's own, or a pool that several layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from remora.ops import memory_bag, peer_bag, slot_plan
from remora.optim import record_rows


class MemoryTable(nn.Module):
    """A table `[N, d]` of values, and the gradient that its readers leave in it.

    With `sparse_grad` the gradient is that of the rows that were read (`remora.optim.row_gradient`), which the
    optimizers of `remora.optim` take; the table's `.grad` stays None and nothing of the table's size is written.
    Without it the gradient is dense, for any optimizer.

    Args:
        num_rows: `N`.
        dim: `d`.
        sparse_grad: whether gradients are rows.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, num_rows: int, dim: int, *, sparse_grad: bool = False) -> None:
        super().__init__()
        if num_rows < 1 or dim < 1:
            raise ValueError(f"num_rows and dim must be positive, got {num_rows} and {dim}")
        self.num_rows, self.dim, self.sparse_grad = num_rows, dim, sparse_grad
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw values from a normal distribution, of variance `1 / d` unless `std` is given."""
        nn.init.normal_(self.weight, std=self.dim**-0.5 if std is None else std)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.dim}, sparse_grad={self.sparse_grad}"

    @property
    def records_rows(self) -> bool:
        return self.sparse_grad and torch.is_grad_enabled() and self.weight.requires_grad

    def bag(
        self, indices: Tensor, weights: Tensor, *, groups: int = 1, layer_rows: int | None = None, offset: int = 0
    ) -> Tensor:
        """Weighted sums of rows, `[T, d]` or with groups `[T, G, d]`; arguments as in `remora.ops.memory_bag`."""
        address: dict[str, Any] = {"groups": groups, "layer_rows": layer_rows, "offset": offset}
        if not self.records_rows:
            return memory_bag(indices, self.weight, weights, **address)
        plan = slot_plan(indices, self.num_rows, **address)
        return memory_bag(indices, self.weight, weights, plan=plan, row_grad=record_rows(self.weight, plan), **address)

    def experts(
        self,
        indices: Tensor,
        x: Tensor,
        weights: Tensor,
        *,
        act: str = "identity",
        layer_rows: int | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Weighted sums of experts `[u | v]`, one a row, of the inputs `x` `[T, dp]`: `[T, d - dp]`; arguments as in
        `remora.ops.peer_bag`.
        """
        address: dict[str, Any] = {"act": act, "layer_rows": layer_rows, "offset": offset}
        x = x.to(self.weight.dtype)
        if not self.records_rows:
            return peer_bag(indices, self.weight, x, weights, **address)
        plan = slot_plan(indices, self.num_rows, layer_rows=layer_rows, offset=offset)
        row_grad = record_rows(self.weight, plan)
        return peer_bag(indices, self.weight, x, weights, plan=plan, row_grad=row_grad, **address)


def memory_parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, table_lr: float | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: the tables of memory layers, and everything else.

    Tables get the learning rate `table_lr` (default `lr`; published models take one to ten times that of the rest) and
    no weight decay. Every group names itself in "name", for schedules of its own.

    Args:
        model: any module.
        lr, weight_decay: of everything else.
        table_lr: of the tables.
    """
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, MemoryTable)}
    others = [p for p in model.parameters() if id(p) not in tables]
    return [
        {"name": "model", "params": others, "lr": lr, "weight_decay": weight_decay},
        {"name": "tables", "params": list(tables.values()), "lr": lr if table_lr is None else table_lr,
         "weight_decay": 0.0},
    ]  # fmt: skip
