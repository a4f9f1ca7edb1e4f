"""Packed queries and keys: checks, and the rows that chosen keys have in a plan."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from remora.ops import check


def packed_offsets(
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor, num_keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """Checked offsets of q [B, T, ...] and of its keys in the operators' form: int32, within the tensors, never
    decreasing. Keys behind the last offset belong to no sequence.
    """
    if (cu_seqlens is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens and cu_seqlens_k must be given together, got only one of them")
    if cu_seqlens is None or cu_seqlens_k is None:
        return None, None
    for x, name in ((cu_seqlens, "cu_seqlens"), (cu_seqlens_k, "cu_seqlens_k")):
        check.is_tensor(x, name)
        check.has_dtype(x, name, (torch.int32, torch.int64))
        check.same_device(x, name, q, "q")
    check.sequence_offsets(cu_seqlens, *q.shape[:2])
    check.has_shape(cu_seqlens_k, "cu_seqlens_k", "[N + 1] (as cu_seqlens)", cu_seqlens.shape)
    if cu_seqlens_k.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens_k.tolist()
        if not 0 <= offsets[0] <= offsets[-1] <= num_keys or any(a > b for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"cu_seqlens_k must not decrease and stay in 0...{num_keys}, got {offsets}")
    return (
        cu_seqlens.clamp(0, q.shape[1]).cummax(0).values.to(torch.int32),
        cu_seqlens_k.clamp(0, num_keys).cummax(0).values.to(torch.int32),
    )


def chosen_rows(
    idx: Tensor,
    heads: int,
    num_keys: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block: int | None = None,
) -> tuple[Tensor, int]:
    """The rows [B T Hs, k] that idx [B, T, Hs, k] names, as a plan sorts them, and how many rows there are.

    An index is a key or a block of `block` keys, relative to a sequence; what is outside of it becomes -1. Rows are
    [B, heads, slots]; lists of heads that share keys name the same. The slot of a key is its place among the S keys; of
    blocks, sequence n owns the slots from its first key // block + n on.
    """
    B, T, lists, k = idx.shape
    device = idx.device
    per_slot = 1 if block is None else block
    slots = -(-num_keys // per_slot)
    first = torch.zeros((), dtype=torch.int64, device=device)
    size = torch.full((), slots, dtype=torch.int64, device=device)
    if cu_seqlens is not None and cu_seqlens_k is not None:
        offsets, offsets_k = cu_seqlens.long(), cu_seqlens_k.long()
        N = offsets.shape[0] - 1
        seq = torch.searchsorted(offsets, torch.arange(T, device=device), right=True) - 1
        inside = (seq >= 0) & (seq < N)
        seq = seq.clamp(0, N - 1)
        begin, end = offsets_k[seq], offsets_k[seq + 1]
        size = torch.where(inside, (end - begin + per_slot - 1) // per_slot, 0)[:, None, None]
        first = (begin if block is None else begin // block + seq)[:, None, None]
        slots = slots if block is None else num_keys // block + N + 1
    b = torch.arange(B, device=device)[:, None, None, None]
    head = (torch.arange(lists, device=device) // (lists // heads))[:, None]
    rows = torch.where((idx >= 0) & (idx < size), (b * heads + head) * slots + first + idx, -1)
    return rows.to(torch.int32).view(B * T * lists, k), B * heads * slots
