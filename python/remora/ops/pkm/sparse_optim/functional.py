"""Optimizer steps on row gradients: what users call. Arguments are checked and brought into the operators' form here.

The gradient of a table [N, d] of which few rows were read is compact: `grad_rows[i]` belongs to row `rows[i]`, and
only the first `num_rows` of them count, a number that may stay on the device. Rows are distinct and in rising order; a
row outside 0 ... N - 1 is dropped.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

#: Which rows a step changes: those with a gradient; those, after the steps without a gradient that they missed; or all.
SparseMode = Literal["lazy", "catchup", "dense"]

_INTEGERS = (torch.int32, torch.int64)


def _check_gradient(rows: Tensor, grad_rows: Tensor, num_rows: Tensor | None, table: Tensor) -> None:
    check.is_tensor(rows, "rows")
    check.has_dtype(rows, "rows", _INTEGERS)
    check.has_shape(grad_rows, "grad_rows", "[C, d]", [None, table.shape[1]])
    check.has_shape(rows, "rows", "[C]", grad_rows.shape[:1])
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    check.has_dtype(grad_rows, "grad_rows", (table.dtype,) if wide == table.dtype else (table.dtype, wide))
    for name, tensor in (("rows", rows), ("grad_rows", grad_rows)):
        check.same_device(tensor, name, table, "table")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    _check_count(num_rows, table, "table")


def _check_count(num_rows: Tensor | None, like: Tensor, name: str) -> None:
    if num_rows is None:
        return
    check.is_tensor(num_rows, "num_rows")
    check.has_dtype(num_rows, "num_rows", _INTEGERS)
    check.same_device(num_rows, "num_rows", like, name)
    if num_rows.numel() != 1:
        raise ValueError(f"num_rows must be one number, got shape {list(num_rows.shape)}")


def _check_state(state: Tensor, name: str, legend: str, expected: list[int], dtype: torch.dtype, table: Tensor) -> None:
    check.is_tensor(state, name)
    check.has_dtype(state, name, (dtype,))
    check.has_shape(state, name, legend, expected)
    check.same_device(state, name, table, "table")
    if not state.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {state.stride()}")


def _update(
    table: Tensor,
    moment: Tensor | None,
    second: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    num_rows: Tensor | None,
    grad_scale: Tensor | None,
    mode: str,
    last_step: Tensor | None = None,
    row_log_decay: Tensor | None = None,
    log_decay: float = 0.0,
    stochastic_rounding: bool,
    seed: int,
    column_offset: int,
) -> Tensor:
    check.is_tensor(table, "table")
    check.is_tensor(grad_rows, "grad_rows")
    _ext.require_backend(table, "table")
    check.has_dtype(table, "table", check.FLOATS if _ext.runs_on_cpu_kernels(table) else check.FLOATS[1:])
    if table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"table must be contiguous [N, d], got {list(table.shape)} with strides {table.stride()}")
    N, d = table.shape
    _check_gradient(rows, grad_rows, num_rows, table)
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    if moment is not None:
        _check_state(moment, "exp_avg", "[N, d]", [N, d], wide, table)
    if mode not in get_args(SparseMode):
        raise ValueError(f"mode must be one of {get_args(SparseMode)}, got {mode!r}")
    if (mode == "catchup") != (last_step is not None) or (mode == "catchup") != (row_log_decay is not None):
        raise ValueError("last_step and row_log_decay must be given with mode 'catchup', and only then")
    if last_step is not None and row_log_decay is not None:
        _check_state(last_step, "last_step", "[N]", [N], torch.int32, table)
        _check_state(row_log_decay, "row_log_decay", "[N]", [N], torch.float64, table)
    if grad_scale is not None:
        check.is_tensor(grad_scale, "grad_scale")
        check.same_device(grad_scale, "grad_scale", table, "table")
        check.has_dtype(grad_scale, "grad_scale", (torch.float32,))
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale must be one number, got shape {list(grad_scale.shape)}")
    check.in_range(step, "step", 1, 2**31 - 1)
    check.in_range(seed, "seed", 0, 2**63 - 1)
    if not lr >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if not 0 <= lr * weight_decay < 1:
        raise ValueError(f"lr * weight_decay must be in [0, 1), got {lr} * {weight_decay}")
    if stochastic_rounding and table.dtype != torch.bfloat16:
        raise ValueError(f"stochastic_rounding must be False unless table is bfloat16, got a {table.dtype} table")
    if column_offset < 0 or column_offset % 4:
        raise ValueError(f"column_offset must be a multiple of 4 and not negative, got {column_offset}")
    torch.ops.remora.sparse_update_(
        table, moment, second, last_step, row_log_decay, rows, grad_rows, num_rows, grad_scale, mode == "dense",
        lr, *betas, eps, weight_decay, log_decay, step, stochastic_rounding, seed, column_offset,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # autograd and caches of derived values see that the table changed
        torch.autograd.graph.increment_version(table)
    return table


@torch.no_grad()
def sparse_adamw_(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    step: int,
    num_rows: Tensor | None = None,
    grad_scale: Tensor | None = None,
    mode: SparseMode = "lazy",
    last_step: Tensor | None = None,
    row_log_decay: Tensor | None = None,
    log_decay: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    column_offset: int = 0,
) -> Tensor:
    """One step of AdamW on the rows of a table that have a gradient, in place.

        g = grad_scale * grad                       m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- (1 - lr wd) p - lr / (1 - b1^step) * m / (sqrt(v / (1 - b2^step)) + eps)

    `mode` says what becomes of rows without a gradient:

    * "lazy": nothing. Bias correction follows the step, not the row (`torch.optim.SparseAdam`, with decoupled decay of
      the rows that have a gradient).
    * "catchup": nothing until their next gradient; then the decay of weights and moments that they missed is applied
      first: with D missed steps, m <- b1^D m, v <- b2^D v and p <- p * (product of the missed 1 - lr wd). Only the
      drift that the momentum would have caused in p meanwhile differs from dense AdamW.
    * "dense": the step with a gradient of zero, as dense AdamW does. All N rows are read and written.

    A row that has a gradient gets the same bits in all modes, if it missed no step.

    Args:
        table: [N, d] float64 (CPU only), float32, bfloat16 or float16, contiguous; p.
        exp_avg, exp_avg_sq: [N, d] float32 (float64 for a float64 table); m and v, of zeros before the first step.
        rows: [C] int32 or int64, distinct and rising.
        grad_rows: [C, d] in the dtype of the table or float32.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        step: number of this step, from 1.
        num_rows: one int32 or int64: how many of `rows` count; default all C.
        grad_scale: one float32 that multiplies the gradient, such as a clipping factor; read on the device.
        mode: "lazy", "catchup" or "dense".
        last_step, row_log_decay: [N] int32 and [N] float64, of zeros before the first step; with "catchup".
        log_decay: sum of log(1 - lr wd) over the steps before this one; with "catchup".
        stochastic_rounding: round a bfloat16 table up or down with probabilities that make it right in the mean. The
            random bits depend on (seed, step, row, column) alone and are the same on every device.
        seed: of the rounding, 0 ... 2^63 - 1.
        column_offset: the column of the whole table at which `table`, a shard of its columns, begins; a multiple of 4.

    Returns:
        `table`.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019).
    """
    check.is_tensor(table, "table")
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    _check_state(exp_avg_sq, "exp_avg_sq", "[N, d]", list(table.shape), wide, table)
    return _update(
        table, exp_avg, exp_avg_sq, rows, grad_rows, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step,
        num_rows=num_rows, grad_scale=grad_scale, mode=mode, last_step=last_step, row_log_decay=row_log_decay,
        log_decay=log_decay, stochastic_rounding=stochastic_rounding, seed=seed, column_offset=column_offset,
    )  # fmt: skip


@torch.no_grad()
def rowwise_adam_(
    table: Tensor,
    exp_avg: Tensor,
    row_exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    num_rows: Tensor | None = None,
    grad_scale: Tensor | None = None,
    mode: SparseMode = "lazy",
    last_step: Tensor | None = None,
    row_log_decay: Tensor | None = None,
    log_decay: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    column_offset: int = 0,
) -> Tensor:
    """`sparse_adamw_` with one second moment a row, `row_exp_avg_sq` [N]: v <- b2 v + (1 - b2) mean_c g_c^2.

    Other arguments, modes and errors as there. The state takes N numbers instead of N d, and of a shard of the columns
    it is the moment of that shard.
    """
    check.is_tensor(table, "table")
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    _check_state(row_exp_avg_sq, "row_exp_avg_sq", "[N]", [table.shape[0]], wide, table)
    return _update(
        table, exp_avg, row_exp_avg_sq, rows, grad_rows, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        step=step, num_rows=num_rows, grad_scale=grad_scale, mode=mode, last_step=last_step,
        row_log_decay=row_log_decay, log_decay=log_decay, stochastic_rounding=stochastic_rounding, seed=seed,
        column_offset=column_offset,
    )  # fmt: skip


@torch.no_grad()
def rowwise_adagrad_(
    table: Tensor,
    row_sum: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    step: int,
    num_rows: Tensor | None = None,
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    column_offset: int = 0,
) -> Tensor:
    """One step of Adagrad with one accumulator a row on the rows that have a gradient, in place.

        G <- G + mean_c g_c^2            p <- (1 - lr wd) p - lr g / (sqrt(G) + eps)

    Args:
        row_sum: [N] float32 (float64 for a float64 table); G, of zeros or a small number before the first step.
        step: only keys the stochastic rounding.
        Other arguments as in `sparse_adamw_`.

    Returns:
        `table`.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.

    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods" (JMLR 2011); one accumulator a row as in FBGEMM.
    """
    check.is_tensor(table, "table")
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    _check_state(row_sum, "row_sum", "[N]", [table.shape[0]], wide, table)
    return _update(
        table, None, row_sum, rows, grad_rows, lr=lr, betas=(0.0, 0.0), eps=eps, weight_decay=weight_decay, step=step,
        num_rows=num_rows, grad_scale=grad_scale, mode="lazy", stochastic_rounding=stochastic_rounding, seed=seed,
        column_offset=column_offset,
    )  # fmt: skip


@torch.no_grad()
def row_norm(grad_rows: Tensor, num_rows: Tensor | None = None) -> Tensor:
    """Euclidean norm of the first `num_rows` rows of a gradient [C, d], as a scalar that stays on the device.

    Sums of squares are float32 along a row and float64 over the rows, in a fixed order.

    Args:
        grad_rows: [C, d] float64 (CPU only), float32, bfloat16 or float16, contiguous.
        num_rows: one int32 or int64; default all C.

    Returns:
        scalar float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    check.is_tensor(grad_rows, "grad_rows")
    _ext.require_backend(grad_rows, "grad_rows")
    floats = check.FLOATS if _ext.runs_on_cpu_kernels(grad_rows) else check.FLOATS[1:]
    check.has_dtype(grad_rows, "grad_rows", floats)
    if grad_rows.dim() != 2 or not grad_rows.is_contiguous():
        raise ValueError(f"grad_rows must be contiguous [C, d], got {list(grad_rows.shape)}")
    _check_count(num_rows, grad_rows, "grad_rows")
    norm: Tensor = torch.ops.remora.row_norm(grad_rows, num_rows)
    return norm
