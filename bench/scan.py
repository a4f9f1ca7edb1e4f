"""Selective scan on the CPU beside jax.lax.scan, in one process, interleaved; results are compared before
anything is timed. With --counters, counts of the CUDA kernels in the simulator instead: counts, not times.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import report
from .cases import DTYPES, TOLERANCE, Wrong, relative_rms
from .cpu import interleave, machine_limits, quantile

Run = Callable[[], tuple[Tensor, ...]]

# Least work of a state update, in multiply-adds: a power of two is a reduction of its argument and a polynomial of
# degree 5, counted as seven.
UPDATE_FORWARD, UPDATE_BACKWARD = 7 + 4, 7 + 3 + 7


@dataclass(frozen=True)
class Case:
    mode: str  # fwd or fwd+bwd
    dtype: str
    B: int = 1
    T: int = 2048
    D: int = 1024
    N: int = 16

    @property
    def name(self) -> str:
        return f"{self.mode} {self.dtype} B{self.B} T{self.T} D{self.D} N{self.N}"

    def updates(self) -> int:
        return self.B * self.T * self.D * self.N

    def flops(self) -> float:
        """A forward pass computes every decay once; a backward pass once more, since only some states are saved."""
        return 2.0 * self.updates() * (UPDATE_FORWARD + (UPDATE_BACKWARD if self.mode == "fwd+bwd" else 0))

    def bytes(self) -> float:
        """u, delta, z, B and C once, the output once; backward these and its gradient, and the gradients."""
        element = 4 if self.dtype == "fp32" else 2
        forward = 4 * self.D + 2 * self.N
        return element * self.B * self.T * (forward + (7 * self.D + 4 * self.N if self.mode == "fwd+bwd" else 0))


CASES = [
    Case("fwd", "fp32"), Case("fwd+bwd", "fp32"), Case("fwd", "bf16"), Case("fwd+bwd", "bf16"),
]  # fmt: skip
COUNTED = [Case("fwd+bwd", "bf16", T=256, D=64), Case("fwd+bwd", "bf16", T=256, D=2048)]
NAMES = ("u", "delta", "A", "B", "C", "D", "z")


@dataclass
class Inputs:
    """As a layer gives them: channels in rows of tokens, steps about softplus(-4)."""

    case: Case
    leaves: list[Tensor]  # in the order of NAMES
    d_out: Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DTYPES[case.dtype])

    B, T, D, N = case.B, case.T, case.D, case.N
    rates = -torch.arange(1.0, N + 1).repeat(D, 1)
    leaves = [normal(B, D, T), normal(B, D, T) - 4, rates, normal(B, N, T), normal(B, N, T), torch.ones(D),
              normal(B, D, T)]  # fmt: skip
    return Inputs(case, leaves, normal(B, D, T))


def differentiated(x: Inputs, f: Callable[..., Tensor]) -> Run:
    backward = x.case.mode == "fwd+bwd"
    leaves = [t.detach().requires_grad_(backward) for t in x.leaves]

    def run() -> tuple[Tensor, ...]:
        out = f(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, x.d_out)) if backward else (out,)

    return run


def remora(x: Inputs) -> Run:
    from remora.ops import selective_scan

    return differentiated(x, lambda *leaves: selective_scan(*leaves, delta_softplus=True))


def naive(x: Inputs) -> Run:
    """The definition, token by token in torch: what the others are compared with on a small case."""
    from remora.ops.recurrence.selective_scan.naive import naive_selective_scan

    def f(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return naive_selective_scan(u, delta, A, B[:, None], C[:, None], D, z, None, True, None)[0]

    return differentiated(x, f)


def jax_scan(x: Inputs) -> Run:
    """jax.lax.scan over tokens, compiled by XLA, in the form whose forward pass is the fastest of several: states
    [B, N, D], outputs by contraction. Its inputs lie as it walks them, tokens first; they are brought there outside of
    the call.
    """
    import jax
    from jax import numpy as jnp

    if x.case.dtype != "fp32":
        raise ImportError("measured in fp32")

    def f(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any) -> Any:  # [T, B, D], [D, N], [T, B, N]
        def step(state: Any, token: Any) -> Any:
            u, dt, b, c = token
            state = jnp.exp(dt[:, None] * A.T) * state + (dt * u)[:, None] * b[..., None]
            return state, jnp.einsum("bnd,bn->bd", state, c)

        state = jnp.zeros((u.shape[1], A.shape[1], A.shape[0]), u.dtype)
        _, y = jax.lax.scan(step, state, (u, jax.nn.softplus(delta), B, C))
        return (y + D * u) * jax.nn.silu(z)

    def token_first(t: Tensor) -> Any:
        return jnp.asarray((t.permute(2, 0, 1) if t.dim() == 3 else t).contiguous().numpy())

    leaves, d_out = [token_first(t) for t in x.leaves], token_first(x.d_out)

    def back(t: Any) -> Tensor:
        t = torch.from_dlpack(t)
        return t.permute(1, 2, 0) if t.dim() == 3 else t

    if x.case.mode == "fwd":
        forward = jax.jit(f)
        return lambda: (back(forward(*leaves).block_until_ready()),)

    @jax.jit
    def both(d_out: Any, *leaves: Any) -> Any:
        out, pull = jax.vjp(f, *leaves)
        return out, *pull(d_out)

    return lambda: tuple(back(t) for t in jax.block_until_ready(both(d_out, *leaves)))


PEERS: dict[str, Callable[[Inputs], Run]] = {"remora": remora, "jax.lax.scan": jax_scan}


def check(have: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: str) -> float:
    error = max(relative_rms(a, b) for a, b in zip(have, want, strict=True))
    if not error <= TOLERANCE[dtype]:
        raise Wrong(f"relative RMS error {error:.1e}")
    return error


def gate(prepare: Callable[[Inputs], Run], case: Case) -> float:
    """Error against the definition in float64 on a small case; raises Wrong."""
    x = make_inputs(Case(case.mode, case.dtype, 2, 130, 48, case.N), seed=1)
    exact = Inputs(x.case, [t.double() for t in x.leaves], x.d_out.double())
    return check(prepare(x)(), naive(exact)(), case.dtype)


def measure(case: Case, limits: dict[str, float], budget: float, only: str) -> dict[str, Any]:
    x, runs, errors, notes = make_inputs(case), {}, {}, {}
    agreed: tuple[Tensor, ...] | None = None
    for name, prepare in PEERS.items():
        if only and name != "remora" and only not in name:
            continue
        try:
            errors[name] = gate(prepare, case)
            run = prepare(x)
            have = run()
            agreed = agreed or tuple(t.clone() for t in have)
            if case.dtype == "fp32":
                check(have, agreed, case.dtype)
            runs[name] = run
        except ImportError as e:
            notes[name] = f"absent: {e}"
        except Wrong as e:
            notes[name] = f"wrong: {e}"
    times = interleave(runs, budget)
    floor = max(case.flops() / limits["mm_fp32"], case.bytes() / max(limits["dram"], limits["cache"]))
    results = {
        name: {
            "median": statistics.median(t),
            "p20": quantile(t, 0.2),
            "p80": quantile(t, 0.8),
            "samples": len(t),
            "error": errors[name],
            "ours_over_this": statistics.median(a / b for a, b in zip(times["remora"], t, strict=True)),
        }
        for name, t in times.items()
    }
    return {"case": case.name, "floor": floor, "results": results, "notes": notes}


def show(m: dict[str, Any]) -> str:
    rows = [
        [name, f"{r['median'] * 1e3:.2f}", f"{r['p20'] * 1e3:.2f}", f"{r['p80'] * 1e3:.2f}", r["samples"],
         f"{r['median'] / m['floor']:.1f}", f"{r['ours_over_this']:.2f}", f"{r['error']:.0e}"]
        for name, r in sorted(m["results"].items(), key=lambda item: item[1]["median"])
    ]  # fmt: skip
    notes = "".join(f"\n  {name}: {why}" for name, why in m["notes"].items())
    title = f"\n{m['case']}   floor {m['floor'] * 1e3:.2f} ms\n"
    return (
        title + report.table(rows, ["implementation", "ms", "p20", "p80", "n", "x floor", "ours/this", "error"]) + notes
    )


def count(case: Case) -> str:
    from remora.testing import sim

    from . import counters

    gate(remora, case)
    run, rows = remora(make_inputs(case)), []
    with sim.options(memory_stats=1, arch=90):
        sim.reset_stats()
        run()
        for name, stats in sim.stats().items():
            c = counters.flatten(stats)
            waves, excess = (sum(c[f"shared_{kind}_{what}"] for kind in ("load", "store"))
                             for what in ("wavefronts", "excess"))  # fmt: skip
            sectors, ideal = (sum(c[f"{kind}_{what}"] for kind in ("load", "store"))
                              for what in ("sectors", "ideal_sectors"))  # fmt: skip
            rows.append([
                name.split("(")[0].replace("void ", "")[:70], int(c["ctas"]),
                f"{32 * c['warp_instructions'] / case.updates():.2f}",
                f"{32 * waves / case.updates():.2f}", f"{100 * excess / max(1, waves):.0f}",
                f"{c['load_touched'] / 1e6:.2f}", f"{c['store_touched'] / 1e6:.2f}", f"{sectors / max(1, ideal):.2f}",
            ])  # fmt: skip
    head = ["kernel", "CTAs", "warp instructions / 32 updates", "shared wavefronts / 32 updates", "bank conflicts, %",
            "MB read", "MB written", "sectors / least"]  # fmt: skip
    return f"\n{case.name}: compulsory {case.bytes() / 1e6:.2f} MB (counted)\n" + report.table(rows, head)


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench scan", description=__doc__)
    ap.add_argument("--cases", default="", help="words that the case's name must contain, for example 'fwd fp32'")
    ap.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    ap.add_argument("--budget", type=float, default=8.0, help="seconds of samples per case")
    ap.add_argument("--only", default="", help="implementations whose name contains this; ours always")
    ap.add_argument("--counters", action="store_true", help="counts of the CUDA kernels in the simulator")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if o.counters:
        if os.environ.get("REMORA_BACKEND") != "sim":
            command = [sys.executable, "-m", "bench", "scan", *argv]
            return subprocess.run(command, env={**os.environ, "REMORA_BACKEND": "sim"}, check=False).returncode
        for case in COUNTED:
            if set(o.cases.split()) <= set(case.name.split()):
                print(count(case), flush=True)
        return 0
    if o.threads:
        torch.set_num_threads(o.threads)
    limits, host = machine_limits(), report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    document: dict[str, Any] = {"kind": "measured", "host": host, "limits": limits, "cases": []}
    for case in CASES:
        if set(o.cases.split()) <= set(case.name.split()):
            document["cases"].append(measure(case, limits, o.budget, o.only))
            print(show(document["cases"][-1]), flush=True)
    print(
        "\nfloor: multiply-adds at torch.mm's rate (seven for an exponential), or bytes at copy_'s, both measured here."
    )
    report.save(o.json, document)
    return 0
