"""The causal depthwise convolution: what users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

Activation = Literal["silu", "swish"]
MAX_WIDTH = 8


def _check_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None, bool]:
    """Weight and bias as the operators take them, and whether SiLU follows."""
    check.is_tensor(x, "x")
    _ext.require_backend(x, "x")
    check.has_dtype(x, "x", check.FLOATS if _ext.runs_on_cpu_kernels(x) else check.FLOATS[1:])
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, T, D], got {list(x.shape)}")
    check.is_tensor(weight, "weight")
    check.has_shape(weight, "weight", "[D, W]", [x.shape[2], None])
    check.in_range(weight.shape[1], "the width W of weight", 1, MAX_WIDTH)
    if bias is not None:
        check.is_tensor(bias, "bias")
        check.has_shape(bias, "bias", "[D]", [x.shape[2]])
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check.has_dtype(tensor, name, check.FLOATS)
            check.same_device(tensor, name, x, "x")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)} or None, got {activation!r}")
    return (
        weight.to(compute_dtype).contiguous(),
        None if bias is None else bias.to(compute_dtype).contiguous(),
        activation is not None,
    )


def _check_state(state: Tensor, name: str, x: Tensor, weight: Tensor, rows: int | None) -> None:
    check.is_tensor(state, name)
    check.has_dtype(state, name, (x.dtype,))
    check.has_shape(state, name, "[N, W - 1, D]", [rows, weight.shape[1] - 1, x.shape[2]])
    check.same_device(state, name, x, "x")


def _indices(
    indices: Tensor | None, name: str, legend: str, shape: Sequence[int], bound: int, x: Tensor
) -> Tensor | None:
    """As int32 in [-1, bound], where both ends mean out of range."""
    if indices is None:
        return None
    check.is_tensor(indices, name)
    check.has_dtype(indices, name, (torch.int32, torch.int64))
    check.has_shape(indices, name, legend, shape)
    check.same_device(indices, name, x, "x")
    return indices.clamp(-1, bound).to(torch.int32).contiguous()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution over time whose window never leaves a sequence; differentiable.

        y[t, d] = act(bias[d] + sum_{j=0}^{W-1} weight[d, W-1-j] * x[t-j, d])

    Inputs before a sequence are `initial_state`, or zero. Sums run in float32 (float64 for float64) in one order for
    every token: results are bitwise the same alone, in a batch, in a packed row, routed and in a decode step. The sums
    of the gradients of weight and bias over tokens run in a fixed order.

    Source: the short convolution of Mamba (Gu, Dao, arXiv 2312.00752); per routed memory as in Mixture-of-Memories
    (Du et al., arXiv 2502.13685), without its released code's window across memories and sequences.

    Args:
        x: [B, T, D]; float32, bfloat16 or float16 (float64 on the CPU).
        weight: [D, W] taps, the newest token last, W in 1...8. Any floating dtype.
        bias: [D] or None.
        activation: "silu" (or "swish"), or None.
        initial_state: [N, W - 1, D] in the dtype of x, the inputs before each sequence, oldest first; default zero.
            N = B, or the number of sequences in `cu_seqlens`.
        output_final_state: whether to return the last W - 1 inputs of each sequence, with which to continue it.
        cu_seqlens: [N + 1] int32 or int64 offsets of sequences packed along T (B = 1), as in
            `chunk_gated_delta_rule`; with `rows`, offsets into its B * T positions, clamped to them and raised to the
            largest before them.
        rows: [B * T] int32, a permutation of the rows b * T + t of x: sequence n is the rows
            rows[cu_seqlens[n]] ... rows[cu_seqlens[n + 1] - 1] in this order (see `route_plan`). Rows of no sequence
            give zero. Indices out of range are clamped.

    Returns:
        y [B, T, D] in the dtype of x, and the final state [N, W - 1, D] or None.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device, width, offset or activation is not allowed.
    """
    weight, bias, use_silu = _check_inputs(x, weight, bias, activation)
    num_seqs = x.shape[0]
    if rows is not None:
        check.is_tensor(rows, "rows")
        check.has_dtype(rows, "rows", (torch.int32,))
        check.has_shape(rows, "rows", "[B * T]", [x.shape[0] * x.shape[1]])
        check.same_device(rows, "rows", x, "x")
        if cu_seqlens is None:
            raise ValueError("rows needs cu_seqlens, got None")
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.has_dtype(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
        rows = rows.contiguous()
    elif cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, x.shape[0], x.shape[1])
    if cu_seqlens is not None:
        check.same_device(cu_seqlens, "cu_seqlens", x, "x")
        cu_seqlens = cu_seqlens.clamp(0, x.shape[0] * x.shape[1]).to(torch.int32).contiguous()
        num_seqs = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state(initial_state, "initial_state", x, weight, num_seqs)
        initial_state = initial_state.contiguous()
    y, final_state = torch.ops.remora.causal_conv1d_fwd(
        x, weight, bias, initial_state, cu_seqlens, rows, use_silu, output_final_state
    )
    return y, final_state if output_final_state else None


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    activation: Activation | None = None,
    state_indices: Tensor | None = None,
    memories: Tensor | None = None,
    num_memories: int = 1,
) -> Tensor:
    """One token of every sequence; `state` is updated in place. Not differentiable.

    Args:
        x: [N, 1, D]; with `memories` [J, N, D], the J choices of N sequences.
        weight: [D, W].
        bias: [D] or None.
        state: [slots * num_memories, W - 1, D] contiguous, in the dtype of x: the last inputs, oldest first.
        activation: "silu" (or "swish"), or None.
        state_indices: [N] integer, the slot of each sequence; -1 skips it (its output is zero). Default 0 ... N - 1.
        memories: [J, N] integer: choice j of sequence n works on state slot * num_memories + memories[j, n]; out of
            range skips it. The choices of a sequence must differ.
        num_memories: states of a slot.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        TypeError: as `causal_conv1d`.
        ValueError: as `causal_conv1d`; or an argument requires a gradient.
    """
    weight, bias, use_silu = _check_inputs(x, weight, bias, activation)
    _check_state(state, "state", x, weight, None)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()}")
    check.in_range(num_memories, "num_memories", 1, 2**31 - 1)
    num_seqs = x.shape[0] if memories is None else x.shape[1]
    if memories is None:
        check.has_shape(x, "x", "[N, 1, D]", [None, 1, None])
        if num_memories != 1:
            raise ValueError(f"num_memories = {num_memories} needs memories, got None")
    if state.shape[0] % num_memories != 0:
        raise ValueError(f"state must have a multiple of num_memories = {num_memories} rows, got {state.shape[0]}")
    slots = state.shape[0] // num_memories
    if state_indices is None and slots != num_seqs:
        raise ValueError(f"state must have N * num_memories = {num_seqs * num_memories} rows, got {state.shape[0]}")
    state_indices = _indices(state_indices, "state_indices", "[N]", [num_seqs], slots, x)
    memories = _indices(memories, "memories", "[J, N]", x.shape[:2], num_memories, x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, state)):
        raise ValueError("causal_conv1d_step has no gradient: call it under torch.no_grad()")
    y: Tensor = torch.ops.remora.causal_conv1d_step_(
        x, weight, bias, state, state_indices, memories, num_memories, use_silu
    )
    return y
