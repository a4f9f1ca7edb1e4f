"""One linear map per group of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.ops import memory_bag

# torch's grouped matrix product wants rows of a multiple of 16 bytes: 8 elements of the narrowest dtype.
ROW_MULTIPLE = 8


class GroupedLinear(nn.Module):
    """`y[j, r] = weight[group(j, r)] x[r]`: every row takes several linear maps, which it chooses.

    On CUDA the sizes of the groups stay on the device, and all maps are one grouped matrix product. On the CPU it is a
    product for each group, and a group of all rows is neither gathered nor scattered. The sums over the choices of a
    row run in order of the groups. A group may be empty; its weight then gets a zero gradient.

    Args:
        num_groups: `G`, the number of linear maps.
        in_features: size of an input row.
        out_features: size of an output row.

    Parameter `weight` is `[G, out_features, in_features]`; each map starts as `nn.Linear` does.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.in_features}, {self.out_features}"

    def forward(self, x: Tensor, order: Tensor, positions: Tensor, ends: Tensor, sizes: list[int]) -> list[Tensor]:
        """Apply the maps.

        Args:
            x: `[R, in_features]`.
            order: `[J * R]` int32, the choices `j * R + r` sorted by group, those of no group last. The rows of a group
                are distinct.
            positions: `[J * R]` int32, the inverse of `order`.
            ends: `[G]` int32, nondecreasing: group `g` is `order` from `ends[g - 1]` (0 for the first) to `ends[g]`.
            sizes: how many of the `out_features` stand in each output.

        Returns:
            For each size a tensor `[J * R, size]` in the dtype of `x`. A choice of no group gives finite numbers, whose
            gradient must be zero.
        """
        y: list[Tensor] = _grouped_linear(x, self.weight.to(x.dtype), order, positions, ends, sizes)
        return y


def _takes_grouped_product(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.shape[0] > 0


def _groups(order: Tensor, ends: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor | slice, Tensor | slice]]:
    """The groups, their choices and their rows: slices for choice j of every row."""
    begin = 0
    for group, end in enumerate(ends.tolist()):
        choices = order[begin:end]
        if end - begin == num_rows > 0 and bool((choices.diff() == 1).all()) and int(choices[0]) % num_rows == 0:
            yield group, slice(int(choices[0]), int(choices[0]) + num_rows), slice(None)
        else:
            yield group, choices, choices % num_rows
        begin = end


def _padded(x: Tensor) -> Tensor:
    """With rows that torch's grouped product takes."""
    padding = -x.shape[-1] % ROW_MULTIPLE
    return F.pad(x, (0, padding)) if padding else x


def _all_ends(order: Tensor, ends: Tensor) -> Tensor:
    """The last map takes the choices of no group, too; nothing reads what it makes of them."""
    is_last = torch.arange(ends.shape[0], device=ends.device) == ends.shape[0] - 1
    return torch.where(is_last, order.shape[0], ends).int()


# Operators of their own because their sizes depend on data, on the CPU, and because torch's fake kernel of the grouped
# product refuses float32, which its real ones take.
@torch.library.custom_op("remora_modules::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor, weight: Tensor, order: Tensor, positions: Tensor, ends: Tensor, sizes: list[int]
) -> list[Tensor]:
    num_rows = x.shape[0]
    if _takes_grouped_product(x):
        maps = _padded(F.pad(weight, (0, 0, 0, -weight.shape[1] % ROW_MULTIPLE)))
        products = F.grouped_mm(_padded(x[order % num_rows]), maps.mT, offs=_all_ends(order, ends))
        by_choice = positions.long()  # once, where torch would for every part
        return [part[by_choice] for part in products[:, : weight.shape[1]].split(sizes, dim=1)]
    outputs = [x.new_empty(order.shape[0], size) for size in sizes]
    for group, choices, rows in _groups(order, ends, num_rows):
        products = x[rows] @ weight[group].mT
        for y, part in zip(outputs, products.split(sizes, dim=1), strict=True):
            y[choices] = part
    for y in outputs:
        y[order[int(ends[-1]) :]] = 0
    return outputs


@torch.library.custom_op("remora_modules::grouped_linear_bwd", mutates_args=())
def _grouped_linear_bwd(
    x: Tensor, weight: Tensor, order: Tensor, positions: Tensor, ends: Tensor, d_outputs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[0]
    if _takes_grouped_product(x):
        maps = _padded(F.pad(weight, (0, 0, 0, -weight.shape[1] % ROW_MULTIPLE)))
        offs = _all_ends(order, ends)
        by_group = order.long()
        d_products = _padded(torch.cat([d_y[by_group] for d_y in d_outputs], dim=1))
        d_x = F.grouped_mm(d_products, maps, offs=offs)[:, : x.shape[1]]
        d_maps = F.grouped_mm(d_products.mT, _padded(x[by_group % num_rows]), offs=offs)
        d_x = memory_bag(positions.view(-1, num_rows).T, d_x.contiguous())
        return d_x, d_maps[:, : weight.shape[1], : weight.shape[2]].contiguous()
    d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    d_weight = torch.empty_like(weight)
    for group, choices, rows in _groups(order, ends, num_rows):
        d_products = torch.cat([d_y[choices] for d_y in d_outputs], dim=1)
        torch.mm(d_products.mT, x[rows], out=d_weight[group])
        d_x[rows] += d_products @ weight[group]
    return d_x.to(x.dtype), d_weight


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, order: Tensor, positions: Tensor, ends: Tensor, sizes: list[int]) -> list[Tensor]:
    return [x.new_empty(order.shape[0], size) for size in sizes]


@_grouped_linear_bwd.register_fake
def _(
    x: Tensor, weight: Tensor, order: Tensor, positions: Tensor, ends: Tensor, d_outputs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]], output: list[Tensor]) -> None:
    x, weight, order, positions, ends, ctx.sizes = inputs
    ctx.save_for_backward(x, weight, order, positions, ends)


def _backward(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, order, positions, ends = ctx.saved_tensors
    d_outputs = [
        x.new_zeros(order.shape[0], size) if d_y is None else d_y
        for d_y, size in zip(d_outputs, ctx.sizes, strict=True)
    ]
    d_x, d_weight = _grouped_linear_bwd(x, weight, order, positions, ends, d_outputs)
    return d_x, d_weight, None, None, None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
