"""Tables split by columns over the ranks of a group: every rank holds all rows, and of each a part.

Which rows a token reads does not matter for the balance of the work, whatever the skew. Per call, a rank receives the
indices and weights of all tokens of the group, sums its columns, and sends every rank its tokens' sums.

Source: Berges et al., "Memory Layers at Scale" (2024), which shards its values this way.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from remora.modules import MemoryTable


def shard_columns(dim: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and end column of a rank's part of `dim` columns: parts of equal size, a multiple of 4.

    Raises:
        ValueError: `dim` is not a multiple of `4 * world_size`.
    """
    if dim % (4 * world_size):
        raise ValueError(f"the table's width must be a multiple of 4 * {world_size} ranks, got {dim}")
    width = dim // world_size
    return rank * width, (rank + 1) * width


def _or_all(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)


class _GatherTokens(torch.autograd.Function):
    """`[T, ...]` of every rank as `[R * T, ...]`, in the order of the ranks; the gradient is summed over the ranks in
    this order, so that it is the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        parts = _all_to_all(d_out.contiguous(), ctx.group).unflatten(0, (dist.get_world_size(ctx.group), -1))
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total, None


class _ColumnsToTokens(torch.autograd.Function):
    """`[R * T, d / R]`, all tokens and a part of the columns, as `[T, d]`, the rank's tokens and all columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = _all_to_all(x.contiguous(), group).unflatten(0, (dist.get_world_size(group), -1))
        return cast(Tensor, parts.movedim(0, 1).flatten(1).contiguous())

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        parts = d_out.unflatten(1, (dist.get_world_size(ctx.group), -1)).movedim(1, 0)
        return _all_to_all(parts.flatten(0, 1).contiguous(), ctx.group), None


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Chunk r of the rows goes to rank r."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class ShardedMemoryTable(MemoryTable):
    """A `MemoryTable` of `d` columns of which this rank holds `d / R`; it takes the table's place in every layer.

    The ranks of the group call it together, with equally many tokens; the rows of the result are the rank's own tokens.
    Gradients of the columns are those of the tokens of all ranks, in the order of the ranks: the bits of one process
    with all tokens. Gradients of the weights are sums over the ranks.

    Args:
        num_rows, dim: `N` and the whole width `d`, a multiple of `4 R`.
        sparse_grad: as in `MemoryTable`.
        group: default the group of all ranks.

    Raises:
        ValueError: a size is not positive or not a multiple of `4 R`.
    """

    def __init__(
        self, num_rows: int, dim: int, *, sparse_grad: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        self.group = _or_all(group)
        begin, end = shard_columns(dim, dist.get_rank(self.group), dist.get_world_size(self.group))
        super().__init__(num_rows, end - begin, sparse_grad=sparse_grad)
        self.dim = dim
        # Random bits of the optimizers' rounding follow the column of the whole table.
        self.weight.column_offset = begin  # type: ignore[attr-defined]

    def bag(
        self, indices: Tensor, weights: Tensor, *, groups: int = 1, layer_rows: int | None = None, offset: int = 0
    ) -> Tensor:
        """As `MemoryTable.bag`, for the tokens of this rank. Weights `[T, P]`."""
        if weights.dim() != 2:
            raise ValueError(f"weights must be [T, P], got {list(weights.shape)}: blocks of columns cross the shards")
        all_indices = _all_gather(indices, self.group)
        all_weights: Tensor = _GatherTokens.apply(weights, self.group)
        out = super().bag(all_indices, all_weights, groups=groups, layer_rows=layer_rows, offset=offset)
        if groups == 1:
            return _ColumnsToTokens.apply(out, self.group)  # type: ignore[no-any-return]
        return torch.stack([_ColumnsToTokens.apply(part, self.group) for part in out.unbind(1)], dim=1)

    @torch.no_grad()
    def load_table(self, table: Tensor) -> None:
        """Take this rank's columns of a whole table `[N, d]`."""
        self.weight.copy_(shard_table(table, self.group))

    def whole_table(self) -> Tensor:
        """The whole table `[N, d]`, on every rank."""
        return gather_table(self.weight.detach(), self.group)


def shard_table(table: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Columns of this rank of a table or of an optimizer state `[N, d]`; vectors `[N]` belong to all ranks."""
    group = _or_all(group)
    if table.dim() < 2:
        return table.clone()
    begin, end = shard_columns(table.shape[1], dist.get_rank(group), dist.get_world_size(group))
    return table[:, begin:end].clone()


def gather_table(shard: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The inverse of `shard_table`: the whole `[N, d]` on every rank, from which any number of ranks can load."""
    group = _or_all(group)
    if shard.dim() < 2:
        return shard.clone()
    parts = _all_gather(shard.contiguous(), group).unflatten(0, (dist.get_world_size(group), -1))
    return cast(Tensor, parts.movedim(0, 1).flatten(1).contiguous())
