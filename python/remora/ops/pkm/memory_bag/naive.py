"""Weighted bags in plain PyTorch, every row materialised. The oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_slots(
    indices: Tensor, num_rows: int, groups: int = 1, layer_rows: int | None = None, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and group of every lookup, and whether it is one."""
    layer_rows = num_rows if layer_rows is None else layer_rows
    found = (indices >= 0) & (indices < groups * layer_rows)
    index = torch.where(found, indices, 0).long()
    return (index % max(layer_rows, 1) + offset) % max(num_rows, 1), index // max(layer_rows, 1), found


def naive_memory_bag(
    indices: Tensor, table: Tensor, weights: Tensor | None = None, *, groups: int = 1, layer_rows: int | None = None,
    offset: int = 0,
) -> Tensor:  # fmt: skip
    """As `remora.ops.memory_bag`; differentiable, in the dtype of the table."""
    (T, P), (N, d) = indices.shape, table.shape
    if N == 0:
        return table.new_zeros((T, d) if groups == 1 else (T, groups, d))
    row, group, found = naive_slots(indices, N, groups, layer_rows, offset)
    if weights is None:
        weights = table.new_ones(T, P)
    weights = weights.reshape(T, P, -1).to(table.dtype)
    weights = torch.where(found[..., None], weights, 0)
    heads = weights.shape[2]
    values = torch.where(found[..., None], table[row], 0).view(T, P, heads, d // heads)
    products = (weights[..., None] * values).view(T, P, d)
    out = torch.stack([torch.where((group == e)[..., None], products, 0).sum(1) for e in range(groups)], dim=1)
    return out[:, 0] if groups == 1 else out


def naive_peer_bag(
    indices: Tensor, table: Tensor, x: Tensor, weights: Tensor | None = None, *, act: str = "gelu", groups: int = 1,
    layer_rows: int | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """As `remora.ops.peer_bag`; differentiable, in the dtype of the table."""
    (T, P), (T, dp) = indices.shape, x.shape
    if table.shape[0] == 0:
        return table.new_zeros(T, table.shape[1] - dp)
    row, _, found = naive_slots(indices, table.shape[0], groups, layer_rows, offset)
    experts = torch.where(found[..., None], table[row], 0)
    scores = (experts[..., :dp] * x[:, None]).sum(-1)
    activate = {"identity": lambda s: s, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[act]
    if weights is None:
        weights = table.new_ones(T, P)
    weights = weights.reshape(T, P, -1).to(table.dtype)
    factors = torch.where(found[..., None], weights * activate(scores)[..., None], 0)
    heads, dv = weights.shape[2], table.shape[1] - dp
    values = experts[..., dp:].reshape(T, P, heads, dv // heads)
    return (factors[..., None] * values).sum(1).reshape(T, dv)
