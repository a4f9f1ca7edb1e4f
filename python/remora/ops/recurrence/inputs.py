"""What the recurrences over [B, T, H, K] tokens check alike, and the operators' form of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check

MAX_HEAD_DIM = 256
MAX_CHUNK_HEAD_DIM_CUDA = 128  # of K in the chunked kernels; more would spill registers


@dataclass(frozen=True)
class TokenInputs:
    """Checked arguments in the operators' form: q, k, v of one dtype; gates, [B, T, HV], dense in the state's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    scale: float
    state_dtype: torch.dtype

    @property
    def g(self) -> Tensor | None:
        return self.gates.get("g")

    @property
    def beta(self) -> Tensor:
        return self.gates["beta"]

    def state_shape(self, rows: int | None, v_first: bool) -> tuple[str, list[int | None]]:
        K, HV, V = self.q.shape[3], self.v.shape[2], self.v.shape[3]
        return ("[N, HV, V, K]", [rows, HV, V, K]) if v_first else ("[N, HV, K, V]", [rows, HV, K, V])


def check_inputs(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], scale: float | None) -> TokenInputs:
    """`gates` are [B, T, HV] tensors by name."""
    for name, tensor in (("q", q), ("k", k), ("v", v), *gates.items()):
        check.is_tensor(tensor, name)
    _ext.require_backend(q, "q")
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check.has_dtype(q, "q", check.FLOATS if _ext.runs_on_cpu_kernels(q) else check.FLOATS[1:])
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, K], got {list(q.shape)}")
    B, T, H, K = q.shape
    check.has_shape(k, "k", "[B, T, H, K] (as q)", [B, T, H, K])
    check.has_shape(v, "v", "[B, T, HV, V]", [B, T, None, None])
    HV, V = v.shape[2:]
    check.in_range(H, "the number of heads H of q", 1, 2**31 - 1)
    if HV == 0 or HV % H != 0:
        raise ValueError(f"the heads of v (HV) must be a multiple of the heads of q (H = {H}), got {HV}")
    check.in_range(K, "the head size K of q and k", 1, MAX_HEAD_DIM)
    check.in_range(V, "the head size V of v", 1, MAX_HEAD_DIM)
    for name, tensor in (("k", k), ("v", v)):
        check.has_dtype(tensor, name, (q.dtype,))
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, tensor in gates.items():
        check.has_dtype(tensor, name, check.FLOATS)
        check.has_shape(tensor, name, "[B, T, HV]", [B, T, HV])
    for name, tensor in (("k", k), ("v", v), *gates.items()):
        check.same_device(tensor, name, q, "q")
    return TokenInputs(
        q=q,
        k=k,
        v=v,
        gates={name: x.to(state_dtype).contiguous() for name, x in gates.items()},
        scale=K**-0.5 if scale is None else float(scale),
        state_dtype=state_dtype,
    )


def check_head_parameter(tensor: Tensor, name: str, inputs: TokenInputs) -> Tensor:
    """A [HV] tensor, dense in the state's dtype."""
    check.is_tensor(tensor, name)
    check.has_dtype(tensor, name, check.FLOATS)
    check.has_shape(tensor, name, "[HV]", [inputs.v.shape[2]])
    check.same_device(tensor, name, inputs.q, "q")
    return tensor.to(inputs.state_dtype).contiguous()


def check_state(state: Tensor, name: str, inputs: TokenInputs, rows: int | None, v_first: bool) -> None:
    check.is_tensor(state, name)
    check.has_dtype(state, name, (inputs.state_dtype,))
    check.has_shape(state, name, *inputs.state_shape(rows, v_first))
    check.same_device(state, name, inputs.q, "q")


def check_sequences(
    inputs: TokenInputs, initial_state: Tensor | None, cu_seqlens: Tensor | None, v_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The initial state and the offsets of a whole-sequence call."""
    rows = inputs.q.shape[0]
    if cu_seqlens is not None:
        check.is_tensor(cu_seqlens, "cu_seqlens")
        check.sequence_offsets(cu_seqlens, *inputs.q.shape[:2])
        check.same_device(cu_seqlens, "cu_seqlens", inputs.q, "q")
        cu_seqlens = cu_seqlens.clamp(0, inputs.q.shape[1]).to(torch.int32).contiguous()
        rows = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state(initial_state, "initial_state", inputs, rows, v_first)
        initial_state = initial_state.contiguous()
    return initial_state, cu_seqlens


def check_state_indices(state_indices: Tensor | None, inputs: TokenInputs, N: int, slots: int) -> Tensor | None:
    if state_indices is None:
        return None
    check.is_tensor(state_indices, "state_indices")
    check.has_dtype(state_indices, "state_indices", (torch.int32, torch.int64))
    check.has_shape(state_indices, "state_indices", "[N]", [N])
    check.same_device(state_indices, "state_indices", inputs.q, "q")
    return state_indices.clamp(-1, slots).to(torch.int32).contiguous()


def check_pool(state: Tensor, inputs: TokenInputs, state_indices: Tensor | None, v_first: bool) -> Tensor | None:
    """The pool of states of a step, one for every sequence without indices; the indices in the operators' form."""
    N = inputs.q.shape[0]
    check_state(state, "state", inputs, N if state_indices is None else None, v_first)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()}")
    return check_state_indices(state_indices, inputs, N, state.shape[0])


def check_chunk_head_dim(q: Tensor) -> None:
    if not _ext.runs_on_cpu_kernels(q):
        check.in_range(q.shape[3], "on CUDA, the head size K of q and k", 1, MAX_CHUNK_HEAD_DIM_CUDA)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
