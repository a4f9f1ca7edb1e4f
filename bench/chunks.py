"""Selection of chunks and attention to chosen blocks on the CPU beside PyTorch: one process, interleaved, results
compared first. With REMORA_BACKEND=sim, counts of the CUDA kernels in the simulator instead: counts, not times.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remora import _ext, ops

from . import report
from .cases import DTYPES
from .counters import count, derived
from .cpu import compare
from .peers import Run

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
COLUMNS = (
    "touched / compulsory", "sectors / least", "tensor-core FLOP / useful", "bank conflicts, % of wavefronts",
    "warp instructions, thousands",
)  # fmt: skip


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Topk:
    """The k best of the summaries of every `stride` tokens."""

    T: int = 4096
    H: int = 8
    Hk: int = 8
    D: int = 64
    stride: int = 10
    k: int = 16
    group: str = "per_head"
    dtype: torch.dtype = torch.float32

    def runs(self) -> dict[str, Run]:
        q = normal(0, 1, self.T, self.H, self.D, dtype=self.dtype)
        k_sum = normal(1, 1, self.T // self.stride, self.Hk, self.D, dtype=self.dtype)
        seen = (torch.arange(self.T) + 1) // self.stride
        hidden = torch.arange(self.T // self.stride) >= seen[:, None, None]
        lists = {"per_head": self.H, "kv_group": self.Hk, "shared": 1}[self.group]

        def torch_topk() -> dict[str, Tensor]:
            keys = k_sum.repeat_interleave(self.H // self.Hk, 2)
            scores = torch.einsum("bthd,bshd->bths", q, keys).float() * self.D**-0.5
            scores = scores.view(1, self.T, lists, -1, scores.shape[-1]).sum(3).masked_fill(hidden, -torch.inf)
            return {"scores": scores.topk(self.k)[0].nan_to_num(neginf=0)}

        def ours() -> dict[str, Tensor]:
            scores = ops.topk_chunks(q, k_sum, self.k, stride=self.stride, group=self.group)[1]
            return {"scores": scores.nan_to_num(neginf=0)}

        def attention() -> dict[str, Tensor]:
            return {"o": ops.prefix_attention(q, k_sum, k_sum, stride=self.stride)[0]}

        runs: dict[str, Run] = {"remora": ours, "torch: scores, mask, topk": torch_topk}
        if hasattr(ops, "prefix_attention"):
            runs["prefix_attention, which it would serve"] = attention
        return runs

    def useful(self) -> float:
        return 2.0 * sum((t + 1) // self.stride for t in range(self.T)) * self.H * self.D

    def compulsory(self) -> float:
        lists = {"per_head": self.H, "kv_group": self.Hk, "shared": 1}[self.group]
        inputs = (self.T * self.H + self.T // self.stride * self.Hk) * self.D * self.dtype.itemsize
        return inputs + self.T * lists * self.k * 8


@dataclass(frozen=True)
class Gather:
    """The query's own block and n - 1 earlier ones, alike for neighbours."""

    T: int = 4096
    H: int = 8
    Hk: int = 2
    D: int = 64
    block: int = 64
    n: int = 8
    dtype: torch.dtype = torch.float32

    def lists(self) -> Tensor:
        own = torch.arange(self.T) // self.block
        scores = torch.rand(
            self.Hk, self.T // self.block, self.T // self.block, generator=torch.Generator().manual_seed(2)
        )
        later = torch.arange(self.T // self.block) >= torch.arange(self.T // self.block)[:, None]
        best = scores.masked_fill(later, -1).topk(self.n - 1)
        chosen = torch.where(best[0] >= 0, best[1], -1).movedim(0, 1)[own]  # [T, Hk, n - 1]
        return torch.cat([own[:, None, None].expand(-1, self.Hk, 1), chosen], -1)[None].int()

    def runs(self, backward: bool) -> dict[str, Run]:
        q = normal(0, 1, self.T, self.H, self.D, dtype=self.dtype).requires_grad_()
        k, v = (normal(1 + i, 1, self.T, self.Hk, self.D, dtype=self.dtype).requires_grad_() for i in range(2))
        idx = self.lists()
        d_o = normal(3, 1, self.T, self.H, self.D, dtype=self.dtype)
        blocks = torch.zeros(1, self.T, self.Hk, self.T // self.block + 1, dtype=torch.bool)
        blocks.scatter_(-1, idx.long() % (self.T // self.block + 1), True)
        mask = blocks[..., :-1].repeat_interleave(self.block, -1)
        mask = (mask & (torch.arange(self.T) <= torch.arange(self.T)[:, None, None])).transpose(1, 2)
        mask = mask.repeat_interleave(self.H // self.Hk, 1)

        def ours(*x: Tensor) -> Tensor:
            return ops.gather_attention(*x, idx, self.block)[0]

        def masked(*x: Tensor) -> Tensor:
            heads = (y.transpose(1, 2) for y in x)
            return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        def dense(*x: Tensor) -> Tensor:
            heads = (y.transpose(1, 2) for y in x)
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

        def run(f: Callable[..., Tensor], name: str = "o") -> Run:
            def call() -> dict[str, Tensor]:
                if not backward:
                    with torch.no_grad():
                        return {name: f(q, k, v)}
                o = f(q, k, v)
                grads = torch.autograd.grad(o, [q, k, v], d_o)
                return {name: o.detach(), **({f"d{i}": g for i, g in enumerate(grads)} if name == "o" else {})}

            return call

        return {
            "remora": run(ours),
            "torch SDPA with a mask": run(masked),
            "torch SDPA over all keys": run(dense, "all"),
        }

    def useful(self, backward: bool) -> float:
        token = torch.arange(self.T)
        own = token // self.block
        full = (self.lists()[0, :, 0, 1:] >= 0).sum(-1) * self.block
        seen = int((full + token - own * self.block + 1).sum())
        return (14.0 if backward else 4.0) * seen * self.H * self.D

    def compulsory(self, backward: bool) -> float:
        rows = self.T * (self.H + self.Hk) * self.D * self.dtype.itemsize
        return 2 * rows * (2 if backward else 1) + self.T * (self.H * 4 + self.Hk * self.n * 4)


CASES: dict[str, Callable[[], dict[str, Run]]] = {
    **{
        f"topk_chunks fwd {name} {group}": (lambda d=dtype, g=group, hk=hk: Topk(dtype=d, group=g, Hk=hk).runs())
        for name, dtype in (("fp32", DTYPES["fp32"]), ("bf16", DTYPES["bf16"]))
        for group, hk in (("per_head", 8), ("kv_group", 2))
    },
    **{
        f"gather_attention {'fwd+bwd' if backward else 'fwd'} {name}": (
            lambda d=dtype, b=backward: Gather(dtype=d).runs(b)
        )
        for name, dtype in (("fp32", DTYPES["fp32"]), ("bf16", DTYPES["bf16"]))
        for backward in (False, True)
    },
}


def count_cases(words: str) -> dict[str, Any]:
    """Counters of shapes small enough to simulate."""
    bf16 = DTYPES["bf16"]
    small = Gather(T=512, H=8, Hk=1, block=64, n=4, D=128, dtype=bf16)
    cases: list[tuple[str, Run, float, float]] = []
    for topk in (Topk(T=512, H=2, Hk=2, stride=1, dtype=bf16), Topk(T=512, H=2, Hk=2, stride=1, k=64, dtype=bf16)):
        cases.append((f"topk_chunks k={topk.k}", topk.runs()["remora"], topk.useful(), topk.compulsory()))
    for shape in (small, replace(small, Hk=8)):
        for backward in (False, True):
            name = f"gather_attention H={shape.H} Hk={shape.Hk} {'fwd+bwd' if backward else 'fwd'}"
            run = shape.runs(backward)["remora"]
            useful = shape.useful(backward) + (shape.useful(False) if backward else 0)
            compulsory = shape.compulsory(backward) + (shape.compulsory(False) if backward else 0)
            cases.append((name, run, useful, compulsory))
    counted = {}
    for name, run, useful, compulsory in cases:
        if not set(words.split()) <= set(name.split()):
            continue
        kernels = count(run)
        figures = {kernel: derived(c, compulsory, useful) for kernel, c in kernels.items()}
        rows = [
            [
                kernel.split("<")[0].split("::")[-1],
                int(kernels[kernel]["ctas"]),
                *(f"{of_kernel[column]:.2f}" for column in COLUMNS),
            ]
            for kernel, of_kernel in figures.items()
        ]
        counted[name] = figures
        title = f"{name}: {useful / 1e6:.1f} MFLOP, {compulsory / 1e6:.2f} MB (counted)"
        print(f"\n{title}\n{report.table(rows, ['kernel', 'CTAs', *COLUMNS])}")
    return counted


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench chunks", description=__doc__)
    ap.add_argument("--cases", default="", help="words of the name, for example 'topk_chunks fp32'")
    ap.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    ap.add_argument("--budget", type=float, default=6.0, help="seconds of samples per case")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    if _ext.HOST_BACKEND == "sim":
        report.save(o.json, {"kind": "simulated", "host": host, "counts": count_cases(o.cases)})
    else:
        report.save(o.json, {"kind": "measured", "host": host, "cases": compare(CASES, o.cases, o.budget, TOLERANCE)})
    return 0
