"""Optimizers for tables whose gradients are rows, and clipping without waiting for the device."""

from remora.optim.row_gradients import RowGradient, clip_grad_norm_, record_rows, row_gradient
from remora.optim.sparse import RowwiseAdagrad, RowwiseAdamW, SparseAdamW

__all__ = [
    "RowGradient",
    "RowwiseAdagrad",
    "RowwiseAdamW",
    "SparseAdamW",
    "clip_grad_norm_",
    "record_rows",
    "row_gradient",
]
