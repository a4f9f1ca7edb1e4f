"""The definition of segment pooling, window by window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pool_window(x: Tensor, mode: str, logits: Tensor | None) -> Tensor:
    """One window [n, ...] to [...]. Of equal largest entries the first gets the gradient."""
    if mode == "last":
        return x[-1]
    if mode == "sum":
        return x.sum(0)
    if mode == "mean":
        return x.mean(0)
    if mode == "max":
        first = ((x == x.amax(0)) | x.isnan()).int().argmax(0, keepdim=True)
        return x.gather(0, first)[0]
    assert logits is not None
    weights = logits if mode == "weighted" else logits.softmax(0)
    return (weights * x).sum(0)


def naive_segment_pool(
    x: Tensor, windows: Sequence[tuple[int, int]], mode: str, gate: Tensor | None, slot_bias: Tensor | None
) -> Tensor:
    """One sequence: x, gate [T, ..., D], windows [first, end), slot_bias [size, ..., D] to [S, ..., D]; an empty window
    gives zero.
    """
    rows = []
    for first, end in windows:
        logits = None if gate is None else gate[first:end]
        if slot_bias is not None:
            logits = slot_bias[: end - first] + (0 if logits is None else logits)
        rows.append(pool_window(x[first:end], mode, logits) if end > first else torch.zeros_like(x[0]))
    return torch.stack(rows) if rows else x[:0]


def naive_dual_segment_pool(
    x: Tensor, windows: Sequence[tuple[int, int]], mode: str, gate: Tensor | None, slot_bias: Tensor | None
) -> Tensor:
    """As naive_segment_pool for x, gate and slot_bias of 2 D channels: window s takes of the tokens of window s - 1 the
    lower half of the channels and of its own the upper half.
    """
    D = x.shape[-1] // 2
    logits: Tensor | None = None
    rows = []
    for s, (first, end) in enumerate(windows):
        parts = [(windows[s - 1], slice(None, D))] if s > 0 else []
        parts.append(((first, end), slice(D, None)))
        values = torch.cat([x[a:b, ..., half] for (a, b), half in parts])
        if gate is not None or slot_bias is not None:
            zero = torch.zeros_like(x)
            gates = zero if gate is None else gate
            biases = zero if slot_bias is None else slot_bias
            logits = torch.cat([gates[a:b, ..., half] + biases[: b - a, ..., half] for (a, b), half in parts])
        rows.append(pool_window(values, mode, logits))
    return torch.stack(rows) if rows else x[:0, ..., :D]
