"""Work counters of our CUDA kernels and of flash-linear-attention's on the same simulated device: counts, not times.

Both run on CPU tensors in the simulator, each in a process of its own: our operators with REMORA_BACKEND=sim, FLA's
host code and
Triton kernels behind a driver that hands them to the simulator. Results are compared with the recurrence in float64
before
anything is printed.

  touched     distinct 32-byte sectors of each launch, summed: device bytes if every launch's cache is ideal and cold
  requested   bytes that the lanes of loads and stores name
  compulsory  inputs of the operator once and outputs once
  sectors     per warp request, over the least that its bytes need
  conflicts   shared-memory passes lost to bank conflicts, of all passes (wgmma operands are not in them)
  useful      FLOPs of the cheapest chunked formulation, chunk 64, dense
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import report
from .cases import OPERATORS, relative_rms

CHUNK = 64
INPUTS = ("q", "k", "v", "g", "beta")
TOLERANCE = 1e-2
Counters = dict[str, float]


def forward_flops(op: str, K: int, V: int, C: int) -> float:
    if op == "simple_gla":
        return 4 * K * V + 2 * C * K + 2 * C * V
    return 6 * K * V + 4 * C * K + 4 * C * V + 2 / 3 * C * C


def backward_flops(op: str, K: int, V: int, C: int) -> float:
    if op == "simple_gla":
        return 10 * K * V + 6 * C * K + 4 * C * V
    return 16 * K * V + 12 * C * K + 10 * C * V + 2 / 3 * C * C


def flatten(stats: dict[str, Any]) -> Counters:
    """The simulator's counters of some launches of one kernel under flat names."""
    c: Counters = {
        "launches": stats["launches"],
        "ctas": stats["ctas"],
        "warp_instructions": stats["warp_instructions"],
        "seconds": stats["seconds"],
    }
    for kind in ("load", "store"):
        g, s = stats[f"global_{kind}"], stats[f"shared_{kind}"]
        c[f"{kind}_bytes"], c[f"{kind}_sectors"], c[f"{kind}_ideal_sectors"] = (
            g["bytes"],
            g["sectors"],
            g["ideal_sectors"],
        )
        c[f"{kind}_requests"], c[f"{kind}_touched"] = g["requests"], stats[f"global_{kind}_footprint"]
        c[f"shared_{kind}_wavefronts"], c[f"shared_{kind}_excess"] = s["wavefronts"], s["excess_wavefronts"]
    c |= {f"mma_flops.{kind}": n for kind, n in stats["mma_flops"].items()}
    return c | {f"inst.{name}": n for name, n in stats["warp_instructions_by_class"].items()}


def count(run: Callable[[], object], arch: int = 90) -> dict[str, Counters]:
    """Of the kernels that a call launches; needs REMORA_BACKEND=sim in the environment."""
    from remora.testing import sim

    with sim.options(memory_stats=1, arch=arch):
        sim.reset_stats()
        run()
    return {name: flatten(s) for name, s in sim.stats().items()}


def add(*rows: Counters) -> Counters:
    out: Counters = {}
    for r in rows:
        for name, n in r.items():
            out[name] = out.get(name, 0) + n
    return out


class TorchOperators(TorchDispatchMode):
    """Collects the torch operators that would be kernels of their own on a GPU; their bytes are the sizes of their
    operands.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Counters] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and "empty" not in name and not name.startswith("remora"):

            def size(t: object) -> int:
                return t.numel() * t.element_size() if isinstance(t, Tensor) else 0

            load, store = sum(map(size, args)), sum(map(size, out if isinstance(out, tuple | list) else [out]))
            if name in ("aten::zero_", "aten::fill_", "aten::zeros") or name.endswith("_like"):
                load = 0
            if load + store:
                row: Counters = {
                    "launches": 1,
                    "load_bytes": load,
                    "store_bytes": store,
                    "load_touched": load,
                    "store_touched": store,
                }
                self.rows[name] = add(self.rows.get(name, {}), row)
        return out


def make_inputs(
    B: int, T: int, H: int, HV: int, D: int, seed: int, op: str = "gated_delta_rule"
) -> tuple[dict[str, Tensor], Tensor]:
    """As a layer gives them: bf16 q, k (unit length), v, fp32 log decay and, for the gated delta rule, beta."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    q, k = (torch.nn.functional.normalize(normal(B, T, H, D), dim=-1).bfloat16() for _ in range(2))
    full = {
        "q": q,
        "k": k,
        "v": normal(B, T, HV, D).bfloat16(),
        "g": torch.nn.functional.logsigmoid(normal(B, T, HV) + 3.0),
    }
    if op == "gated_delta_rule":
        full["beta"] = normal(B, T, HV).sigmoid()
    return {n: t.requires_grad_() for n, t in full.items()}, normal(B, T, HV, D).bfloat16()


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def phases(inputs: dict[str, Tensor], do: Tensor, o: Tensor, grads: tuple[Tensor, ...]) -> dict[str, dict[str, Any]]:
    """Compulsory bytes, useful FLOPs and errors of both directions."""
    from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
    from remora.ops.recurrence.simple_gla.naive import naive_simple_gla

    op = "gated_delta_rule" if "beta" in inputs else "simple_gla"
    exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    want, _ = (naive_gated_delta_rule if op == "gated_delta_rule" else naive_simple_gla)(**exact)
    wanted = torch.autograd.grad(want, list(exact.values()), do.double())
    D, tokens = do.shape[-1], do.numel() // do.shape[-1]
    return {
        "forward": {
            "compulsory": size(*inputs.values(), o),
            "useful": tokens * forward_flops(op, D, D, CHUNK),
            "errors": {"o": relative_rms(o, want)},
        },
        "backward": {
            "compulsory": size(*inputs.values(), do, *grads),
            "useful": tokens * backward_flops(op, D, D, CHUNK),
            "errors": {f"d{n}": relative_rms(g, w) for n, g, w in zip(inputs, grads, wanted, strict=True)},
        },
    }


def ours(op: str, B: int, T: int, H: int, HV: int, D: int, arch: int, seed: int = 0) -> dict[str, Any]:
    """Runs our operator in the simulator; needs REMORA_BACKEND=sim in the environment."""
    import remora.ops as ops
    from remora.testing import sim

    inputs, do = make_inputs(B, T, H, HV, D, seed, op)
    function = ops.chunk_gated_delta_rule if op == "gated_delta_rule" else ops.chunk_simple_gla
    rows: dict[str, dict[str, Counters]] = {}

    def collect(phase: str, torch_rows: dict[str, Counters]) -> None:
        rows[phase] = {name: flatten(s) for name, s in sim.stats().items()} | torch_rows

    with sim.options(memory_stats=1, arch=arch):
        sim.reset_stats()
        with TorchOperators() as t:
            o, _ = function(*inputs.values())
        collect("forward", t.rows)
        sim.reset_stats()
        with TorchOperators() as t:
            grads = torch.autograd.grad(o, list(inputs.values()), do)
        collect("backward", t.rows)
    return document("remora", rows, phases(inputs, do, o, grads), arch)


def document(
    name: str, rows: dict[str, dict[str, Counters]], found: dict[str, dict[str, Any]], arch: int
) -> dict[str, Any]:
    return {
        "name": name,
        "arch": arch,
        "phases": {p: {**f, "kernels": rows[p], "total": add(*rows[p].values())} for p, f in found.items()},
    }


# ------------------------------------------------------------------------------------------------------------- tables


def mma(c: Counters) -> float:
    return sum(n for name, n in c.items() if name.startswith("mma_flops."))


def derived(c: Counters, compulsory: float, useful: float) -> dict[str, float]:
    """The figures that are compared."""
    waves = c.get("shared_load_wavefronts", 0) + c.get("shared_store_wavefronts", 0)
    excess = c.get("shared_load_excess", 0) + c.get("shared_store_excess", 0)
    sectors, ideal = (sum(c.get(f"{k}_{what}", 0) for k in ("load", "store")) for what in ("sectors", "ideal_sectors"))
    return {
        "launches": c["launches"],
        "touched / compulsory": (c["load_touched"] + c["store_touched"]) / compulsory,
        "requested / compulsory": (c["load_bytes"] + c["store_bytes"]) / compulsory,
        "sectors / least": sectors / max(1, ideal),
        "shared wavefronts, thousands": waves / 1e3,
        "bank conflicts, % of wavefronts": 100 * excess / max(1, waves),
        "tensor-core FLOP / useful": mma(c) / useful,
        "warp instructions, thousands": c["warp_instructions"] / 1e3,
        "CTA barriers, warps, thousands": c.get("inst.barrier", 0) / 1e3,
    }


def human(n: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(n) < 10000:
            return f"{n:.0f}{unit}" if unit == "" or n >= 100 else f"{n:.2f}{unit}"
        n /= 1000
    return f"{n:.2f}T"


COLUMNS = {
    "launch": "launches",
    "CTAs": "ctas",
    "ld bytes": "load_bytes",
    "st bytes": "store_bytes",
    "ld touched": "load_touched",
    "st touched": "store_touched",
    "smem ld": "shared_load_wavefronts",
    "excess": "shared_load_excess",
    "smem st": "shared_store_wavefronts",
    "excess ": "shared_store_excess",
    "mma FLOP": "mma",
    "warp inst": "warp_instructions",
}


def kernel_table(rows: dict[str, Counters]) -> str:
    lines = []
    for name, c in [*rows.items(), ("all", add(*rows.values()))]:
        full = {**c, "mma": mma(c)}
        lines.append([name.split("(")[0].replace("void ", "")[:90], *(human(full.get(k, 0)) for k in COLUMNS.values())])
    return report.table(lines, ["kernel", *COLUMNS])


def figures(document: dict[str, Any], phase: str) -> dict[str, float]:
    p = document["phases"][phase]
    return derived(p["total"], p["compulsory"], p["useful"]) | {"largest error": max(p["errors"].values())}


def comparison(mine: dict[str, Any], peer: dict[str, Any] | None, phase: str) -> str:
    a, b = figures(mine, phase), figures(peer, phase) if peer else {}
    rows = [[k, f"{v:.4g}", f"{b[k]:.4g}" if b else "-", f"{v / b[k]:.2f}" if b.get(k) else "-"] for k, v in a.items()]
    return report.table(rows, [phase, mine["name"], peer["name"] if peer else "peer absent", "ours/peer"])


# --------------------------------------------------------------------------------------------------------------- main


def spawn(module: str, options: Iterable[str], environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as f:
        command = [sys.executable, "-m", module, *options, "--json", f.name]
        run = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=pathlib.Path(__file__).parent.parent,
        )
        if run.returncode:
            raise RuntimeError(f"{module}: {(run.stderr or run.stdout).strip()[-1500:]}")
        result: dict[str, Any] = json.loads(pathlib.Path(f.name).read_text())
        return result


def arguments() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="python -m bench counters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("B", 1), ("T", 1024), ("H", 4), ("HV", 0), ("D", 128), ("seed", 0)):
        ap.add_argument(f"--{name}", type=int, default=value)
    ap.add_argument(
        "--arch",
        type=int,
        default=80,
        choices=(80, 90),
        help="the simulated device; FLA compiles for it, ours is PTX of compute_80",
    )
    ap.add_argument("--op", default="gated_delta_rule", choices=OPERATORS, help="the peer does the first only")
    ap.add_argument("--json", help="write everything here")
    return ap


def main(argv: list[str]) -> int:
    ap = arguments()
    ap.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    ap.add_argument("--no-peer", action="store_true", help="ours only")
    ap.add_argument(
        "--profile", action="store_true", help="print the ncu and nsys commands for a machine with a GPU, and end"
    )
    o = ap.parse_args(argv)
    if o.profile:
        from .profile import COMMANDS

        print(COMMANDS)
        return 0
    if o.worker:
        result = ours(o.op, o.B, o.T, o.H, o.HV or o.H, o.D, o.arch, o.seed)
        pathlib.Path(o.json).write_text(json.dumps(result))
        return 0
    shape = [f"--{n}={getattr(o, n)}" for n in ("B", "T", "H", "HV", "D", "arch", "seed")]
    start = time.time()
    mine = spawn("bench", ["counters", "--worker", f"--op={o.op}", *shape], {"REMORA_BACKEND": "sim"})
    peer, absent = None, ""
    if not o.no_peer and o.op == "gated_delta_rule":
        if importlib.util.find_spec("fla") is None:
            absent = (
                "flash-linear-attention is absent: pip install --no-deps flash-linear-attention==0.5.2 fla-core==0.5.2"
            )
        else:
            peer = spawn("bench.fla_counters", shape, {})
    print(
        f"{o.op}, simulated sm_{o.arch}, B={o.B} T={o.T} H={o.H} HV={o.HV or o.H} K=V={o.D} bf16; counts, not times; {time.time() - start:.0f} s"  # noqa: E501
    )
    good = True
    for phase in mine["phases"]:
        print(f"\n{comparison(mine, peer, phase)}\n")
        for d in filter(None, (mine, peer)):
            worst = max(d["phases"][phase]["errors"].values())
            good &= worst <= TOLERANCE
            print(
                f"{d['name']} {phase}, largest relative RMS error {worst:.1e}{'' if worst <= TOLERANCE else ': TOO LARGE'}"  # noqa: E501
            )
            print(kernel_table(d["phases"][phase]["kernels"]) + "\n")
    if absent:
        print(absent)
    report.save(
        o.json,
        {
            "kind": "simulated",
            "commit": report.commit(),
            "shape": vars(o),
            "ours": mine,
            "peer": peer,
            "derived": {d["name"]: {p: figures(d, p) for p in d["phases"]} for d in (mine, peer) if d},
        },
    )
    return 0 if good else 1
