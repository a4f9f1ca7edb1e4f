"""Operators of segment compression beside PyTorch: one process, interleaved, results compared first. With
REMORA_BACKEND=sim, counts of the simulated CUDA kernels instead:

  requested   bytes that the lanes of loads and stores name
  touched     distinct 32-byte sectors of each launch, summed: device bytes if every launch's cache is ideal and cold
  compulsory  inputs of the pass and its outputs, once
  useful      FLOPs of the products of rows with the keys that they see
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remora import _ext, ops

from . import report
from .cases import relative_rms
from .cpu import Run, interleave, quantile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


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
        """Masked attention over the summaries and all tokens."""
        token = torch.arange(self.T)
        mask = torch.arange(self.T // self.stride) < (token // self.stride)[:, None]
        mask = torch.cat([mask, torch.eye(self.T, dtype=torch.bool)], 1) if self.own else mask
        bias = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, -torch.inf)
        bias[: 0 if self.own else self.stride] = 0  # rows that see nothing; they are not compared

        def run(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            keys, values = (torch.cat([k, own[0]], 1), torch.cat([v, own[1]], 1)) if own else (k, v)
            heads = (x.transpose(1, 2) for x in (q, keys, values))
            o = F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=self.Hk != self.H)
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


CASES: dict[str, Callable[[], dict[str, Run]]] = {
    f"prefix_attention {'fwd+bwd' if backward else 'fwd'} {name} {'scout' if own else 'prefix'}": (
        lambda own=own, dtype=dtype, backward=backward: Prefix(own=own, dtype=dtype).runs(backward)
    )
    for own in (True, False)
    for name, dtype in DTYPES.items()
    for backward in (False, True)
}


def check(runs: dict[str, Run], case: str) -> None:
    want = runs["remora"]()
    for name, run in runs.items():
        for output, tensor in run().items():
            error = relative_rms(tensor, want[output])
            if not error <= TOLERANCE[tensor.dtype]:
                raise SystemExit(f"{case}: {output} of {name} differs from ours, relative RMS {error:.1e}")


def peak(case: str, name: str) -> float:
    """MiB that a call adds to the memory of a process of its own."""
    command = [sys.executable, "-m", "bench", "segment", "--peak-of", case, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(case: str, name: str) -> None:
    run = CASES[case]()[name]

    def status(field: str) -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts over
    before = status("VmRSS")
    run()
    print((status("VmHWM") - before) / 1024)


def time_cases(o: argparse.Namespace) -> dict[str, Any]:
    measured = {}
    for case, make in CASES.items():
        if not set(o.cases.split()) <= set(case.split()):
            continue
        runs = make()
        check(runs, case)
        times = interleave(runs, o.budget)
        rows = []
        for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
            ratio = statistics.median(b / a for a, b in zip(times["remora"], values, strict=True))
            memory = f"{peak(case, name):.1f}" if o.memory else ""
            rows.append([name, f"{statistics.median(values) * 1e3:.2f}", f"{quantile(values, 0.2) * 1e3:.2f}",
                         f"{quantile(values, 0.8) * 1e3:.2f}", len(values), f"{ratio:.2f}", memory])  # fmt: skip
        measured[case] = {"seconds": times, "rows": rows}
        header = ["implementation", "ms", "p20", "p80", "n", "times ours", "MiB added"]
        print(f"\n{case}\n{report.table(rows, header)}", flush=True)
    return measured


def count_cases() -> dict[str, Any]:
    """Counters of a shape small enough to simulate."""
    from remora.testing import sim

    from .counters import flatten, mma

    counted = {}
    for shape in (Prefix(1024, 4, 4, dtype=torch.bfloat16), Prefix(1024, 8, 2, dtype=torch.bfloat16)):
        inputs = shape.inputs()
        rows = []
        for backward in (False, True):
            o = shape.ours(*inputs) if backward else inputs[0]
            size = sum(t.numel() * t.element_size() for t in (o, *inputs)) + o.numel() // shape.D * 4
            compulsory = size + sum(t.numel() * t.element_size() for t in (o, *inputs)) * backward
            sim.reset_stats()
            with sim.options(memory_stats=1):
                if backward:
                    torch.autograd.grad(o, inputs, torch.ones_like(o))
                else:
                    with torch.no_grad():
                        shape.ours(*inputs)
            stats = {name: flatten(s) for name, s in sim.stats().items()}
            total: dict[str, float] = {}
            for c in stats.values():
                for name, n in c.items():
                    total[name] = total.get(name, 0) + n
            for kernel, c in ({**stats, "all": total}).items():
                waves = c["shared_load_wavefronts"] + c["shared_store_wavefronts"]
                excess = c["shared_load_excess"] + c["shared_store_excess"]
                sectors = c["load_sectors"] + c["store_sectors"]
                ideal = c["load_ideal_sectors"] + c["store_ideal_sectors"]
                rows.append([
                    "bwd" if backward else "fwd", kernel,
                    f"{(c['load_touched'] + c['store_touched']) / compulsory:.2f}",
                    f"{(c['load_bytes'] + c['store_bytes']) / compulsory:.2f}",
                    f"{sectors / max(1, ideal):.2f}",
                    f"{100 * excess / max(1, waves):.1f}",
                    f"{mma(c) / shape.useful(backward):.2f}",
                    f"{c['warp_instructions'] / 1e3:.0f}",
                ])  # fmt: skip
        header = ["pass", "kernel", "touched", "requested", "sectors", "conflicts %", "FLOP / useful", "k instructions"]
        title = f"prefix_attention B=1 T={shape.T} H={shape.H} Hk={shape.Hk} D={shape.D} stride={shape.stride} bf16"
        print(f"\n{title}, over compulsory\n{report.table(rows, header)}", flush=True)
        counted[title] = rows
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
        report.save(o.json, {"kind": "measured", "host": host, "cases": time_cases(o)})
    return 0
