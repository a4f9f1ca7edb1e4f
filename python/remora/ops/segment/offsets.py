"""Where the summaries of packed documents lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remora.ops import check


def summary_offsets(cu_seqlens: Tensor, stride: int, size: int | None = None) -> Tensor:
    """Offsets of the summaries of documents packed along T: those of document n are the rows offsets[n] ...
    offsets[n + 1] - 1, one for every whole window of `size` tokens, a window every `stride` tokens.

    Computed on the device, without waiting for it. `T // stride` rows hold all summaries if size >= stride.

    Args:
        cu_seqlens: [N + 1] int32 or int64, ascending.
        stride, size: of a window; `size` defaults to `stride`.

    Returns:
        [N + 1] int32, beginning with 0.

    Raises:
        TypeError: `cu_seqlens` is no tensor of integers.
        ValueError: its shape, or a size, is not allowed.
    """
    check.is_tensor(cu_seqlens, "cu_seqlens")
    check.has_dtype(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    size = stride if size is None else size
    check.in_range(stride, "stride", 1, 2**31 - 1)
    check.in_range(size, "size", 1, 2**31 - 1)
    counts = ((cu_seqlens.diff() - size) // stride + 1).clamp(min=0)
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
