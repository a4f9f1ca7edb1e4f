"""Cases of linear attention with scalar decay: inputs, the float64 oracle and the plain PyTorch yardstick of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gated_delta_rule_cases import HALF, Inputs, arrange, gates, results

from remora.ops.recurrence.simple_gla.naive import naive_simple_gla
from remora.testing.numeric import assert_accurate


@dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 100
    H: int = 1
    HV: int = 2
    K: int = 64
    V: int = 64
    dtype: torch.dtype = torch.float32
    gate: str = "weak"
    gamma: bool = False
    state: float | None = None  # scale of the initial state
    final: bool = True
    v_first: bool = False
    lengths: tuple[int, ...] | None = None  # of the sequences packed along T
    offsets: torch.dtype = torch.int32
    scale: float | None = None
    layout: str = "dense"

    @property
    def state_shape(self) -> tuple[int, ...]:
        N = self.B if self.lengths is None else len(self.lengths)
        return (N, self.HV, self.V, self.K) if self.v_first else (N, self.HV, self.K, self.V)


def varlen(*lengths: int, **changes) -> Case:
    return Case(B=1, T=sum(lengths), lengths=lengths, **changes)


def make_inputs(case: Case, requires_grad: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(1234)
    q, k = (F.normalize(torch.randn(case.B, case.T, case.H, case.K, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(case.B, case.T, case.HV, case.V, generator=generator)
    q, k, v = (arrange(x.to(case.dtype), case.layout) for x in (q, k, v))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    g = gates(case, generator)
    gamma = -torch.arange(case.HV).to(wide) / (4 * case.HV) if case.gamma else None
    state = None
    if case.state is not None:
        state = case.state * torch.randn(case.state_shape, generator=generator).to(wide)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0)).to(case.offsets)
    g = None if g is None else g.to(wide)
    tensors = {"q": q, "k": k, "v": v, "g": g, "g_gamma": gamma, "initial_state": state}
    for x in tensors.values():
        if x is not None:
            x.requires_grad_(requires_grad)
    options = {
        "scale": case.scale, "output_final_state": case.final, "cu_seqlens": cu_seqlens, "state_v_first": case.v_first,
    }  # fmt: skip
    d_o = torch.randn(v.shape, generator=generator).to(case.dtype)
    return Inputs(tensors, options, d_o, torch.randn(case.state_shape, generator=generator).to(wide))


def chunked_in_plain_torch(
    q, k, v, g, g_gamma, initial_state, scale, output_final_state, cu_seqlens, state_v_first, chunk=64
):
    """The chunked form as one writes it in PyTorch: matrix products and the states between chunks in the dtype of q,
    gates in float32.
    """
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    B, T, HV, V = v.shape
    K = q.shape[3]
    decay = torch.zeros(B, T, HV, dtype=wide)
    for gate in (g, g_gamma):
        decay = decay if gate is None else decay + gate
    decay = decay.clamp(min=-88)
    q, k = (x.repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))
    scale = K**-0.5 if scale is None else scale
    q, k, v, decay = (x.transpose(1, 2) for x in (q, k, v, decay))  # [B, HV, T, ...]
    bounds = [(0, T)]
    if cu_seqlens is not None:
        bounds = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    outputs, states = [], []
    for n, (begin, end) in enumerate(bounds):
        state = torch.zeros(B, HV, K, V, dtype=dtype)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = (state.transpose(-1, -2) if state_v_first else state).to(dtype)
        for start in range(begin, end, chunk):
            rows = slice(start, min(start + chunk, end))
            Q, K_, V_ = q[:, :, rows], k[:, :, rows], v[:, :, rows]
            G = decay[:, :, rows].cumsum(-1)
            lower = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool).tril()
            D = (G[..., :, None] - G[..., None, :]).masked_fill(~lower, -torch.inf).exp()
            A = ((Q @ K_.transpose(-1, -2)).to(wide) * D).to(dtype)
            outputs.append((scale * (G.exp()[..., None] * (Q @ state).to(wide) + (A @ V_).to(wide))).to(dtype))
            rest = (G[..., -1:] - G).exp()[..., None]
            update = ((K_.to(wide) * rest).to(dtype).transpose(-1, -2) @ V_).to(wide)
            state = (G[..., -1].exp()[..., None, None] * state.to(wide) + update).to(dtype)
        states.append(state)
    o = torch.cat(outputs, dim=2).transpose(1, 2) if outputs else v.transpose(1, 2)
    final = (states[0] if cu_seqlens is None else torch.cat(states)).to(wide)
    final = final.transpose(-1, -2) if state_v_first else final
    return o, final if output_final_state else None


@functools.lru_cache(maxsize=64)
def references(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Oracle and yardstick: computed once for the functions and simulator modes that share a case."""
    inputs = make_inputs(case)
    double = inputs.double()
    for x in double.tensors.values():
        if x is not None:
            x.requires_grad_()
    oracle = results(naive_simple_gla, double)
    if case.dtype == torch.float64:
        return oracle, dict.fromkeys(oracle)
    programs = [results(program, inputs) for program in (chunked_in_plain_torch, naive_simple_gla)]
    errors = [{name: (x[name].double() - oracle[name]).abs().sum() for name in oracle} for x in programs]
    return oracle, {name: programs[errors[0][name] < errors[1][name]][name] for name in oracle}


def check(function, case: Case) -> None:
    """Outputs and gradients of `function` on `case` against the tolerance rule."""
    oracle, yardstick = references(case)
    actual = results(function, make_inputs(case))
    assert actual.keys() == oracle.keys()
    failures = []
    for name, value in actual.items():
        gradient = name.startswith("d")
        bound = HALF[case.dtype][gradient] if case.dtype in HALF else None
        try:
            assert_accurate(
                value, oracle[name], yardstick[name], name, dtype=case.dtype, relative_rms=bound, gradient=gradient
            )
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)
