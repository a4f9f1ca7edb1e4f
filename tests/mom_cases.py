"""Cases of the routed recurrence: inputs, the masked dense oracle in float64, and a plain PyTorch yardstick of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gated_delta_rule_cases import CUDA_PATH, HALF, chunked_in_plain_torch

from remora import ops
from remora.ops.routed.naive import naive_mom_gated_delta_rule
from remora.testing.numeric import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if CUDA_PATH else [torch.float64])


@dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 40
    H: int = 1
    HV: int = 2
    K: int = 16
    V: int = 24
    M: int = 3
    k: int = 2
    dtype: torch.dtype = torch.float32
    shared: bool = False
    per_choice: bool = False  # q, k, v, g and beta differ between the choices of a token
    lengths: tuple[int, ...] | None = None  # of the sequences packed along T
    capacity: int | None = None
    drop: str = "newest"
    masked: bool = False
    l2norm: bool = False
    routing: str = "random"

    def __post_init__(self) -> None:
        assert self.lengths is None or (sum(self.lengths) == self.T and self.B == 1)

    @property
    def N(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


def choices(case: Case, generator: torch.Generator) -> torch.Tensor:
    noise = torch.rand(case.B, case.T, case.M, generator=generator)
    if case.routing == "collapsed":  # every token to the same memories
        noise = torch.arange(case.M).expand_as(noise)
    elif case.routing == "one unused":
        noise = noise[..., :-1]
    return noise.argsort(-1)[..., : case.k].int()


@dataclass
class Inputs:
    case: Case
    tensors: dict[str, torch.Tensor]
    indices: torch.Tensor
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    d_o: torch.Tensor
    d_final: torch.Tensor

    def plan_options(self) -> dict[str, object]:
        case = self.case
        return {"cu_seqlens": self.cu_seqlens, "shared_memory": case.shared, "capacity": case.capacity,
                "drop": case.drop, "mask": self.mask}  # fmt: skip

    def call(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ops.mom_gated_delta_rule(
            **self.tensors, indices=self.indices, num_memories=self.case.M, output_final_state=True,
            use_qk_l2norm_in_kernel=self.case.l2norm, **self.plan_options(),
        )  # fmt: skip

    def kept(self) -> torch.Tensor:
        """[B, T, J]: the choices that no capacity, mask or offset drops, counted by hand."""
        case = self.case
        bounds = [(b * case.T, (b + 1) * case.T) for b in range(case.B)]
        if self.cu_seqlens is not None:
            bounds = list(zip(self.cu_seqlens.tolist(), self.cu_seqlens.tolist()[1:], strict=False))
        real = [True] * (case.B * case.T) if self.mask is None else self.mask.flatten().tolist()
        keep = torch.zeros(case.B * case.T, case.k + case.shared, dtype=torch.bool)
        chosen = self.indices.flatten(0, 1).tolist()
        for begin, end in bounds:
            for m in range(case.M):
                seen = [(t, j) for t in range(begin, end) for j in range(case.k) if real[t] and chosen[t][j] == m]
                if case.capacity is not None:
                    size = min(case.capacity, len(seen))
                    seen = seen[len(seen) - size :] if case.drop == "oldest" else seen[:size]
                for t, j in seen:
                    keep[t, j] = True
            if case.shared:
                keep[begin:end, case.k] = torch.tensor(real[begin:end], dtype=torch.bool)
        return keep.view(case.B, case.T, -1)


def make_inputs(case: Case, requires_grad: bool = True, seed: int = 1234) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, per = case.B, case.T, (case.k + case.shared,) if case.per_choice else ()
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    q, k = (normal(B, T, *per, case.H, case.K) for _ in range(2))
    if not case.l2norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    tensors = {
        "q": q.to(case.dtype),
        "k": k.to(case.dtype),
        "v": normal(B, T, *per, case.HV, case.V).to(case.dtype),
        "g": F.logsigmoid(normal(B, T, *per, case.HV) + 3).to(wide),
        "beta": normal(B, T, *per, case.HV).sigmoid().to(wide),
        "weights": normal(B, T, case.k).softmax(-1).to(wide),
        "initial_state": normal(case.N, case.M + case.shared, case.HV, case.K, case.V).to(wide),
    }
    for x in tensors.values():
        x.requires_grad_(requires_grad)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0))
    mask = torch.rand(B, T, generator=generator) > 0.2 if case.masked else None
    return Inputs(
        case, tensors, choices(case, generator), mask, cu_seqlens,
        normal(B, T, case.HV, case.V).to(case.dtype), normal(*tensors["initial_state"].shape).to(wide),
    )  # fmt: skip


def results(outputs: tuple[torch.Tensor, ...], tensors: dict[str, torch.Tensor], inputs: Inputs) -> dict:
    """Outputs and gradients by name."""
    d = [y.to(x.dtype) for x, y in zip(outputs, (inputs.d_o, inputs.d_final), strict=True)]
    grads = torch.autograd.grad(outputs, list(tensors.values()), d, materialize_grads=True)
    named = {"o": outputs[0].detach(), "final_state": outputs[1].detach()}
    return named | {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}


def oracle(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every memory run densely over all tokens in float64, write and decay masked where it is not chosen."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.tensors.items()}
    outputs = naive_mom_gated_delta_rule(
        **exact, indices=inputs.indices, num_memories=inputs.case.M, use_qk_l2norm_in_kernel=inputs.case.l2norm,
        cu_seqlens=inputs.cu_seqlens, shared_memory=inputs.case.shared, keep=inputs.kept(),
    )  # fmt: skip
    return results(outputs, exact, inputs)


def yardstick(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Gather, the chunked form, and the weighted sum in plain PyTorch, in the dtype of the case."""
    case, x = inputs.case, {name: y.detach().requires_grad_() for name, y in inputs.tensors.items()}
    J, R = case.k + case.shared, case.B * case.T
    plan = ops.route_plan(inputs.indices, case.M, **inputs.plan_options())
    rows = plan.rows[: int(plan.cu_seqlens[-1])].long()

    def gathered(y: torch.Tensor) -> torch.Tensor:
        if not case.per_choice:
            y = y.unsqueeze(2).expand(-1, -1, J, *y.shape[2:])
        return y.movedim(2, 0).reshape(J * R, *y.shape[3:])[rows][None]

    o, state = chunked_in_plain_torch(
        *(gathered(x[name]) for name in ("q", "k", "v", "g", "beta")), x["initial_state"].flatten(0, 1), None, True,
        plan.cu_seqlens, case.l2norm, False,
    )  # fmt: skip
    weights = torch.cat([x["weights"], torch.ones(case.B, case.T, 1, dtype=x["weights"].dtype)], -1)[..., :J]
    weights = weights.movedim(2, 0).reshape(-1)[rows].to(case.dtype)
    out = torch.zeros(R, case.HV, case.V, dtype=case.dtype).index_add(0, rows % R, weights[:, None, None] * o[0])
    return results((out.view(case.B, case.T, case.HV, case.V), state.view_as(x["initial_state"])), x, inputs)


def check(case: Case) -> None:
    """Outputs and gradients against the tolerance rule."""
    inputs = make_inputs(case)
    actual = results(inputs.call(), inputs.tensors, inputs)
    want = oracle(inputs)
    plain = dict.fromkeys(want) if case.dtype == torch.float64 else yardstick(inputs)
    failures = []
    for name, value in actual.items():
        gradient = name.startswith("d")
        bound = HALF[case.dtype][gradient] if case.dtype in HALF else None
        try:
            assert_accurate(
                value, want[name], plain[name], name, dtype=case.dtype, relative_rms=bound, gradient=gradient
            )
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)
