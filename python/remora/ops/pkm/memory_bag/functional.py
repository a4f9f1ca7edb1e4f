"""Weighted bags: what users call. Arguments are checked and brought into the operators' form here.

Sources: Lample et al., "Large Memory Layers with Product Keys", arXiv 1907.05242 (the bag); Berges et al., "Memory
Layers at Scale", arXiv 2412.09764 (a pool shared by layers); Huang et al., "Ultra-Sparse Memory Network", arXiv
2411.12364 (groups, heads of weights).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

MAX_LOOKUPS = 2**31 - 2
MAX_ROWS = 2**31 - 2
MAX_WIDTH = 2**30 - 2
MAX_PEER_LOOKUPS_CUDA = 6144


class SlotPlan(NamedTuple):
    """The lookups of a call sorted by table row, made by `slot_plan`. R = min(T * P, N); sizes depend on shapes alone.

    Attributes:
        order: [T * P] int32. Lookups t * P + p by row, in this order within a row; at the end what is no lookup.
        rows: [R] int32. Distinct rows, ascending, those that `row_mask` freezes behind the others; then N.
        starts: [R + 1] int32. The lookups of rows[u] are order[starts[u]] ... order[starts[u + 1] - 1].
        num_rows: [2] int32. How many of `rows` get a gradient, and how many there are with the frozen ones.
    """

    order: Tensor
    rows: Tensor
    starts: Tensor
    num_rows: Tensor

    def hits(self, num_rows: int) -> Tensor:
        """Lookups of every row of the table, [num_rows] int32."""
        count = self.starts.diff()
        hits = count.new_zeros(num_rows + 1).scatter_(0, self.rows.long(), count)
        return hits[:num_rows]

    def row_grad(self, table: Tensor) -> Tensor:
        """A leaf [R, d] that stands for the rows of `table` in `memory_bag(..., row_grad=...)`: its `.grad` becomes the
        sums of `rows`, zero behind the num_rows[0] first. It takes no memory itself.
        """
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        return table.new_zeros((), dtype=wide).expand(self.rows.shape[0], table.shape[1]).requires_grad_()

    def to_sparse(self, row_grad: Tensor, num_rows: int) -> Tensor:
        """The gradient of the rows as a coalesced sparse tensor [num_rows, d]. Waits for the device."""
        U = int(self.num_rows[0])
        with torch.sparse.check_sparse_tensor_invariants():
            return torch.sparse_coo_tensor(
                self.rows[None, :U].long(), row_grad[:U], (num_rows, row_grad.shape[1]), is_coalesced=True
            )


def _check_indices(indices: Tensor, num_rows: int, groups: int, layer_rows: int | None, offset: int) -> int:
    """Checks indices and the map to rows; returns layer_rows."""
    check.is_tensor(indices, "indices")
    _ext.require_backend(indices, "indices")
    check.has_dtype(indices, "indices", (torch.int32, torch.int64))
    check.has_shape(indices, "indices", "[T, P]", [None, None])
    check.in_range(indices.numel(), "the number of lookups T * P", 0, MAX_LOOKUPS)
    check.in_range(num_rows, "the number of rows N", 0, MAX_ROWS)
    layer_rows = num_rows if layer_rows is None else layer_rows
    check.in_range(layer_rows, f"layer_rows (N = {num_rows})", 0, num_rows)
    check.in_range(indices.shape[0], f"T (with groups = {groups})", 0, MAX_LOOKUPS // max(groups, 1))
    check.in_range(groups, f"groups (with layer_rows = {layer_rows})", 1, MAX_ROWS // max(layer_rows, 1))
    check.in_range(offset, f"offset (N = {num_rows})", 0, max(num_rows - 1, 0))
    return layer_rows


def slot_plan(
    indices: Tensor,
    num_rows: int,
    *,
    groups: int = 1,
    layer_rows: int | None = None,
    offset: int = 0,
    row_mask: Tensor | None = None,
) -> SlotPlan:
    """Sorts lookups by the table row they read: stable, on the device, with static sizes and without the host.

    One plan serves every table that is read with these indices, their gradients, optimizers and hit counts.

    Args:
        indices: [T, P] int32 or int64; an index outside 0 ... groups * layer_rows - 1, such as -1, is no lookup.
        num_rows: N, rows of the table, at most 2^31 - 2.
        groups, layer_rows, offset: as in `memory_bag`.
        row_mask: [N] bool, True for rows that get a gradient; others are frozen.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    layer_rows = _check_indices(indices, num_rows, groups, layer_rows, offset)
    if row_mask is not None:
        row_mask = _check_row_mask(row_mask, num_rows, indices)
    return SlotPlan(*torch.ops.remora.slot_plan(indices.contiguous(), num_rows, groups, layer_rows, offset, row_mask))


def _check_row_mask(row_mask: Tensor, num_rows: int, indices: Tensor) -> Tensor:
    check.is_tensor(row_mask, "row_mask")
    check.has_dtype(row_mask, "row_mask", (torch.bool,))
    check.has_shape(row_mask, "row_mask", "[N]", [num_rows])
    check.same_device(row_mask, "row_mask", indices, "indices")
    return row_mask.to(torch.uint8).contiguous()


def _check_plan(plan: SlotPlan, indices: Tensor, num_rows: int) -> None:
    if not isinstance(plan, SlotPlan):
        raise TypeError(f"plan must be a SlotPlan, got {type(plan).__name__}")
    R = min(indices.numel(), num_rows)
    sizes = (("order", indices.numel()), ("rows", R), ("starts", R + 1), ("num_rows", 2))
    for (name, size), tensor in zip(sizes, plan, strict=True):
        check.has_shape(tensor, f"plan.{name}", f"[{size}]", [size])
        check.has_dtype(tensor, f"plan.{name}", (torch.int32,))
        check.same_device(tensor, f"plan.{name}", indices, "indices")


def _check_table(table: Tensor, name: str) -> torch.dtype:
    """Checks a table [N, d]; returns the dtype of sums."""
    check.is_tensor(table, name)
    _ext.require_backend(table, name)
    check.has_dtype(table, name, check.FLOATS if _ext.runs_on_cpu_kernels(table) else check.FLOATS[1:])
    check.has_shape(table, name, "[N, d]", [None, None])
    check.in_range(table.shape[1], f"the width of {name}", 0, MAX_WIDTH)
    if not table.is_contiguous():
        raise ValueError(f"{name} must be contiguous (it is never copied), got strides {list(table.stride())}")
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _check_weights(weights: Tensor, indices: Tensor, width: int, wide: torch.dtype) -> Tensor:
    """Weights [T, P] or [T, P, h] as [T, P, h] in the dtype of sums."""
    check.is_tensor(weights, "weights")
    check.has_dtype(weights, "weights", check.FLOATS)
    check.same_device(weights, "weights", indices, "indices")
    if weights.dim() == 2:
        weights = weights[..., None]
    check.has_shape(weights, "weights", "[T, P] or [T, P, h]", [*indices.shape, None])
    heads = weights.shape[2]
    if heads == 0 or width % heads:
        raise ValueError(f"the heads h of weights must divide the width of the table, {width}, got {heads}")
    return weights.to(wide).contiguous()


def _check_gradient(
    indices: Tensor, table: Tensor, wide: torch.dtype, plan: SlotPlan | None, row_mask: Tensor | None,
    row_grad: Tensor | None, buffer: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Checks where the gradient of the table goes: order, rows, starts, num_rows, row_mask, row_grad, buffer."""
    if row_mask is not None:
        if plan is not None:
            raise ValueError("row_mask belongs to slot_plan when there is a plan")
        row_mask = _check_row_mask(row_mask, table.shape[0], indices)
    if plan is not None:
        _check_plan(plan, indices, table.shape[0])
    if row_grad is not None and buffer is not None:
        raise ValueError("row_grad and accumulate exclude each other")
    if row_grad is not None:
        if plan is None:
            raise ValueError("row_grad needs plan, which says what its rows are")
        check.has_shape(row_grad, "row_grad", "[R, d]", [plan.rows.shape[0], table.shape[1]])
        check.has_dtype(row_grad, "row_grad", (wide,))
        check.same_device(row_grad, "row_grad", table, "table")
    if buffer is not None:
        check.is_tensor(buffer, "accumulate")
        check.has_shape(buffer, "accumulate", "[N, d]", table.shape)
        check.has_dtype(buffer, "accumulate", (wide,))
        check.same_device(buffer, "accumulate", table, "table")
        if buffer.requires_grad or not buffer.is_contiguous():
            raise ValueError("accumulate must be contiguous and require no gradient")
    return (*(plan or (None, None, None, None)), row_mask, row_grad, buffer)


def memory_bag(
    indices: Tensor,
    table: Tensor,
    weights: Tensor | None = None,
    *,
    groups: int = 1,
    layer_rows: int | None = None,
    offset: int = 0,
    plan: SlotPlan | None = None,
    row_mask: Tensor | None = None,
    row_grad: Tensor | None = None,
    accumulate: Tensor | None = None,
) -> Tensor:
    """Weighted sums of table rows.

        o[t] = sum_p weights[t, p] table[indices[t, p]]

    in order of p, in float32 (float64 for float64). With L = layer_rows, index e * L + i reads row (offset + i) mod N
    and belongs to group e: layers with different offsets share a table as a ring, with the same offset and L = N all of
    it. With h heads of weights, head c weighs columns c * d / h ... (c + 1) * d / h - 1.

    The gradient of the table is delivered in one of three ways, with the same sums: dense in `table.grad`; as rows, in
    `row_grad.grad`; or added to the rows of a buffer. Rows get it in order of their lookups, whatever the schedule.

    Args:
        indices: [T, P] int32 or int64. An index outside 0 ... groups * L - 1, such as -1, is no lookup: it adds nothing
            and its weight gets gradient 0.
        table: [N, d] float64 (CPU only), float32, bfloat16 or float16, contiguous; any size.
        weights: [T, P] or [T, P, h] of any floating dtype, used as float32 (float64); default ones.
        groups: G.
        layer_rows: L, at most N; default N.
        offset: row of index 0.
        plan: that of `slot_plan` for these indices and options. Without it, the backward pass makes its own.
        row_mask: [N] bool; rows with False get no gradient. With a plan, give it to `slot_plan` instead.
        row_grad: `plan.row_grad(table)`. Its gradient [R, d] float32 (float64) holds the sums of plan.rows; `table`
            gets none.
        accumulate: [N, d] float32 (float64); the backward pass adds the sums to it in place, if `table` requires a
            gradient, and `table` gets none. Not twice differentiable.

    Returns:
        [T, d], or [T, G, d] if G > 1, in the dtype of the table. Twice differentiable in table and weights.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    wide = _check_table(table, "table")
    layer_rows = _check_indices(indices, table.shape[0], groups, layer_rows, offset)
    check.same_device(indices, "indices", table, "table")
    if weights is not None:
        weights = _check_weights(weights, indices, table.shape[1], wide)
    gradient = _check_gradient(indices, table, wide, plan, row_mask, row_grad, accumulate)
    out: Tensor = torch.ops.remora.memory_bag_fwd(
        indices.contiguous(), table, weights, *gradient, groups, layer_rows, offset
    )
    return out[:, 0] if groups == 1 else out


ACTIVATIONS = ("identity", "relu", "gelu", "silu")


def peer_bag(
    indices: Tensor,
    table: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    act: str = "gelu",
    groups: int = 1,
    layer_rows: int | None = None,
    offset: int = 0,
    plan: SlotPlan | None = None,
    row_mask: Tensor | None = None,
    row_grad: Tensor | None = None,
    accumulate: Tensor | None = None,
) -> Tensor:
    """Weighted sums of experts that are one neuron each (PEER), or of values with pre-values (UltraMemV2).

        o[t] = sum_p weights[t, p] act(<u, x[t]>) v,   [u | v] = table[indices[t, p]]

    in order of p, in float32 (float64 for float64). The weight multiplies after the activation. Groups are summed.

    Sources: He, "Mixture of A Million Experts", arXiv 2407.04153; Huang et al., "UltraMemV2", arXiv 2508.18756.

    Args:
        indices: as in `memory_bag`.
        table: [N, dp + dv], u and v side by side; dtypes as in `memory_bag`.
        x: [T, dp] in the dtype of the table.
        weights: [T, P] or [T, P, h] of any floating dtype, used as float32 (float64); default ones. With h heads, head
            c weighs columns c * dv / h ... (c + 1) * dv / h - 1 of v.
        act: "gelu" (exact), "silu", "relu" or "identity".
        Other arguments as in `memory_bag`.

    Returns:
        [T, dv] in the dtype of the table. Differentiable once, in table, x and weights.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    wide = _check_table(table, "table")
    layer_rows = _check_indices(indices, table.shape[0], groups, layer_rows, offset)
    check.same_device(indices, "indices", table, "table")
    check.is_tensor(x, "x")
    check.has_shape(x, "x", "[T, dp]", [indices.shape[0], None])
    check.has_dtype(x, "x", (table.dtype,))
    check.same_device(x, "x", table, "table")
    check.in_range(x.shape[1], "the width dp of x (with that of table)", 0, table.shape[1])
    if weights is not None:
        weights = _check_weights(weights, indices, table.shape[1] - x.shape[1], wide)
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if not _ext.runs_on_cpu_kernels(table):
        check.in_range(indices.shape[1], "on CUDA, the lookups P of a token", 0, MAX_PEER_LOOKUPS_CUDA)
    gradient = _check_gradient(indices, table, wide, plan, row_mask, row_grad, accumulate)
    out: Tensor = torch.ops.remora.peer_bag_fwd(
        indices.contiguous(), table, x.contiguous(), weights, *gradient, groups, layer_rows, offset,
        ACTIVATIONS.index(act),
    )  # fmt: skip
    return out
