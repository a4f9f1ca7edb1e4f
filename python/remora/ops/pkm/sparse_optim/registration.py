"""Fake kernels of the sparse optimizers, which have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext  # noqa: F401  (defines the operators)


@torch.library.register_fake("remora::sparse_update_")
def _update_fake(
    table: Tensor, moment: Tensor | None, second: Tensor, last_step: Tensor | None, row_log_decay: Tensor | None,
    rows: Tensor, values: Tensor, num_rows: Tensor | None, grad_scale: Tensor | None, all_rows: bool, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, log_decay: float, step: int,
    stochastic_rounding: bool, seed: int, column_offset: int,
) -> None:  # fmt: skip
    return None


@torch.library.register_fake("remora::row_norm")
def _norm_fake(values: Tensor, num_rows: Tensor | None) -> Tensor:
    return values.new_empty((), dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
