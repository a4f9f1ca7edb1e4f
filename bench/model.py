"""Modelled times of our CUDA kernels on an H200, beside flash-linear-attention's for the same work. Never a
measurement.

What the launch functions launch is recorded, the control flow of every warp worked out from its SASS, and one
multiprocessor
simulated event by event (bench/timemodel). Expect measured times at +0 to +40 % of the modelled ones; believe a
difference of
15 % between variants of one kernel, of 35 to 40 % between designs that move work across kernels, and nothing smaller.
"""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

from . import launches, report
from .timemodel import fla, kernel, machine

BAND = "modelled, +0..+40 %"
SHAPES = ((64, 64), (8, 8))  # H, HV at B=1, T=32768, D=128


def memset_seconds(m: machine.Machine, size: int) -> float:
    return m.launch + max(size / m.dram * min(1.0, max(0.0, (size - m.l2_bytes) / m.l2_bytes)), size / m.l2_bw)


def share(stats: dict[str, Any], cycles: float) -> str:
    """What the cycles went to: pipes busy, then the waits of all warps."""
    warps = len(stats["why_of"])
    busy = {
        "issue": stats["issued"] / 4,
        "tensor": stats["tensor_busy"],
        "shared": stats["lsu_busy"],
        "memory": stats["mem_busy"],
    }
    total = sum(stats["why"].values())
    waits = (
        ", ".join(f"{k} {100 * v / total:.0f}" for k, v in list(stats["why"].items())[:4]) if total and warps else ""
    )
    return "busy " + "/".join(f"{k} {100 * v / cycles:.0f}" for k, v in busy.items()) + "; waits " + waits


def ours(
    m: machine.Machine, recorder: launches.Recorder, mode: str, s: launches.Shape, verbose: bool
) -> list[dict[str, Any]]:
    rows = []
    for x in recorder.record(mode, s):
        if x.kernel == "memset":
            rows.append(
                {"kernel": "memset", "grid": 1, "seconds": memset_seconds(m, x.smem), "where": "", "per_iteration": 0.0}
            )
            continue
        k = kernel.load(x.cubin, x.kernel)
        launch = kernel.Launch(x.grid, x.block, x.params, x.smem)
        r = kernel.model(m, k, launch)
        if verbose:
            print(kernel.report(m, k, launch, r) + "\n", flush=True)
        tensor = sum(r.counts[op] for op in ("HMMA", "HGMMA"))
        rows.append(
            {
                "kernel": x.kernel,
                "grid": math.prod(x.grid),
                "registers": k.regs,
                "stack": k.stack,
                "smem": x.smem + k.static_smem,
                "seconds": r.seconds,
                "per_iteration": r.per_iteration,
                "tensor_instructions_per_cta": tensor,
                "instructions_per_cta": sum(r.counts.values()),
                "where": share(r.stats, r.cycles),
                "assumed_branches": sorted({hex(a) for t in r.traces for a in t.assumed}),
            }
        )
    return rows


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(
        prog="python -m bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--T", type=int, default=32768)
    ap.add_argument(
        "--heads", type=int, nargs="*", default=[hv for _, hv in SHAPES], help="value heads; as many key heads"
    )
    ap.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    ap.add_argument(
        "--modes",
        nargs="*",
        default=["fwd", "fwd_train", "bwd"],
        choices=("fwd", "fwd_train", "bwd", "step"),
        help="fwd_train saves states for the backward pass",
    )
    ap.add_argument("--machine", choices=("h200", "h100"), default="h200")
    ap.add_argument("--verbose", action="store_true", help="where every role's cycles went")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    m = {"h200": machine.H200, "h100": machine.H100}[o.machine]
    from .resources import demangle

    recorder = launches.Recorder(o.dtype)
    document: dict[str, Any] = {"kind": BAND, "commit": report.commit(), "machine": m.name, "results": []}
    summary: list[Sequence[Any]] = []
    for heads in o.heads:
        for mode in o.modes:
            start = time.time()
            rows = ours(m, recorder, mode, launches.Shape(1, o.T, heads, heads, 128, o.dtype), o.verbose)
            names = demangle([r["kernel"] for r in rows])
            total = sum(r["seconds"] for r in rows) + m.graph_gap * len(rows)
            direction = {"fwd": "forward", "fwd_train": "forward", "bwd": "backward"}.get(mode)
            peer = (
                fla.total(m, direction, heads, heads, [o.T])
                if direction and o.dtype == "bf16" and fla.available()
                else None
            )
            print(
                f"\n{mode} B=1 T={o.T} H=HV={heads} K=V=128 {o.dtype}: {total * 1e3:.3f} ms ({BAND}) on {m.name}; {time.time() - start:.0f} s"  # noqa: E501
            )
            print(
                report.table(
                    [
                        [
                            names[r["kernel"]],
                            r["grid"],
                            f"{r['seconds'] * 1e6:.0f}",
                            f"{r['per_iteration']:.0f}",
                            r["where"],
                        ]
                        for r in rows
                    ],
                    ["kernel", "CTAs", "us", "cycles/iteration", "percent"],
                )
            )
            parts = fla.parts(m, direction, heads, heads, [o.T]) if peer and direction else {}
            if peer:
                print(
                    "fla 0.5.1: "
                    + ", ".join(f"{k} {v * 1e6:.0f}" for k, v in parts.items())
                    + f" us; {peer * 1e3:.3f} ms ({BAND})"
                )
            summary.append(
                [
                    mode,
                    heads,
                    f"{total * 1e3:.3f}",
                    f"{peer * 1e3:.3f}" if peer else "-",
                    f"{total / peer:.2f}" if peer else "-",
                ]
            )
            document["results"].append(
                {
                    "mode": mode,
                    "heads": heads,
                    "T": o.T,
                    "seconds": total,
                    "kernels": rows,
                    "fla_seconds": peer,
                    "fla_kernels": parts,
                }
            )
    print(
        "\n"
        + report.table(summary, ["mode", "heads", "ours, ms", "fla, ms", "ours/fla"])
        + f"\n({BAND}; H200, T={o.T}, K=V=128)"
    )
    if not fla.available():
        print(
            f"fla is absent: no cubins in {fla.CUBINS}; make them with `python -m bench.timemodel.fla_cubins` (see README.md)"  # noqa: E501
        )
    report.save(o.json, document)
    return 0
