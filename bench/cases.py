"""What is measured: operator, shape, dtype, mode; the inputs of a case; its FLOPs and bytes; its gate of
correctness.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# largest relative RMS error of any output or gradient against float64
TOLERANCE = {"fp32": 1e-5, "bf16": 1.2e-2}


@dataclass(frozen=True)
class Case:
    mode: str  # fwd, fwd+bwd or decode
    dtype: str
    B: int
    T: int
    H: int
    D: int  # K = V
    rotate: int = 1  # decode: state sets used in turn; several make them cold
    op: str = "gated_delta_rule"  # or simple_gla

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the differentiable inputs, in the order of the operator's arguments."""
        return ("q", "k", "v", "g") + (("beta",) if self.op == "gated_delta_rule" else ())

    @property
    def name(self) -> str:
        cold = f" x{self.rotate} states" if self.rotate > 1 else ""
        return f"{self.op} {self.mode} {self.dtype} B{self.B} T{self.T} H{self.H} K=V={self.D}{cold}"

    def small(self) -> "Case":
        """The same case at a size the float64 recurrence with gradients can do."""
        return Case(self.mode, self.dtype, min(self.B, 2), min(self.T, 130), min(self.H, 2), self.D, op=self.op)

    def flops(self) -> float:
        """The fewest of any schedule that carries a state: a token's products with it, 2 K V each.

        Of the gated delta rule, forward three, S^T k, S += k u^T, S^T q; backward six, dS += q dO^T, dS^T k,
        dS -= k dV^T and, of dk and dq, dS u, S dV, S dO. Of simple_gla two, S += k v^T, S^T q, and four,
        dS += q dO^T, dS^T k, dS v, S dO. Products of tokens with each other (none in the recurrence), and of states
        that are computed again (one or two a token), come on top: what a schedule pays for fewer passes over the state
        and for memory.
        """
        forward, backward = {"gated_delta_rule": (3, 6), "simple_gla": (2, 4)}[self.op]
        products = forward + backward if self.mode == "fwd+bwd" else forward
        return self.B * self.T * self.H * products * 2.0 * self.D**2

    def bytes(self) -> float:
        """Inputs once and outputs once; of decode the states, read and written."""
        element = 4 if self.dtype == "fp32" else 2
        tokens, gates = self.B * self.T * self.H, 4 * (len(self.inputs) - 3)
        if self.mode == "decode":
            return tokens * (2 * 4 * self.D * self.D + 4 * element * self.D + gates)
        forward = tokens * (4 * element * self.D + gates)
        return forward if self.mode == "fwd" else forward + tokens * (8 * element * self.D + 2 * gates)


OPERATORS = ("gated_delta_rule", "simple_gla")
HEADLINE = [
    Case(mode, dtype, 1, 4096, 8, 128, op=op)
    for op in OPERATORS
    for mode in ("fwd", "fwd+bwd")
    for dtype in ("fp32", "bf16")
]
DECODE = [
    Case("decode", dtype, 32, 1, 8, 128, rotate, op)
    for op in OPERATORS
    for dtype in ("fp32", "bf16")
    for rotate in (1, 8)
]
MORE = [
    Case(mode, dtype, 1, T, 8, D, op=op)
    for op in OPERATORS
    for T, D in ((1024, 64), (4096, 64), (1024, 128))
    for mode in ("fwd", "fwd+bwd")
    for dtype in ("fp32", "bf16")
]


def select(pattern: str | None, everything: bool = False) -> list[Case]:
    """The cases whose name has every word of the pattern."""
    cases = HEADLINE + DECODE + (MORE if everything or pattern else [])
    return [c for c in cases if set((pattern or "").split()) <= set(c.name.split())]


@dataclass
class Inputs:
    """As a layer gives them: unit-length q and k, log decay g and beta in float32; a state for decode."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    d_o: Tensor
    a: Tensor  # logits of g and beta, and the gate's parameters
    b: Tensor
    a_log: Tensor
    dt_bias: Tensor
    states: list[Tensor]

    @property
    def scale(self) -> float:
        return self.case.D**-0.5


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    B, T, H, D = case.B, case.T, case.H, case.D
    q, k = (F.normalize(normal(B, T, H, D), dim=-1).to(dtype) for _ in range(2))
    a, b, a_log, dt_bias = normal(B, T, H), normal(B, T, H), normal(H) * 0.3, normal(H) - 3
    # rounded before use, since peers take the gates in the dtype of q
    a, b = a.to(dtype), b.to(dtype)
    g = -a_log.exp() * F.softplus(a.float() + dt_bias)
    states = [normal(B, H, D, D) * 0.1 for _ in range(case.rotate)] if case.mode == "decode" else []
    return Inputs(
        case,
        q,
        k,
        normal(B, T, H, D).to(dtype),
        g,
        b.float().sigmoid(),
        normal(B, T, H, D).to(dtype),
        a,
        b,
        a_log,
        dt_bias,
        states,
    )


Outputs = dict[str, Tensor]


def reference(x: Inputs) -> Outputs:
    """Float64, token by token, from the rounded inputs; gradients unless forward only."""
    from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
    from remora.ops.recurrence.simple_gla.naive import naive_simple_gla

    naive = {"gated_delta_rule": naive_gated_delta_rule, "simple_gla": naive_simple_gla}[x.case.op]
    names = x.case.inputs
    exact = {n: getattr(x, n).double().requires_grad_(x.case.mode == "fwd+bwd") for n in names}
    if x.case.mode == "decode":
        o, state = naive(**exact, initial_state=x.states[0].double(), output_final_state=True)
        return {"o": o, "state": state}
    o, _ = naive(**exact)
    out = {"o": o.detach()}
    if x.case.mode == "fwd+bwd":
        grads = torch.autograd.grad(o, list(exact.values()), x.d_o.double())
        out |= {f"d{n}": d for n, d in zip(names, grads, strict=True)}
    return out


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    error = (actual.double() - expected.double()).square().mean().sqrt()
    value = (error / expected.double().square().mean().sqrt()).item()
    return value if value == value else float("inf")


def errors(actual: Outputs, expected: Outputs) -> dict[str, float]:
    """Relative RMS error of every output that `actual` has; one that is missing altogether is infinite."""
    shared = {n: relative_rms(actual[n], expected[n]) for n in expected if n in actual}
    return shared or {"o": float("inf")}


def gate(run: Callable[[Inputs], Outputs], case: Case, required: Sequence[str] = ("o",)) -> dict[str, float]:
    """Errors of `run` on the small case; raises Wrong if one is too large or a required output is missing."""
    x = make_inputs(case.small(), seed=1)
    return check(run(x), reference(x), case.dtype, required)


class Wrong(Exception):  # noqa: N818
    """An implementation whose results are not those of the operator."""


def check(actual: Outputs, expected: Outputs, dtype: str, required: Sequence[str] = ("o",)) -> dict[str, float]:
    missing = [n for n in required if n not in actual]
    if missing:
        raise Wrong(f"no output {', '.join(missing)}")
    found = errors(actual, expected)
    bad = {n: e for n, e in found.items() if not e <= TOLERANCE[dtype]}
    if bad:
        raise Wrong(", ".join(f"{n}: relative RMS error {e:.1e} > {TOLERANCE[dtype]:.0e}" for n, e in bad.items()))
    return found
