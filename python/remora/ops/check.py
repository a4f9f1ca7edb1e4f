"""Argument checks: each names the argument, what was given and what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def has_dtype(tensor: Tensor, name: str, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must have dtype {' or '.join(str(d) for d in allowed)}, got {tensor.dtype}")


def has_shape(tensor: Tensor, name: str, legend: str, expected: Sequence[int | None]) -> None:
    """`expected` has None where any size is allowed."""
    same = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not same:
        want = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape {legend} = [{want}], got {list(tensor.shape)}")


def same_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def in_range(value: int, name: str, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}...{high}, got {value}")


def sequence_offsets(cu_seqlens: Tensor, batch: int, seqlen: int) -> None:
    """Checks `cu_seqlens` [N + 1]: 0 = first <= ... <= last = T. The contents only on the CPU, where reading is free;
    on a GPU the kernels clamp them.
    """
    has_dtype(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs inputs with B = 1 (sequences packed along T), got B = {batch}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != seqlen:
        raise ValueError(f"cu_seqlens must start with 0 and end with T = {seqlen}, got {offsets[0]} ... {offsets[-1]}")
    if any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"cu_seqlens must not decrease, got {offsets}")
