"""Optimizer steps on row gradients."""

from remora.ops.pkm.sparse_optim import registration as _registration  # noqa: F401
from remora.ops.pkm.sparse_optim.functional import (
    SparseMode,
    row_norm,
    rowwise_adagrad_,
    rowwise_adam_,
    sparse_adamw_,
)

__all__ = ["SparseMode", "row_norm", "rowwise_adagrad_", "rowwise_adam_", "sparse_adamw_"]
