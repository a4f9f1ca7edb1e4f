"""Cases of the gated delta rule: inputs, the float64 oracle and the plain PyTorch yardstick of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from remora import _ext
from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
HALF = {torch.bfloat16: (0.004, 0.006)}  # bounds of outputs and gradients tighter than the general rule
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


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
    beta: str = "uniform"
    keys: str = "random"
    l2norm: bool = False
    state: float | None = None  # scale of the initial state
    final: bool = True
    v_first: bool = False
    lengths: tuple[int, ...] | None = None  # of the sequences packed along T
    offsets: torch.dtype = torch.int32
    scale: float | None = None
    layout: str = "dense"

    def __post_init__(self) -> None:
        assert self.lengths is None or (sum(self.lengths) == self.T and self.B == 1)

    @property
    def N(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.N, self.HV, self.V, self.K) if self.v_first else (self.N, self.HV, self.K, self.V)


def varlen(*lengths: int, **changes) -> Case:
    return Case(B=1, T=sum(lengths), lengths=lengths, **changes)


@dataclass
class Inputs:
    """What a public function is called with: positional tensors by name, and options."""

    tensors: dict[str, torch.Tensor | None]
    options: dict[str, object]
    d_o: torch.Tensor
    d_final: torch.Tensor

    def call(self, function, **options):
        return function(**self.tensors, **{**self.options, **options})

    def double(self) -> Inputs:
        return Inputs(
            {name: None if x is None else x.detach().double() for name, x in self.tensors.items()},
            self.options, self.d_o.double(), self.d_final.double(),
        )  # fmt: skip


def gates(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    shape = (case.B, case.T, case.HV)
    noise = torch.randn(shape, generator=generator)
    if case.gate == "none":
        return None
    if case.gate == "zero":
        return torch.zeros(shape)
    if case.gate == "weak":
        return F.logsigmoid(noise + 4)
    if case.gate == "model":
        return -16 * torch.rand(case.HV, generator=generator) * F.softplus(noise)
    if case.gate == "strong":
        return torch.full(shape, -20.0)
    if case.gate == "reset":
        return torch.where(noise > 1, -torch.inf, F.logsigmoid(noise + 4))
    if case.gate == "many resets":
        return torch.where(noise > 0, -torch.inf, F.logsigmoid(noise + 4))
    if case.gate == "-inf":
        return torch.full(shape, -torch.inf)
    assert case.gate == "mixed", case.gate
    regimes = [F.logsigmoid(noise + 4), torch.full(shape, -20.0), torch.zeros(shape), -8 * F.softplus(noise)]
    return torch.stack([regimes[head % 4][..., head] for head in range(case.HV)], dim=-1)


def betas(case: Case, generator: torch.Generator) -> torch.Tensor:
    shape = (case.B, case.T, case.HV)
    noise = torch.randn(shape, generator=generator)
    fixed = {"zero": 0.0, "tiny": 1e-4, "one": 1.0, "two": 2.0}
    if case.beta in fixed:
        return torch.full(shape, fixed[case.beta])
    if case.beta == "uniform":
        return noise.sigmoid()
    assert case.beta == "mixed", case.beta
    choice = torch.randint(4, shape, generator=generator)
    return torch.tensor(list(fixed.values()))[choice]


def keys(case: Case, generator: torch.Generator) -> torch.Tensor:
    shape = (case.B, case.T, case.H, case.K)
    k = torch.randn(shape, generator=generator)
    common = torch.randn(case.B, 1, case.H, case.K, generator=generator).expand(shape)
    if case.keys == "correlated":  # cosine 0.9
        return 3 * F.normalize(common, dim=-1) + F.normalize(k, dim=-1)
    return common.clone() if case.keys == "identical" else k


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "head first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":  # rows that start at odd elements
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]
    if layout == "strided rows":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "broadcast":
        return x[:, :, :1].expand(x.shape)
    assert layout in ("dense", "packed"), layout
    return x


def make_inputs(case: Case, requires_grad: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(1234)
    q = torch.randn(case.B, case.T, case.H, case.K, generator=generator)
    k = keys(case, generator)
    if not case.l2norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v = torch.randn(case.B, case.T, case.HV, case.V, generator=generator)
    q, k, v = (arrange(x.to(case.dtype), case.layout) for x in (q, k, v))
    if case.layout == "packed":  # views of one projection
        sizes = [case.H * case.K, case.H * case.K, case.HV * case.V]
        q, k, v = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1).split(sizes, dim=-1)
        q, k, v = (x.unflatten(2, (heads, -1)) for x, heads in ((q, case.H), (k, case.H), (v, case.HV)))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    g, beta = gates(case, generator), betas(case, generator).to(wide)
    g = None if g is None else g.to(wide)
    if case.layout != "dense":
        beta = beta.transpose(1, 2).contiguous().transpose(1, 2)
    state = None
    if case.state is not None:
        state = case.state * torch.randn(case.state_shape, generator=generator).to(wide)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0)).to(case.offsets)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}
    for x in tensors.values():
        if x is not None:
            x.requires_grad_(requires_grad)
    options = {
        "scale": case.scale, "output_final_state": case.final, "cu_seqlens": cu_seqlens,
        "use_qk_l2norm_in_kernel": case.l2norm, "state_v_first": case.v_first,
    }  # fmt: skip
    d_o = torch.randn(v.shape, generator=generator).to(case.dtype)
    return Inputs(tensors, options, d_o, torch.randn(case.state_shape, generator=generator).to(wide))


def results(function, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Outputs and, where inputs ask for them, gradients of one call, by name."""
    o, final_state = inputs.call(function)
    outputs = {"o": (o, inputs.d_o)}
    if final_state is not None:
        outputs["final_state"] = (final_state, inputs.d_final)
    out = {name: x.detach() for name, (x, _) in outputs.items()}
    leaves = {name: x for name, x in inputs.tensors.items() if x is not None and x.requires_grad}
    if leaves:
        # Without tokens the oracle's output depends on nothing.
        used, gradients = zip(*(pair for pair in outputs.values() if pair[0].requires_grad), strict=True)
        grads = torch.autograd.grad(used, list(leaves.values()), gradients, materialize_grads=True)
        out.update((f"d{name}", grad) for name, grad in zip(leaves, grads, strict=True))
    return out


def chunked_in_plain_torch(
    q, k, v, g, beta, initial_state, scale, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, state_v_first
):
    """The chunked form as one writes it in PyTorch: matrix products and the states between chunks in the dtype of q,
    gates and the triangular solve in float32.
    """
    chunk, dtype = 64, q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    HV, K, V = v.shape[2], q.shape[3], v.shape[3]
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.to(wide).square().sum(-1, keepdim=True) + 1e-6).to(dtype) for x in (q, k))
    q, k = (x.repeat_interleave(HV // x.shape[2], dim=2) for x in (q, k))
    g = torch.zeros_like(beta) if g is None else g.clamp(min=-88)
    scale = K**-0.5 if scale is None else scale
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))  # [B, HV, T, ...]
    bounds = [(0, q.shape[2])]
    if cu_seqlens is not None:
        bounds = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    outputs, states = [], []
    for n, (begin, end) in enumerate(bounds):
        state = torch.zeros(q.shape[0], HV, K, V, dtype=dtype)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = (state.transpose(-1, -2) if state_v_first else state).to(dtype)
        for start in range(begin, end, chunk):
            rows = slice(start, min(start + chunk, end))
            Q, K_, V_, b = q[:, :, rows], k[:, :, rows], v[:, :, rows], beta[:, :, rows, None]
            G = g[:, :, rows].cumsum(-1)
            lower = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool).tril()
            D = (G[..., :, None] - G[..., None, :]).masked_fill(~lower, -torch.inf).exp()
            decay = G.exp()[..., None]
            L = b * (K_ @ K_.transpose(-1, -2)).to(wide) * D * lower.tril(-1)
            R = b * (V_.to(wide) - decay * (K_ @ state).to(wide))
            U = torch.linalg.solve_triangular(L + torch.eye(len(lower), dtype=wide), R, upper=False).to(dtype)
            A = ((Q @ K_.transpose(-1, -2)).to(wide) * D).to(dtype)
            outputs.append((scale * (decay * (Q @ state).to(wide) + (A @ U).to(wide))).to(dtype))
            rest = (G[..., -1:] - G).exp()[..., None]
            update = ((K_.to(wide) * rest).to(dtype).transpose(-1, -2) @ U).to(wide)
            state = (decay[..., -1:, :] * state.to(wide) + update).to(dtype)
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
    oracle = results(naive_gated_delta_rule, double)
    if case.dtype == torch.float64:
        return oracle, dict.fromkeys(oracle)
    programs = [results(program, inputs) for program in (chunked_in_plain_torch, naive_gated_delta_rule)]
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


def in_every_dtype(cases: dict[str, Case]) -> dict[str, Case]:
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + ([] if CUDA_PATH else [torch.float64])
    return {
        f"{name}-{str(dtype).removeprefix('torch.')}": replace(case, dtype=dtype)
        for dtype in dtypes
        for name, case in cases.items()
    }
