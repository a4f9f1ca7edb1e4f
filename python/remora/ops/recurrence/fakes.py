"""Shapes and dtypes that the fake kernels of the recurrences share."""

from __future__ import annotations

import torch
from torch import Tensor

STATE_INTERVAL = 128  # kStateInterval in shape.h


def state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def num_seqs(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, v_first: bool, wanted: bool) -> Tensor:
    """States of the sequences, or of size zero if they are not wanted."""
    N, K, HV, V = num_seqs(q, cu_seqlens), q.shape[3], v.shape[2], v.shape[3]
    shape: tuple[int, ...] = (0,) if not wanted else (N, HV, V, K) if v_first else (N, HV, K, V)
    return q.new_empty(shape, dtype=state_dtype(q))


def new_saved_states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    """States that the backward pass starts from, every STATE_INTERVAL tokens."""
    slots = q.shape[0] * q.shape[1] // STATE_INTERVAL + num_seqs(q, cu_seqlens)
    shape = (slots, v.shape[2], q.shape[3], v.shape[3]) if wanted else (0,)
    return q.new_empty(shape, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else state_dtype(q))
