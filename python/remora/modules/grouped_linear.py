"""One linear map per group of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torch's grouped matrix product wants rows of a multiple of 16 bytes: 8 elements of the narrowest dtype.
ROW_MULTIPLE = 8


class GroupedLinear(nn.Module):
    """`y[r] = weight[group(r)] x[r]` for rows sorted by group, in one grouped matrix product.

    The sizes of the groups stay on the device. A group may be empty; its weight then gets a zero gradient.

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

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply the maps.

        Args:
            x: `[R, in_features]`, sorted by group.
            ends: `[G]` int32, nondecreasing: group `g` is the rows from `ends[g - 1]` (0 for the first) to `ends[g]`;
                the last is `R`.

        Returns:
            `[R, out_features]` in the dtype of `x`.
        """
        weight = self.weight.to(x.dtype)
        if x.dtype == torch.float64 or x.shape[0] == 0:
            return self._by_choice(x, weight, ends)
        padding = [-size % ROW_MULTIPLE for size in (self.in_features, self.out_features)]
        if any(padding):
            weight = F.pad(weight, (0, padding[0], 0, padding[1]))
            x = F.pad(x, (0, padding[0]))
        y: Tensor = _grouped_linear(x, weight, ends)
        return y[:, : self.out_features] if padding[1] else y

    def _by_choice(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """The same for float64, which torch's grouped product does not take: every map on every row, then a choice."""
        row = torch.arange(x.shape[0], device=x.device)
        group = torch.searchsorted(ends.long(), row, right=True).clamp(max=self.num_groups - 1)
        return torch.einsum("gof,rf->rgo", weight, x)[row, group]


# An operator of its own because torch's fake kernel of the grouped product refuses float32, which its real ones take.
@torch.library.custom_op("remora_modules::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=ends)


@torch.library.custom_op("remora_modules::grouped_linear_bwd", mutates_args=())
def _grouped_linear_bwd(x: Tensor, weight: Tensor, ends: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    d_y = d_y.contiguous()
    return F.grouped_mm(d_y, weight, offs=ends), F.grouped_mm(d_y.mT, x, offs=ends)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_bwd.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
    d_x, d_weight = _grouped_linear_bwd(*ctx.saved_tensors, d_y)
    return d_x, d_weight, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
