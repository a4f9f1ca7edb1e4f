"""Segment pooling: what users call. Arguments are checked and brought into the operators' form here.

Sources: Jafari et al., "SCOUT", arXiv 2509.00935 (last); Yuan et al., "Native Sparse Attention", arXiv 2502.11089
(overlapping windows, given weights); DeepSeek-V4 (softmax of gates, dual windows); Tan et al., "PoNet", arXiv
2110.02442 (ragged maximum and its broadcast).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.segment.offsets import summary_offsets
from remora.ops.segment.segment_pool.registration import MODES

PoolMode = Literal["last", "mean", "max", "softmax", "weighted", "sum"]
WITH_LOGITS = ("softmax", "weighted")
MAX_TOKENS = 2**31 - 1


def _check_tokens(x: Tensor, name: str, legend: str) -> Tensor:
    """A [B, T, D] or [B, T, H, D] tensor with contiguous channels, as [B, T, H, D]."""
    check.is_tensor(x, name)
    _ext.require_backend(x, name)
    check.has_dtype(x, name, check.FLOATS if _ext.runs_on_cpu_kernels(x) else check.FLOATS[1:])
    if x.dim() not in (3, 4):
        raise ValueError(f"{name} must have shape {legend}, got {list(x.shape)}")
    check.in_range(x.shape[1], f"the tokens of {name}", 0, MAX_TOKENS)
    x = x if x.dim() == 4 else x[:, :, None]
    return x if x.stride(3) == 1 else x.contiguous()


def _check_segments(segment_ids: Tensor, batch: int, seqlen: int, like: Tensor, like_name: str) -> Tensor:
    """[B, T] ids, ascending in every row; the contents only on the CPU, where reading is free."""
    check.is_tensor(segment_ids, "segment_ids")
    check.has_dtype(segment_ids, "segment_ids", (torch.int32, torch.int64))
    check.has_shape(segment_ids, "segment_ids", "[B, T]", [batch, seqlen])
    check.same_device(segment_ids, "segment_ids", like, like_name)
    readable = segment_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((segment_ids.diff(dim=1) < 0).any()):
        raise ValueError("segment_ids must be sorted along T, got ids that fall")
    return segment_ids.to(torch.int32).contiguous()


def _segment_starts(segment_ids: Tensor, num_segments: int) -> Tensor:
    segments = torch.arange(num_segments + 1, dtype=torch.int32, device=segment_ids.device)
    rows = segments.expand(segment_ids.shape[0], -1).contiguous()
    return torch.searchsorted(segment_ids, rows, out_int32=True)


def segment_pool(
    x: Tensor,
    size: int | None = None,
    stride: int | None = None,
    mode: PoolMode = "mean",
    *,
    gate: Tensor | None = None,
    slot_bias: Tensor | None = None,
    dual: bool = False,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_arg: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One row of each window of tokens; differentiable.

    Window s is the tokens s * stride ... s * stride + size - 1; there are S = (T - size) // stride + 1 whole ones.
    Channel by channel, with l_i = gate_i + slot_bias[i - s * stride]:

        last      x of the window's last token
        sum, mean
        max       the gradient goes to the first of equal entries, a NaN is larger than any number
        softmax   sum_i softmax_i(l) x_i
        weighted  sum_i l_i x_i

    Sums, logits and weights are float32 (float64 for float64 x), in a fixed order: results are bitwise reproducible and
    those of a window depend on its tokens only.

    Args:
        x: [B, T, D] or [B, T, H, D] with contiguous channels and other strides free; float32, bfloat16 or float16
            (float64 on the CPU).
        size: tokens of a window; None with `segment_ids`.
        stride: tokens from a window to the next, default `size`.
        mode: see above.
        gate: as x; of softmax and weighted, which need it or `slot_bias`.
        slot_bias: [size, D] or [size, H, D] (with the channels of x) in any floating dtype; not with `segment_ids`.
        dual: x, gate and slot_bias have 2 D channels. Window s takes of the tokens of window s - 1 the lower half of
            the channels and of its own the upper half: up to 2 size tokens. Needs stride == size; not `last`.
        segment_ids: [B, T] int32 or int64, ascending along T: window s is the tokens with id s. Ids outside
            0 ... num_segments - 1 belong to none; a segment without tokens gives zero.
        num_segments: S with `segment_ids`.
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T (B = 1). No window crosses a border, and
            counting begins anew in each; windows lie in y one sequence after the other
            (`summary_offsets(cu_seqlens, stride, size)`), the rest of its S = T // stride rows are zero. Needs
            size >= stride.
        return_arg: of max, whether to return the tokens of the largest entries too.

    Returns:
        y [B, S, D] or [B, S, H, D] in the dtype of x; with `return_arg` also the tokens, int32 of the same shape, -1 of
        a window without tokens.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device, size, mode or combination is not allowed.
    """
    legend = "[B, T, D] or [B, T, H, D]"
    tokens = _check_tokens(x, "x", legend)
    B, T, H, C = tokens.shape
    if mode not in get_args(PoolMode):
        raise ValueError(f"mode must be one of {get_args(PoolMode)}, got {mode!r}")
    if (mode in WITH_LOGITS) != (gate is not None or slot_bias is not None):
        raise ValueError(f"gate or slot_bias must be given with mode 'softmax' or 'weighted' only, got mode {mode!r}")
    if return_arg and mode != "max":
        raise ValueError(f"return_arg needs mode 'max', got {mode!r}")
    if segment_ids is not None:
        if dual or any(t is not None for t in (size, stride, slot_bias, cu_seqlens)):
            raise ValueError("segment_ids excludes size, stride, slot_bias, dual and cu_seqlens")
        if num_segments is None:
            raise ValueError("num_segments must be given with segment_ids, got None")
        check.in_range(num_segments, "num_segments", 0, MAX_TOKENS - 1)
        size = stride = 1
    else:
        if size is None or num_segments is not None:
            raise ValueError("size must be given, and num_segments with segment_ids only")
        stride = size if stride is None else stride
    check.in_range(size, "size", 1, MAX_TOKENS)
    check.in_range(stride, "stride", 1, MAX_TOKENS)
    if dual and (size != stride or C % 2 != 0 or mode == "last"):
        raise ValueError(
            f"dual needs stride == size, an even number of channels and another mode than 'last', "
            f"got size {size}, stride {stride}, {C} channels and mode {mode!r}"
        )

    if gate is not None:
        check.is_tensor(gate, "gate")
        check.has_dtype(gate, "gate", (x.dtype,))
        check.has_shape(gate, "gate", f"{legend} (as x)", x.shape)
        check.same_device(gate, "gate", x, "x")
        gate = _check_tokens(gate, "gate", legend)
    if slot_bias is not None:
        check.is_tensor(slot_bias, "slot_bias")
        check.has_dtype(slot_bias, "slot_bias", check.FLOATS)
        check.has_shape(slot_bias, "slot_bias", "[size, D] or [size, H, D] (as x)", [size, *x.shape[2:]])
        check.same_device(slot_bias, "slot_bias", x, "x")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        slot_bias = slot_bias.to(wide).reshape(size, H, C).contiguous()

    starts = seq_offsets = window_offsets = None
    if segment_ids is not None and num_segments is not None:
        segment_ids = _check_segments(segment_ids, B, T, x, "x")
        starts, num_windows = _segment_starts(segment_ids, num_segments), num_segments
    elif cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, B, T)
        check.same_device(cu_seqlens, "cu_seqlens", x, "x")
        if size < stride:
            raise ValueError(f"cu_seqlens needs size >= stride, got size {size} and stride {stride}")
        seq_offsets = cu_seqlens.clamp(0, T).cummax(0).values.to(torch.int32)
        window_offsets, num_windows = summary_offsets(seq_offsets, stride, size), T // stride
    else:
        num_windows = (T - size) // stride + 1 if size <= T else 0
    save = return_arg or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tokens, gate, slot_bias))
    )
    y, arg, _ = torch.ops.remora.segment_pool_fwd(
        tokens, gate, slot_bias, segment_ids, starts, seq_offsets, window_offsets, size, stride, num_windows,
        MODES.index(mode), dual, save,
    )  # fmt: skip
    if x.dim() == 3:
        y, arg = y[:, :, 0], arg[:, :, 0] if return_arg else arg
    return (y, arg) if return_arg else y


def segment_broadcast(y: Tensor, segment_ids: Tensor) -> Tensor:
    """Gives every token the row of its segment, x[b, t] = y[b, segment_ids[b, t]]; differentiable. The adjoint of
    `segment_pool(..., mode="sum")`.

    Args:
        y: [B, S, D] or [B, S, H, D]; float32, bfloat16 or float16 (float64 on the CPU).
        segment_ids: [B, T] int32 or int64, ascending along T; ids outside 0 ... S - 1 give zero.

    Returns:
        x [B, T, D] or [B, T, H, D] in the dtype of y.

    Raises:
        TypeError, ValueError: as `segment_pool`.
    """
    rows = _check_tokens(y, "y", "[B, S, D] or [B, S, H, D]").contiguous()
    if segment_ids.dim() != 2:
        raise ValueError(f"segment_ids must have shape [B, T], got {list(segment_ids.shape)}")
    segment_ids = _check_segments(segment_ids, y.shape[0], segment_ids.shape[1], y, "y")
    starts = _segment_starts(segment_ids, y.shape[1])
    x: Tensor = torch.ops.remora.segment_pool_bwd(
        rows, None, None, None, segment_ids, starts, None, None, None, None, None, segment_ids.shape[1], 1, 1,
        MODES.index("sum"), False,
    )[0]  # fmt: skip
    return x if y.dim() == 4 else x[:, :, 0]
