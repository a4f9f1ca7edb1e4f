"""Attention to chosen blocks of keys: what users call. Arguments are checked and brought into the operators' form
here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.segment.packed import packed_offsets

MAX_BLOCK = 128
MAX_HEAD_DIM = 256
MODES = ("joint", "two_level")


def _check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check.is_tensor(x, name)
    _ext.require_backend(q, "q")
    check.has_dtype(q, "q", check.FLOATS if _ext.runs_on_cpu_kernels(q) else check.FLOATS[1:])
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {list(q.shape)}")
    B, _, H, D = q.shape
    check.has_shape(k, "k", "[B, S, Hk, D]", [B, None, None, D])
    check.has_shape(v, "v", "[B, S, Hk, D] (as k)", k.shape)
    Hk = k.shape[2]
    check.in_range(H, "the number of heads H of q", 1, 2**31 - 1)
    if Hk == 0 or H % Hk != 0:
        raise ValueError(f"k must have a number of heads Hk that divides H = {H}, got {Hk}")
    check.in_range(D, "the head size D of q, k and v", 1, MAX_HEAD_DIM)
    for x, name in ((k, "k"), (v, "v")):
        check.has_dtype(x, name, (q.dtype,))
        check.same_device(x, name, q, "q")


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    block: int,
    *,
    mode: str = "joint",
    weight: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the blocks of keys in its list.

        x[j] = scale <q[t, h], k[j, h // (H / Hk)]>

        "joint"      o = sum_j exp(x[j] - lse) v[j]                  lse = log sum_j exp(x[j]), over all blocks m
        "two_level"  o = sum_m weight[m] sum_j exp(x[j] - lse[m]) v[j]      lse[m] of block m alone

    over the keys j of block idx[m], the tokens idx[m] * block ... (idx[m] + 1) * block - 1 of the sequence that exist
    and, if causal, are not behind the query. The last query of a sequence is at its last key, so that fewer queries
    than keys continue a sequence. A block that is listed twice counts twice. An index outside the sequence, such as -1,
    is no block.

    Without keys, or if every score is -infinity, o is 0 and lse -infinity. Outputs of several calls, or of other
    attention, over different keys are merged by their lse, whose gradient is accepted. Gradients of k and v are sums in
    order of the queries, without atomics.

    Args:
        q: [B, T, H, D] float64 (CPU only), float32, bfloat16 or float16, D <= 256.
        k, v: [B, S, Hk, D] in the dtype of q; Hk divides H.
        idx: [B, T, Hs, n] int32 or int64 with Hs = H, Hk or 1, as `topk_chunks` returns it: a list for every query
            head, for the heads that share keys, or for all.
        block: 1 ... 128 tokens.
        mode: as above.
        weight: [B, T, Hs, n] of any floating dtype, for "two_level".
        causal: as above.
        scale: default D^-1/2.
        cu_seqlens: [N + 1] int32 or int64 offsets of packed sequences of queries (B = 1). Indices are relative to the
            sequence.
        cu_seqlens_k: [N + 1] offsets of their keys; default `cu_seqlens`.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse float32 (float64 for float64), [B, T, H] or for "two_level"
        [B, T, H, n]. Not twice differentiable.

    Raises:
        TypeError, ValueError: an argument has a type, dtype, shape, device or value that is not allowed.
    """
    _check_keys(q, k, v)
    B, T, H, D = q.shape
    S, Hk = k.shape[1:3]
    check.in_range(block, "block", 1, MAX_BLOCK)
    check.is_tensor(idx, "idx")
    check.has_dtype(idx, "idx", (torch.int32, torch.int64))
    check.has_shape(idx, "idx", "[B, T, Hs, n]", [B, T, None, None])
    if idx.shape[2] not in (H, Hk, 1):
        raise ValueError(f"idx must have H = {H}, Hk = {Hk} or 1 lists, got {idx.shape[2]}")
    check.same_device(idx, "idx", q, "q")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if (mode == "two_level") != (weight is not None):
        raise ValueError(f"weight must be given for mode='two_level' and for no other, got mode={mode!r}")
    if weight is not None:
        check.is_tensor(weight, "weight")
        check.has_dtype(weight, "weight", check.FLOATS)
        check.has_shape(weight, "weight", "[B, T, Hs, n] (as idx)", idx.shape)
        check.same_device(weight, "weight", q, "q")
        weight = weight.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()
    if cu_seqlens is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    cu_seqlens, cu_seqlens_k = packed_offsets(cu_seqlens, cu_seqlens_k, q, S)
    idx = idx.clamp(-1, 2**31 - 1).to(torch.int32).contiguous()
    o, lse = torch.ops.remora.gather_attention_fwd(
        q, k, v, idx, weight, cu_seqlens, cu_seqlens_k, block, causal, D**-0.5 if scale is None else float(scale)
    )
    return o, lse
