"""CPU times of segment pooling and vector quantization beside plain torch and beside a copy of their inputs, in one
process, interleaved.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from remora import ops

from . import report
from .cases import DTYPES
from .cpu import Run, compare

TOLERANCE = {"fp32": 1e-5, "bf16": 1.2e-2}
CODE_CASES = ("assign", "means")
CASES = {  # mode, size, stride, dual
    "mean 4": ("mean", 4, 4, False),
    "max 4": ("max", 4, 4, False),
    "softmax 128": ("softmax", 128, 128, False),
    "softmax 4 dual": ("softmax", 4, 4, True),
    "mean 32/16": ("mean", 32, 16, False),
    "last 10": ("last", 10, 10, False),
}
WITH_LOGITS = ("softmax", "weighted")


def with_torch(
    x: Tensor, gate: Tensor | None, bias: Tensor | None, mode: str, size: int, stride: int, dual: bool
) -> Tensor:
    """What one writes without an operator: windows as a view, then torch's reductions in float32."""

    def windows(t: Tensor) -> Tensor:
        return t.unfold(1, size, stride).mT  # [B, S, size, D]

    if mode == "last":
        return x[:, size - 1 :: stride]
    values = windows(x).float()
    if mode == "mean":
        return values.mean(2).to(x.dtype)
    if mode == "max":
        return values.max(2).values.to(x.dtype)
    assert gate is not None
    assert bias is not None
    logits = windows(gate).float() + bias
    if dual:
        D = x.shape[2] // 2
        before = torch.nn.functional.pad(logits[:, :-1, :, :D], (0, 0, 0, 0, 1, 0), value=-torch.inf)
        logits = torch.cat([before, logits[..., D:]], 2)
        values = torch.cat([torch.nn.functional.pad(values[:, :-1, :, :D], (0, 0, 0, 0, 1, 0)), values[..., D:]], 2)
    return (logits.softmax(2) * values).sum(2).to(x.dtype)


def make_runs(case: str, dtype: str, tokens: int, width: int, backward: bool) -> dict[str, Run]:
    mode, size, stride, dual = CASES[case]
    rng = torch.Generator().manual_seed(0)
    channels = 2 * width if dual else width
    x = torch.randn(1, tokens, channels, generator=rng).to(DTYPES[dtype]).requires_grad_(backward)
    gate = bias = None
    if mode in WITH_LOGITS:
        gate = torch.randn(1, tokens, channels, generator=rng).to(x.dtype).requires_grad_(backward)
        bias = torch.randn(size, channels, generator=rng).requires_grad_(backward)
    leaves = [t for t in (x, gate, bias) if t is not None]
    rows = (tokens - size) // stride + 1
    dy = torch.randn(1, rows, width, generator=rng).to(x.dtype)

    def finish(y: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, leaves, dy) if backward else ()
        return {"y": y, **{f"d{i}": g for i, g in enumerate(grads)}}

    def ours() -> dict[str, Tensor]:
        options: Any = {"gate": gate, "slot_bias": bias} if gate is not None else {}
        return finish(ops.segment_pool(x, size, stride, mode, dual=dual, **options))  # type: ignore[arg-type]

    def peer() -> dict[str, Tensor]:
        return finish(with_torch(x, gate, bias, mode, size, stride, dual))

    def copy() -> dict[str, Tensor]:
        return {str(i): t.detach().clone() for i, t in enumerate(leaves)}

    return {"remora": ours, "torch": peer, "copy of the inputs": copy}


def make_code_runs(
    case: str, dtype: str, tokens: int, width: int, backward: bool, codes: int = 512, channels: int = 128
) -> dict[str, Run]:
    """Of nearest codes, and of running means over chunks of 512 tokens."""
    heads = width // channels
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, heads, tokens, channels, generator=rng).to(DTYPES[dtype]).requires_grad_(backward)
    codebook = torch.randn(heads, codes, channels, generator=rng).to(x.dtype)
    idx = torch.randint(codes, (1, heads, tokens), generator=rng, dtype=torch.int32)

    def copy() -> dict[str, Tensor]:
        return {"x": x.detach().clone()}

    if case == "assign":

        def by_products() -> dict[str, Tensor]:
            scores = codebook.float().square().sum(-1)[:, None] / 2 - (x[0] @ codebook.mT).float()
            return {"nearest": scores.argmin(-1)}  # not compared: near ties differ

        return {
            "remora": lambda: {"idx": ops.vq_assign(x, codebook)[0]},
            "torch": by_products,
            "copy of the inputs": copy,
        }

    def one_hot_means() -> Tensor:
        one_hot = torch.nn.functional.one_hot(idx.long(), codes).to(x.dtype).unflatten(2, (-1, 512))
        sums = (one_hot.mT @ x.unflatten(2, (-1, 512))).float()
        before = torch.nn.functional.pad(sums.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        count = torch.nn.functional.pad(one_hot.float().sum(3).cumsum(2), (0, 0, 1, 0))[:, :, :-1]
        return (before / count.clamp(min=1)[..., None]).to(x.dtype)

    d_mean = torch.randn(1, heads, tokens // 512, codes, channels, generator=rng).to(x.dtype)

    def finish(mean: Tensor) -> dict[str, Tensor]:
        return {"mean": mean, **({"dv": torch.autograd.grad(mean, x, d_mean)[0]} if backward else {})}

    return {
        "remora": lambda: finish(ops.code_prefix_state(idx, x, codes, 512)[1]),
        "torch": lambda: finish(one_hot_means()),
        "copy of the inputs": copy,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench segment", description=__doc__)
    parser.add_argument("--cases", default="", help="words of the case's name, for example 'softmax 4 bf16 fwd'")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of samples per case")
    parser.add_argument("--json", help="write everything here")
    o = parser.parse_args(argv)
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    makers = {
        f"{case} {dtype} {'fwd+bwd' if backward else 'fwd'}": partial(
            make_code_runs if case in CODE_CASES else make_runs, case, dtype, o.tokens, o.width, backward
        )
        for case in (*CASES, *CODE_CASES)
        for dtype in DTYPES
        for backward in (False, True)
        if not (case == "assign" and backward)
    }
    print(f"segment_pool, T={o.tokens} D={o.width}; codes: H={o.width // 128} D=128 S=512")
    measured = compare(makers, o.cases, o.budget, TOLERANCE)
    report.save(o.json, {"kind": "measured", "host": host, "cases": measured})
    return 0
