"""The selective scan: what users call. Arguments are checked and brought into the operators' form here."""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

MAX_STATES = 256
MAX_STATES_CUDA = 128


def _check_channel_vector(x: Tensor | None, name: str, u: Tensor) -> Tensor | None:
    if x is None:
        return None
    check.is_tensor(x, name)
    check.has_dtype(x, name, check.FLOATS)
    check.has_shape(x, name, "[D]", [u.shape[1]])
    check.same_device(x, name, u, "u")
    return x.to(torch.float64 if u.dtype == torch.float64 else torch.float32).contiguous()


def _check_token_map(x: Tensor, name: str, u: Tensor, A: Tensor) -> Tensor:
    """[B, G, N, T] from that, from [B, N, T] (one group) or from [D, N] (the same for every token)."""
    check.is_tensor(x, name)
    if x.is_complex() or x.dtype != u.dtype:
        raise TypeError(f"{name} must have the dtype of u ({u.dtype}), got {x.dtype}")
    check.same_device(x, name, u, "u")
    (B, D, T), N = u.shape, A.shape[1]
    if x.dim() == 2:
        check.has_shape(x, name, "[D, N]", [D, N])
        return x[None, :, :, None].expand(B, D, N, T)
    if x.dim() == 3:
        check.has_shape(x, name, "[B, N, T]", [B, N, T])
        return x[:, None]
    check.has_shape(x, name, "[B, G, N, T], [B, N, T] or [D, N]", [B, None, N, T])
    if x.shape[1] == 0 or D % x.shape[1] != 0:
        raise ValueError(f"{name} must have a number of groups G that divides D = {D}, got G = {x.shape[1]}")
    return x


def _check_inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, names: tuple[str, str, str] = ("u", "delta", "delta_bias"),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    u_name, delta_name, bias_name = names
    check.is_tensor(u, u_name)
    _ext.require_backend(u, u_name)
    check.has_dtype(u, u_name, check.FLOATS if _ext.runs_on_cpu_kernels(u) else check.FLOATS[1:])
    for name, x in ((delta_name, delta), ("z", z)):
        if x is None:
            continue
        check.is_tensor(x, name)
        check.has_dtype(x, name, (u.dtype,))
        check.has_shape(x, name, f"[B, D, T] (as {u_name})", u.shape)
        check.same_device(x, name, u, u_name)
    check.is_tensor(A, "A")
    check.has_dtype(A, "A", check.FLOATS)
    check.has_shape(A, "A", "[D, N]", [u.shape[1], None])
    check.same_device(A, "A", u, u_name)
    limit = MAX_STATES if _ext.runs_on_cpu_kernels(u) else MAX_STATES_CUDA
    check.in_range(A.shape[1], "the number of states N of A", 1, limit)
    B, C = _check_token_map(B, "B", u, A), _check_token_map(C, "C", u, A)
    if B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        if groups % min(B.shape[1], C.shape[1]) != 0:
            raise ValueError(
                f"the groups of one of B and C must divide those of the other, got {B.shape[1]} and {C.shape[1]}"
            )
        B, C = (x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
    A = A.to(torch.float64 if u.dtype == torch.float64 else torch.float32).contiguous()
    D, delta_bias = _check_channel_vector(D, "D", u), _check_channel_vector(delta_bias, bias_name, u)
    return u, delta, A, B, C, D, z, delta_bias


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba's selective state space model (S6); differentiable.

        dt_t = softplus(delta_t + delta_bias)            (delta_t + delta_bias without delta_softplus)
        x_t[d, n] = exp(dt_t[d] A[d, n]) x_{t-1}[d, n] + dt_t[d] B_t[n] u_t[d]
        y_t[d] = sum_n C_t[n] x_t[d, n] + D[d] u_t[d]
        out_t = y_t silu(z_t)                            (y_t without z)

    Names and order of the arguments are those of mamba's `selective_scan_fn`. States are float32 (float64 for float64);
    sums over tokens, channels and sequences run in a fixed order, so results are bitwise reproducible and a sequence's
    do not depend on its neighbours. Source: Gu, Dao, "Mamba", arXiv 2312.00752, section 3.

    Args:
        u, delta: [B, D, T] of any strides; float32, bfloat16 or float16 (float64 on the CPU). A tensor whose channels
            are contiguous, such as x.transpose(1, 2) of a [B, T, D] one, is taken as it is, and `out` has its layout.
        A: [D, N] real, usually negative; N up to 256 on the CPU and 128 on CUDA.
        B, C: [B, G, N, T] with G groups of D / G neighbouring channels, [B, N, T] for one group, or [D, N] constant
            over tokens; in the dtype of u.
        D, delta_bias: [D] or None.
        z: [B, D, T] or None, as u.
        delta_softplus: whether the step is softplus of its logit.
        return_last_state: whether to return the last state too.
        initial_state: [N_seqs, D, N] float32 (float64 for float64 u), default zero; N_seqs = B, or the number of
            sequences in `cu_seqlens`.
        cu_seqlens: [N_seqs + 1] int32 or int64 offsets of sequences packed along T (B = 1).
        reverse: scans every sequence from its last token to its first; the last state is that behind the first token.

    Returns:
        out [B, D, T] in the dtype of u; with `return_last_state` also the last states [N_seqs, D, N].

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed (complex A, B or C among them).
        ValueError: a shape, device, size or offset is not allowed.
    """
    check.is_tensor(u, "u")
    if u.dim() != 3:
        raise ValueError(f"u must have shape [B, D, T], got {list(u.shape)}")
    tensors = _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    num_seqs = u.shape[0]
    if cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, u.shape[0], u.shape[2])
        check.same_device(cu_seqlens, "cu_seqlens", u, "u")
        cu_seqlens = cu_seqlens.clamp(0, u.shape[2]).to(torch.int32).contiguous()
        num_seqs = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check.is_tensor(initial_state, "initial_state")
        check.has_dtype(initial_state, "initial_state", (tensors[2].dtype,))
        check.has_shape(initial_state, "initial_state", "[N_seqs, D, N]", [num_seqs, *A.shape])
        check.same_device(initial_state, "initial_state", u, "u")
        initial_state = initial_state.contiguous()
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, initial_state))
    out, last_state, _ = torch.ops.remora.selective_scan_fwd(
        *tensors, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, needs_grad
    )
    return (out, last_state) if return_last_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of `selective_scan` for every sequence; `state` is updated in place. Not differentiable.

    Names and order of the arguments are those of mamba's function of this name.

    Args:
        state: [slots, D, N] contiguous float32 (float64 for float64 x).
        x, dt, z: [B, D].
        A: [D, N].
        B, C: [B, G, N], or [B, N] for one group.
        D, dt_bias: [D] or None.
        dt_softplus: whether the step is softplus of its logit.
        state_batch_indices: [B] int32 or int64 slots; -1 skips a sequence (its output is zero). Default 0 ... B - 1.
            Slots must differ.

    Returns:
        out [B, D] in the dtype of x.

    Raises:
        TypeError: as `selective_scan`.
        ValueError: as `selective_scan`; or an argument requires a gradient.
    """
    check.is_tensor(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [B, D], got {list(x.shape)}")
    for name, value in (("dt", dt), ("B", B), ("C", C), *([] if z is None else [("z", z)])):
        check.is_tensor(value, name)
    for name, value in (("B", B), ("C", C)):
        if value.dim() not in (2, 3):
            raise ValueError(f"{name} must have shape [B, G, N] or [B, N], got {list(value.shape)}")
    tensors = _check_inputs(
        x[..., None], dt[..., None], A, B[..., None], C[..., None], D, None if z is None else z[..., None], dt_bias,
        ("x", "dt", "dt_bias"),
    )  # fmt: skip
    check.is_tensor(state, "state")
    check.has_dtype(state, "state", (tensors[2].dtype,))
    check.has_shape(state, "state", "[slots, D, N]", [None, *A.shape])
    check.same_device(state, "state", x, "x")
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()}")
    if state_batch_indices is None:
        check.has_shape(state, "state", "[B, D, N] (without state_batch_indices)", [x.shape[0], *A.shape])
    else:
        check.is_tensor(state_batch_indices, "state_batch_indices")
        check.has_dtype(state_batch_indices, "state_batch_indices", (torch.int32, torch.int64))
        check.has_shape(state_batch_indices, "state_batch_indices", "[B]", [x.shape[0]])
        check.same_device(state_batch_indices, "state_batch_indices", x, "x")
        state_batch_indices = state_batch_indices.clamp(-1, state.shape[0]).to(torch.int32).contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, state)):
        raise ValueError("selective_state_update has no gradient: call it under torch.no_grad()")
    out: Tensor = torch.ops.remora.selective_scan_step_(*tensors, state, state_batch_indices, dt_softplus)
    return out[..., 0]
