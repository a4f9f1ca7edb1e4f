"""Operators of segment compression beside PyTorch: one process, interleaved, results compared first. With
REMORA_BACKEND=sim, counts of the simulated CUDA kernels instead:

  requested   bytes that the lanes of loads and stores name
  touched     distinct 32-byte sectors of each launch, summed: device bytes if every launch's cache is ideal and cold
  compulsory  inputs of the pass and its outputs, once
  useful      FLOPs of the products of rows with the keys that they see
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remora import _ext, ops

from . import report
from .counters import add, count, derived
from .cpu import Run, compare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
COLUMNS = (
    "touched / compulsory", "requested / compulsory", "sectors / least", "bank conflicts, % of wavefronts",
    "tensor-core FLOP / useful", "warp instructions, thousands",
)  # fmt: skip


@dataclass(frozen=True)
class Prefix:
    """Shape of a call of prefix attention. With `own`, SCOUT's rule; else summaries alone, seen once they are whole."""

    T: int = 4096
    H: int = 8
    Hk: int = 8
    D: int = 64
    stride: int = 10
    own: bool = True
    dtype: torch.dtype = torch.float32

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, rows: int) -> Tensor:
            return torch.randn(1, rows, heads, self.D, generator=generator).to(self.dtype).requires_grad_()

        S = self.T // self.stride
        keys = [normal(self.Hk, S) for _ in range(2)]
        return [normal(self.H, self.T), *keys, *(normal(self.Hk, self.T) for _ in range(2 * self.own))]

    def ours(self, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        k_self, v_self = own if own else (None, None)
        return ops.prefix_attention(q, k, v, stride=self.stride, offset=1, k_self=k_self, v_self=v_self)[0]

    def sdpa(self) -> Callable[..., Tensor]:
        """Masked attention over the summaries and all tokens. The mask is made by the first call, and not timed."""

        @cache
        def mask() -> Tensor:
            seen = torch.arange(self.T // self.stride) < (torch.arange(self.T) // self.stride)[:, None]
            seen = torch.cat([seen, torch.eye(self.T, dtype=torch.bool)], 1) if self.own else seen
            bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
            bias[: 0 if self.own else self.stride] = 0  # rows that see nothing; they are not compared
            return bias

        def run(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            keys, values = (torch.cat([k, own[0]], 1), torch.cat([v, own[1]], 1)) if own else (k, v)
            heads = (x.transpose(1, 2) for x in (q, keys, values))
            o = F.scaled_dot_product_attention(*heads, attn_mask=mask(), enable_gqa=self.Hk != self.H)
            return o.transpose(1, 2)

        return run

    def eager(self) -> Callable[..., Tensor]:
        """Scores of all summaries, then softmax: [B, H, T, S] numbers."""
        hidden = torch.arange(self.T // self.stride) >= (torch.arange(self.T) // self.stride)[:, None]
        hidden[: 0 if self.own else self.stride] = False

        def run(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            group = self.H // self.Hk
            q, k, v, *own = (x.transpose(1, 2) for x in (q, *(y.repeat_interleave(group, 2) for y in (k, v, *own))))
            scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf)
            if not own:
                return ((scores * self.D**-0.5).softmax(-1) @ v).transpose(1, 2)
            scores = torch.cat([scores, (q * own[0]).sum(-1, keepdim=True)], -1)
            weights = (scores * self.D**-0.5).softmax(-1)
            return (weights[..., :-1] @ v + weights[..., -1:] * own[1]).transpose(1, 2)

        return run

    def runs(self, backward: bool) -> dict[str, Run]:
        inputs = self.inputs()
        d_o = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        if not self.own:
            d_o[:, : self.stride] = 0

        def run(function: Callable[..., Tensor]) -> Run:
            def call() -> dict[str, Tensor]:
                if not backward:
                    with torch.no_grad():
                        return {"o": function(*inputs)[:, self.stride :]}
                o = function(*inputs)
                grads = torch.autograd.grad(o, inputs, d_o)
                return {"o": o.detach()[:, self.stride :], **{f"d{i}": g for i, g in enumerate(grads)}}

            return call

        return {
            "remora": run(self.ours),
            "torch SDPA with a mask": run(self.sdpa()),
            "torch eager": run(self.eager()),
        }

    def useful(self, backward: bool) -> float:
        seen = sum(t // self.stride for t in range(self.T))
        return (10 if backward else 4) * seen * self.H * self.D

    def count(self, backward: bool) -> dict[str, dict[str, float]]:
        """The figures of counters.derived for each kernel in the simulator, and for all of them."""
        inputs = self.inputs()
        o = self.ours(*inputs)
        with torch.no_grad():
            kernels = count(
                (lambda: torch.autograd.grad(o, inputs, torch.ones_like(o))) if backward else lambda: self.ours(*inputs)
            )
        # backward reads what the forward pass read and wrote, and d_o, and writes the gradients
        tensors = sum(t.numel() * t.element_size() for t in (o, *inputs)) * (2 if backward else 1)
        compulsory, useful = tensors + o.numel() // self.D * 4, self.useful(backward)
        kernels["all"] = add(*kernels.values())
        return {name: derived(c, compulsory, useful) for name, c in kernels.items()}


COUNTED = (Prefix(1024, 4, 4, dtype=torch.bfloat16), Prefix(1024, 8, 2, dtype=torch.bfloat16))
CASES = {
    f"prefix_attention {'fwd+bwd' if backward else 'fwd'} {name} {'scout' if own else 'prefix'}": (
        Prefix(own=own, dtype=dtype),
        backward,
    )
    for own in (True, False)
    for name, dtype in DTYPES.items()
    for backward in (False, True)
}


def peak(case: str, name: str) -> str:
    """MiB that the first call at this size adds to the memory of a process of its own, its results among them."""
    command = [sys.executable, "-m", "bench", "prefix", "--peak-of", case, name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def print_peak(case: str, name: str) -> None:
    shape, backward = CASES[case]
    replace(shape, T=64).runs(backward)[name]()  # code and threads are there
    run = shape.runs(backward)[name]

    def status(field: str) -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts over
    before = status("VmRSS")
    run()
    print(f"{(status('VmHWM') - before) / 1024:.1f}")


def count_cases() -> dict[str, Any]:
    """Counters of shapes small enough to simulate."""
    counted = {}
    for shape in COUNTED:
        title = f"prefix_attention B=1 T={shape.T} H={shape.H} Hk={shape.Hk} D={shape.D} stride={shape.stride} bf16"
        counted[title] = {"bwd" if b else "fwd": shape.count(b) for b in (False, True)}
        rows = [
            [direction, kernel.split("<")[0].split("::")[-1], *(f"{figures[name]:.2f}" for name in COLUMNS)]
            for direction, kernels in counted[title].items()
            for kernel, figures in kernels.items()
        ]
        print(f"\n{title}\n{report.table(rows, ['pass', 'kernel', *COLUMNS])}", flush=True)
    return counted


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(
        prog="python -m bench prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--cases", default="", help="words that the case's name must contain, for example 'fwd fp32'")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--budget", type=float, default=10.0, help="seconds of samples per case")
    ap.add_argument("--memory", action="store_true", help="also the memory that a call adds, in a process each")
    ap.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    torch.set_num_threads(o.threads)
    if o.peak_of:
        print_peak(*o.peak_of)
        return 0
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    if _ext.HOST_BACKEND == "sim":
        report.save(o.json, {"kind": "simulated", "host": host, "counts": count_cases()})
    else:
        memory = {"MiB added": peak} if o.memory else {}
        measured = compare({n: partial(s.runs, b) for n, (s, b) in CASES.items()}, o.cases, o.budget, TOLERANCE, memory)
        report.save(o.json, {"kind": "measured", "host": host, "cases": measured})
    return 0
