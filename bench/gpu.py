"""Times on this machine's GPU beside the peers installed here; nothing is timed before it has been found right. Decode
steps are replayed from a CUDA graph, so that they are the kernels' times and not those of Python; so is a routed layer.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cases, pkm, report
from .cases import Case, Inputs, Outputs, Wrong
from .peers import Absent, Run, backward, remora, rotating

CASES = [
    *(Case(mode, "bf16", 1, 32768, H, 128, op=op)
      for op in cases.OPERATORS for H in (8, 64) for mode in ("fwd", "fwd+bwd")),
    *(Case("fwd+bwd", "bf16", 8, 4096, 16, 64, op=op) for op in cases.OPERATORS),
    *(Case("decode", "bf16", B, 1, 16, 128, op=op) for op in cases.OPERATORS for B in (1, 128)),
]  # fmt: skip
STEPS_IN_GRAPH = 20


def on_gpu(x: Any) -> Any:
    """The dataclass of inputs with its tensors on the GPU."""
    move = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    move = {name: [t.cuda() for t in value] if isinstance(value, list) else value.cuda()
            for name, value in move.items() if isinstance(value, Tensor | list)}  # fmt: skip
    return dataclasses.replace(x, **move)


def fla(x: Inputs) -> Run:
    """flash-linear-attention's kernels, in Triton."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    delta = x.case.op == "gated_delta_rule"
    if x.case.mode != "decode":
        whole = chunk_gated_delta_rule if delta else chunk_simple_gla
        return backward(lambda q, k, v, *gates: whole(q, k, v, *gates, scale=x.scale)[0], x)
    step = fused_recurrent_gated_delta_rule if delta else fused_recurrent_simple_gla
    inputs = {name: getattr(x, name) for name in x.case.inputs}
    states = list(x.states)

    def write(n: int) -> Tensor:
        # From the given state every time: a graph's replay may not read a state that the step before has replaced.
        o, states[n] = step(**inputs, scale=x.scale, initial_state=x.states[n], output_final_state=True)
        return o

    return rotating(x, write, states)


def limits() -> dict[str, float]:
    """FLOP/s of torch.mm in bf16 and bytes/s of copy_, read and written."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleave({"mm": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, 10)
    return {
        "mm_bf16": 2 * n**3 / statistics.median(seconds["mm"]),
        "dram": 2 * source.numel() / statistics.median(seconds["copy"]),
    }


def interleave(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds between events around single calls, in rounds whose order turns."""
    out: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    names = list(runs)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            out[name].append(start.elapsed_time(end) / 1e3)
    return out


def graphed(run: Callable[[], Any], calls: int = STEPS_IN_GRAPH) -> tuple[Callable[[], Any], Any]:
    """A replay of so many calls, and what the last of them returns: tensors that each replay fills anew."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            out = run()
    return graph.replay, out


def on_cpu(outputs: Outputs) -> Outputs:
    return {name: t.cpu() for name, t in outputs.items()}


def recurrence(case: Case, rounds: int) -> dict[str, Any]:
    runs: dict[str, Callable[[], Any]] = {}
    notes: dict[str, str] = {}
    x = on_gpu(cases.make_inputs(case))
    agreed: Outputs | None = None
    for name, prepare in (("flash-linear-attention", fla), ("remora", remora)):
        try:
            cases.gate(lambda small, p=prepare: on_cpu(p(on_gpu(small))()), case)
            run = prepare(x)
            got = {n: t.clone() for n, t in run().items()}
            agreed = agreed or got
            cases.check(got, agreed, case.dtype)
            runs[name] = graphed(run)[0] if case.mode == "decode" else run
        except (Absent, ImportError, Wrong) as e:
            notes[name] = f"{type(e).__name__}: {e}"
        except Exception as e:  # a peer may fail in any way; it is reported, not timed
            notes[name] = f"{type(e).__name__}: {e}"[:300]
            if name == "remora":
                raise
    calls = STEPS_IN_GRAPH if case.mode == "decode" else 1
    seconds = {n: [t / calls for t in times] for n, times in interleave(runs, rounds).items()}
    return {"case": case.name, "flops": case.flops(), "bytes": case.bytes(), "seconds": seconds, "notes": notes}


def selection(case: pkm.Case, rounds: int) -> dict[str, Any]:
    x = on_gpu(pkm.make_inputs(case))
    runs = {"remora": pkm.remora(x), "torch: bmm, topk, k^2 sums, topk": pkm.plain_torch(x)}
    pkm.check(x, *(run() for run in runs.values()))
    seconds = interleave(runs, rounds)
    return {"case": case.name, "flops": case.flops(), "bytes": case.bytes(), "seconds": seconds, "notes": {}}


def scan(mode: str, rounds: int, B: int = 4, T: int = 4096, D: int = 2048, N: int = 16) -> dict[str, Any]:
    from remora import ops
    from remora.ops.recurrence.selective_scan.naive import naive_selective_scan

    def inputs(B: int, T: int, D: int) -> tuple[list[Tensor], Tensor]:
        u, delta, z = (torch.randn(B, D, T).to(torch.bfloat16) for _ in range(3))
        b, c = (torch.randn(B, N, T).to(torch.bfloat16) for _ in range(2))
        return [u, delta, -torch.rand(D, N) - 0.5, b, c], z

    small, z = inputs(1, 100, 8)
    have = ops.selective_scan(*(t.cuda() for t in small), z=z.cuda(), delta_softplus=True)
    u, delta, a, b, c, gate = (t.double() for t in (*small, z))
    want, _ = naive_selective_scan(u, delta, a, b[:, None], c[:, None], None, gate, None, True, None)
    error = cases.relative_rms(have.cpu(), want)
    if not error <= cases.TOLERANCE["bf16"]:
        raise Wrong(f"selective_scan: relative RMS error {error:.1e}")

    leaves, z = inputs(B, T, D)
    leaves, z = [t.cuda().requires_grad_(mode == "fwd+bwd") for t in leaves], z.cuda()

    def run() -> Any:
        y = ops.selective_scan(*leaves, z=z, delta_softplus=True)
        return torch.autograd.grad(y, leaves, z) if mode == "fwd+bwd" else y

    moved = 2 * B * T * (4 * D + 2 * N) + (2 * B * T * (5 * D + 4 * N) if mode == "fwd+bwd" else 0)
    name = f"selective_scan {mode} bf16 B{B} T{T} D{D} N{N}"
    return {"case": name, "flops": 0.0, "bytes": moved, "seconds": interleave({"remora": run}, rounds), "notes": {}}


def routed(rounds: int, B: int = 1, T: int = 8192, hidden: int = 1024) -> dict[str, Any]:
    """A Mixture-of-Memories layer, forward and backward, called from Python and replayed from a CUDA graph; the replay
    must give the same bits on inputs, and so routes, that it was not captured with.
    """
    from remora.modules import MixtureOfMemories

    layer = MixtureOfMemories(hidden, 64, 8, 1.0, num_memories=4, topk=2, shared_memory=True).cuda().bfloat16()
    x = torch.randn(B, T, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    d_y = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]

    replay, out = graphed(run, 1)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    if not all(torch.equal(a, b) for a, b in zip(out, run(), strict=True)):
        raise Wrong("MixtureOfMemories: a replayed CUDA graph gives other bits than a call")
    moved = sum(t.nbytes for t in out) + sum(t.nbytes for t in leaves) * 2
    flops = 6.0 * B * T * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    runs = {"remora, from Python": run, "remora": replay}
    name = f"mom layer fwd+bwd bf16 B{B} T{T} d{hidden} M4 k2"
    return {"case": name, "flops": flops, "bytes": moved, "seconds": interleave(runs, rounds), "notes": {}}


def show(m: dict[str, Any], rate: dict[str, float]) -> str:
    floor = m["bytes"] / rate["dram"]
    if "decode" not in m["case"]:
        floor = max(floor, m["flops"] / rate["mm_bf16"])
    ours = m["seconds"].get("remora")
    rows = []
    for name, times in sorted(m["seconds"].items(), key=lambda item: statistics.median(item[1])):
        ratio = statistics.median(a / b for a, b in zip(ours, times, strict=True)) if ours else float("nan")
        median = statistics.median(times)
        rows.append([name, f"{median * 1e3:.3f}", f"{min(times) * 1e3:.3f}", f"{max(times) * 1e3:.3f}",
                     f"{median / floor:.1f}", f"{ratio:.2f}"])  # fmt: skip
    notes = "".join(f"\n  {name}: {why}" for name, why in m["notes"].items())
    title = f"\n{m['case']}   floor {floor * 1e3:.3f} ms\n"
    return title + report.table(rows, ["implementation", "ms", "least", "most", "x floor", "ours/this"]) + notes


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    ap.add_argument("--cases", default="", help="words that the case's name must contain, for example 'decode bf16'")
    ap.add_argument("--rounds", type=int, default=15)
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a GPU; bench counters and bench model need none")
    torch.manual_seed(0)
    rate = limits()
    host = report.host() | {"gpu": torch.cuda.get_device_name()}
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    print(f"measured: torch.mm {rate['mm_bf16'] / 1e12:.0f} TFLOP/s (bf16), copy {rate['dram'] / 1e9:.0f} GB/s")
    jobs: dict[str, Callable[[], dict[str, Any]]] = {c.name: lambda c=c: recurrence(c, o.rounds) for c in CASES}
    for case in (pkm.Case(mode, "bf16", T=32768) for mode in ("topk", "topk+bwd")):
        jobs[case.name] = lambda c=case: selection(c, o.rounds)
    for mode in ("fwd", "fwd+bwd"):
        jobs[f"selective_scan {mode} bf16"] = lambda mode=mode: scan(mode, o.rounds)
    jobs["mom layer fwd+bwd bf16"] = lambda: routed(o.rounds)
    document: dict[str, Any] = {"kind": "measured", "host": host, "limits": rate, "cases": []}
    for name, job in jobs.items():
        if set(o.cases.split()) <= set(name.split()):
            document["cases"].append(job())
            print(show(document["cases"][-1], rate), flush=True)
    print(
        "\nfloor: FLOPs of the cheapest formulation at torch.mm's rate, or bytes at copy_'s, both measured in this run."
    )
    report.save(o.json, document)
    return 0
