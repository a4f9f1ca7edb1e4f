"""Modelled times of our CUDA kernels on an H200, beside flash-linear-attention's for the same work. Never a
measurement.

What the launch functions launch is recorded, the control flow of every warp worked out from its SASS, and one
multiprocessor
simulated event by event (bench/timemodel). Expect measured times at +0 to +40 % of the modelled ones; believe a
difference of
15 % between variants of one kernel, of 35 to 40 % between designs that move work across kernels, and nothing smaller.
"""

import argparse
import json
import math
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import launches, report
from .timemodel import control, fla, kernel, machine

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


TENSOR_FLOPS = {"16816": 4096, "1688": 2048}  # of one warp instruction, by the shape in the opcode


def trace_counts(x: launches.Recorded) -> tuple[float, int]:
    """Tensor FLOPs and barrier instructions of a whole launch, from the traces of all its CTAs."""
    k = kernel.load(x.cubin, x.kernel)
    shape = control.LaunchShape(x.grid, x.block, x.params)
    flops, barriers = 0.0, 0
    for n in range(math.prod(x.grid)):
        at = (n % x.grid[0], n // x.grid[0] % x.grid[1], n // (x.grid[0] * x.grid[1]))
        for t in control.run_cta(k.program, shape, at):
            for index, count in Counter(t.code).items():
                i = k.code[index]
                if i.base == "HMMA":
                    flops += count * TENSOR_FLOPS[i.op.split(".")[1]]
            barriers += sum(name >= 0 for name, _ in t.barriers)
    return flops, barriers


def cross_check(recorder: launches.Recorder, counted: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensor FLOPs of the traces against the simulator's counts of the same shape (JSON of `bench counters`)."""
    o, out = counted["shape"], []
    s = launches.Shape(o["B"], o["T"], o["H"], o["HV"] or o["H"], o["D"])
    for mode, phase in (("fwd_train", "forward"), ("bwd", "backward")):
        traced = [trace_counts(x) for x in recorder.record(mode, s, arch=o["arch"]) if x.cubin]
        total = counted["ours"]["phases"][phase]["total"]
        row = {
            "phase": phase,
            "trace": sum(f for f, _ in traced),
            "simulator": sum(n for name, n in total.items() if name.startswith("mma_flops.")),
            "trace_barriers": sum(b for _, b in traced),
            "simulator_barriers": total.get("inst.barrier", 0),
        }
        row["ratio"] = row["trace"] / row["simulator"]
        row["good"] = abs(row["ratio"] - 1) <= 0.03
        out.append(row)
    return out


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
    ap.add_argument("--check", help="JSON of `bench counters`: compare the traces with its counts, and end")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    m = {"h200": machine.H200, "h100": machine.H100}[o.machine]
    from .resources import demangle

    recorder = launches.Recorder(o.dtype)
    if o.check:
        rows = cross_check(recorder, json.loads(pathlib.Path(o.check).read_text()))
        for r in rows:
            print(
                f"{r['phase']}: tensor FLOP {r['trace']:.0f} in the traces, {r['simulator']:.0f} in the simulator "
                f"({r['ratio']:.3f}); barriers {r['trace_barriers']} and {r['simulator_barriers']:.0f}"
            )
        return 0 if all(r["good"] for r in rows) else 1
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
