"""CPU times beside the peers installed here, all in one process, interleaved; nothing is timed before it has been
found right.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import cases, report
from .cases import Case, Wrong
from .peers import PEERS, Absent, Peer, Run

SAMPLE_SECONDS = 0.01  # a sample repeats calls until it is at least this long
PAUSE = 0.003  # between samples: threads of the last implementation come to rest


def best_of(f: Callable[[], object], seconds: float = 0.5) -> float:
    f()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def machine_limits() -> dict[str, float]:
    """What torch reaches here and now: FLOP/s of matrix products, bytes/s of copies (read and written)."""
    n, limits = 1024, {}
    for name, dtype in cases.DTYPES.items():
        a, b, c = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype), torch.empty(n, n, dtype=dtype)
        limits[f"mm_{name}"] = 2 * n**3 / best_of(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
    for name, size in (("dram", 256 << 20), ("cache", 8 << 20)):
        src, dst = torch.ones(size // 4), torch.empty(size // 4)
        limits[name] = 2 * size / best_of(lambda s=src, d=dst: d.copy_(s))
    return limits


def floor(case: Case, limits: dict[str, float]) -> float:
    """Seconds below which the case cannot be on this machine: its FLOPs at the rate of torch.mm, its bytes at that
    of copy_. Where the processor has no bf16 products, fp32 is the faster way to do them.
    """
    # states that are used in turn come from DRAM; one set, and what a forward pass reads, may stay in the cache
    bandwidth = limits["dram"] if case.rotate > 1 or case.bytes() > 32 << 20 else max(limits["dram"], limits["cache"])
    compute = 0.0 if case.mode == "decode" else case.flops() / max(limits[f"mm_{case.dtype}"], limits["mm_fp32"])
    return max(compute, case.bytes() / bandwidth)


def sample(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def interleave(runs: dict[str, Run], budget: float, rounds: int | None = None) -> dict[str, list[float]]:
    """Samples of every implementation, in rounds; the order turns, so that each follows each."""
    calls = {}
    spent = 0.0
    for name, run in runs.items():
        first = sample(run, 1)
        calls[name] = max(1, min(1000, int(SAMPLE_SECONDS / max(min(first, sample(run, 1)), 1e-7))))
        spent += sample(run, calls[name]) * calls[name] + PAUSE
    rounds = rounds or max(7, min(101, int(budget / max(spent, 1e-6))))
    out: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            time.sleep(PAUSE)
            out[name].append(sample(runs[name], calls[name]))
    return out


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def compare(
    makers: Mapping[str, Callable[[], dict[str, Run]]],
    words: str,
    budget: float,
    tolerance: Mapping[str, float],
    more: Mapping[str, Callable[[str, str], str]] | None = None,
) -> dict[str, Any]:
    """Times "remora" and its peers in every case whose name has all the words, once they agree; prints a table each.

    Args:
        tolerance: relative RMS error by the word of the name that tells the dtype.
        more: further columns, of the case and the implementation.
    """
    measured, more = {}, more or {}
    for case, make in makers.items():
        if not set(words.split()) <= set(case.split()):
            continue
        runs = make()
        ours = runs["remora"]()
        bound = next(x for word, x in tolerance.items() if word in case.split())
        for name, run in runs.items():
            for output, tensor in run().items():
                error = cases.relative_rms(tensor, ours[output]) if output in ours else 0.0
                if not error <= bound:
                    raise Wrong(f"{case}: {output} of {name} differs from ours, relative RMS {error:.1e}")
        times = interleave(runs, budget)
        rows = []
        for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
            ms = [f"{1e3 * x:.2f}" for x in (statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))]
            ratio = statistics.median(a / b for a, b in zip(times["remora"], values, strict=True))
            rows.append([name, *ms, len(values), f"{ratio:.2f}", *(column(case, name) for column in more.values())])
        measured[case] = {"seconds": times, "rows": rows}
        header = ["implementation", "ms", "p20", "p80", "n", "ours/this", *more]
        print(f"\n{case}\n{report.table(rows, header)}", flush=True)
    return measured


def required(case: Case) -> tuple[str, ...]:
    gradients = (f"d{name}" for name in case.inputs)
    return {"fwd": ("o",), "decode": ("o", "state"), "fwd+bwd": ("o", *gradients)}[case.mode]


def prepare(case: Case, peers: list[Peer]) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Runs of the implementations that are here and right, and a record of every one."""
    runs: dict[str, Run] = {}
    records: dict[str, dict[str, Any]] = {}
    x = cases.make_inputs(case)
    agreed: cases.Outputs | None = None
    for peer in sorted(peers, key=lambda p: p.ours):  # the others first: ours is compared with theirs
        record: dict[str, Any] = {"version": peer.version, "ours": peer.ours}
        records[peer.name] = record
        try:
            record["errors"] = cases.gate(lambda small, p=peer: p.prepare(small)(), case, required(case))
            run = peer.prepare(x)
            # at full size against the first implementation that passed (decode: float64, which is quick there)
            got = {n: t.clone() for n, t in run().items()}
            if agreed is None:
                agreed = cases.reference(x) if case.mode == "decode" else got
            record["full_size_errors"] = cases.check(got, agreed, case.dtype, required(case))
            runs[peer.name] = run
            record["status"] = "ok"
        except Absent as e:
            record.update(status="not applicable", reason=str(e))
        except Wrong as e:
            record.update(status="wrong", reason=str(e))
        except ImportError as e:
            record.update(status="absent", reason=str(e))
        except Exception as e:  # a peer may fail in any way; it is reported, not timed
            record.update(status="failed", reason=f"{type(e).__name__}: {e}"[:300])
    return runs, records


def measure(case: Case, limits: dict[str, float], budget: float, peers: list[Peer]) -> dict[str, Any]:
    runs, records = prepare(case, peers)
    times = interleave(runs, budget) if runs else {}
    least = floor(case, limits)
    for name, values in times.items():
        records[name] |= {
            "samples": len(values),
            "median": statistics.median(values),
            "p20": quantile(values, 0.2),
            "p80": quantile(values, 0.8),
        }
        records[name]["over_floor"] = records[name]["median"] / least
    ours = records.get("remora", {}).get("median")
    for name, r in records.items():
        if ours and "median" in r:
            # pairs of one round share the machine's state of that moment
            r["ours_over_this"] = statistics.median(a / b for a, b in zip(times["remora"], times[name], strict=True))
    return {
        "case": case.name,
        "mode": case.mode,
        "dtype": case.dtype,
        "floor": least,
        "flops": case.flops(),
        "bytes": case.bytes(),
        "results": records,
    }


def show(m: dict[str, Any]) -> str:
    rows, notes = [], []
    for name, r in m["results"].items():
        if r["status"] == "ok":
            rows.append(
                (
                    r["median"],
                    [
                        name,
                        r["version"],
                        f"{r['median'] * 1e3:.2f}",
                        f"{r['p20'] * 1e3:.2f}",
                        f"{r['p80'] * 1e3:.2f}",
                        r["samples"],
                        f"{r['over_floor']:.1f}",
                        f"{r['ours_over_this']:.2f}" if "ours_over_this" in r else "",
                        f"{max(r['errors'].values()):.0e}",
                    ],
                )
            )
        elif r["status"] != "not applicable":
            notes.append(f"  {name}: {r['status']}: {r['reason']}")
        else:
            notes.append(f"  {name}: {r['reason']}")
    head = ["implementation", "version", "ms", "p20", "p80", "n", "x floor", "ours/this", "error"]
    text = f"\n{m['case']}   floor {m['floor'] * 1e3:.2f} ms\n"
    return (
        text + report.table([r for _, r in sorted(rows, key=lambda x: x[0])], head) + "".join("\n" + n for n in notes)
    )


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__)
    ap.add_argument("--cases", help="words that the case's name must contain, for example 'fwd fp32 T4096'")
    ap.add_argument("--all", action="store_true", help="the smaller shapes too")
    ap.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    ap.add_argument("--budget", type=float, default=14.0, help="seconds of samples per case")
    ap.add_argument("--only", help="implementations whose name contains this; ours always")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    peers = [p for p in PEERS if not o.only or p.ours or o.only in p.name]
    limits = machine_limits()
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    print(
        f"measured: torch.mm {limits['mm_fp32'] / 1e9:.0f} (fp32) and {limits['mm_bf16'] / 1e9:.0f} (bf16) GFLOP/s, "
        f"copy {limits['dram'] / 1e9:.0f} GB/s from memory, {limits['cache'] / 1e9:.0f} GB/s of 8 MB"
    )
    document: dict[str, Any] = {"kind": "measured", "host": host, "limits": limits, "cases": []}
    good = True
    for case in cases.select(o.cases, o.all):
        m = measure(case, limits, o.budget, peers)
        document["cases"].append(m)
        print(show(m), flush=True)
        good &= m["results"]["remora"]["status"] == "ok"
    print(
        "\nms: median of interleaved samples; ours/this: median over rounds of our time over this one's (below 1: ours is faster);"  # noqa: E501
    )
    print(
        "floor: FLOPs of the cheapest formulation at torch.mm's rate, or bytes at copy_'s rate, both measured in this run."  # noqa: E501
    )
    report.save(o.json, document)
    return 0 if good else 1
