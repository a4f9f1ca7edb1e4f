"""A Mixture-of-Memories layer on the CPU beside the same layer composed from torch operators and the recurrences
installed here, and beside its matrix products alone; and a router that sends every token to the same memories beside
one that balances them. All in one process, interleaved; nothing is timed before it has been found right. With
--counters, work of the CUDA kernels in the simulator instead: the routed recurrence beside the plain one over as many
rows.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import counters, cpu, mom_torch, report
from .cases import TOLERANCE, Wrong, relative_rms
from .peers import Run, bitsandbytes_function

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    what: str  # layer: all of it; recurrence: from q, k, v, g, beta and indices to the mixed reads
    routing: str = "balanced"  # or collapsed
    T: int = 2048
    hidden: int = 1024
    H: int = 8
    D: int = 64  # K = V
    M: int = 4
    k: int = 2
    single: bool = False  # one set of key and value projections

    @property
    def name(self) -> str:
        projections = ", one projection" if self.single else ""
        size = f" d{self.hidden}" if self.what == "layer" else ""
        return (
            f"mom {self.what} fwd+bwd fp32 T{self.T}{size} M{self.M} k{self.k} H{self.H} K=V={self.D}"
            f" {self.routing}{projections}"
        )

    def small(self) -> "Case":
        return Case(self.what, self.routing, 70, 32, 2, 16, self.M, self.k, self.single)


CASES = [
    Case("layer"),
    Case("layer", single=True),
    Case("layer", "collapsed"),
    Case("recurrence"),
    Case("recurrence", "collapsed"),
    Case("recurrence", H=1, k=1),
    Case("recurrence", "collapsed", H=1, k=1),
]


FLOOR = "matrix products alone"


def hand_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from .chunked_torch import chunked_gated_delta_rule

    return chunked_gated_delta_rule(q, k, v, g, beta, q.shape[-1] ** -0.5)


def bitsandbytes_fork(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    o: Tensor = bitsandbytes_function()(q, k, v, beta, g, scale=q.shape[-1] ** -0.5)[0]
    return o


PEERS: dict[str, mom_torch.Recurrence] = {
    "torch operators, hand-chunked": hand_chunked,
    "torch operators, bitsandbytes-cpu-fork": bitsandbytes_fork,
}


def with_gradients(f: Callable[[], Tensor], leaves: dict[str, Tensor], d_y: Tensor) -> Run:
    def run() -> Outputs:
        y = f()
        grads = torch.autograd.grad(y, list(leaves.values()), d_y.to(y.dtype))
        return {"o": y.detach(), **{f"d{n}": d for n, d in zip(leaves, grads, strict=True)}}

    return run


def layer_runs(case: Case) -> tuple[dict[str, Run], Run | None]:
    from remora.modules import MixtureOfMemories

    torch.manual_seed(0)
    layer = MixtureOfMemories(
        case.hidden, case.D, case.H, 1.0, case.M, case.k, single_kv_proj=case.single, shared_memory=True
    )
    with torch.no_grad():
        # Equal logits go to the first memories.
        layer.router.weight.mul_(0.0 if case.routing == "collapsed" else 3.0)
    x = torch.randn(1, case.T, case.hidden, requires_grad=True)
    d_y = torch.randn(1, case.T, case.hidden)
    leaves = {"x": x, **{n.replace(".", "_"): p for n, p in layer.named_parameters()}}
    if case.routing == "collapsed":
        # topk of torch breaks ties as it likes, so its router may take other memories; the work is the same
        return {"remora": with_gradients(lambda: layer(x), leaves, d_y)}, None
    runs = {"remora": with_gradients(lambda: layer(x), leaves, d_y)}
    for name, recurrence in PEERS.items():
        runs[name] = with_gradients(lambda r=recurrence: mom_torch.layer(layer, x, r), leaves, d_y)
    return runs, None


def products(case: Case) -> Run:
    """The matrix products of a layer and of its gradients, on tensors at hand: no layer of these sizes takes less."""
    width, projected = case.H * case.D, 2 * case.H * (case.D + 1)
    sizes = [(case.T, case.hidden, width), (case.T, case.hidden, width), (case.T, width, case.hidden)]
    sizes += [(case.T, case.hidden, case.M), (case.T, case.hidden, projected)]
    if not case.single:
        used = case.k if case.routing == "collapsed" else case.M
        sizes += [(case.T * case.k // used, case.hidden, projected)] * used
    operands = [(torch.randn(r, i), torch.randn(o, i), torch.randn(r, o)) for r, i, o in sizes]

    def run() -> Outputs:
        for x, weight, d_y in operands:
            torch.mm(x, weight.mT), torch.mm(d_y, weight), torch.mm(d_y.mT, x)
        return {}

    return run


def recurrence_runs(case: Case) -> tuple[dict[str, Run], Run | None]:
    from remora import ops
    from remora.ops.routed.naive import naive_mom_gated_delta_rule

    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, case.T, case.H, case.D, generator=rng) for _ in range(3))
    leaves = {
        "q": F.normalize(q, dim=-1),
        "k": F.normalize(k, dim=-1),
        "v": v,
        "g": F.logsigmoid(torch.randn(1, case.T, case.H, generator=rng) + 3),
        "beta": torch.rand(1, case.T, case.H, generator=rng),
        "weights": torch.rand(1, case.T, case.k, generator=rng),
    }
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    order = torch.rand(1, case.T, case.M, generator=rng).argsort(-1)
    if case.routing == "collapsed":
        order = torch.arange(case.M).expand_as(order)
    indices = order[..., : case.k].int().contiguous()
    d_o = torch.randn(1, case.T, case.H, case.D, generator=rng)
    runs = {
        "remora": with_gradients(lambda: ops.mom_gated_delta_rule(**leaves, indices=indices, num_memories=case.M)[0],
                                 leaves, d_o)
    }  # fmt: skip
    for name, recurrence in PEERS.items():
        runs[name] = with_gradients(
            lambda r=recurrence: mom_torch.routed(*leaves.values(), indices, case.M, r), leaves, d_o
        )
    exact = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    naive = with_gradients(lambda: naive_mom_gated_delta_rule(**exact, indices=indices, num_memories=case.M)[0], exact,
                           d_o)  # fmt: skip
    return runs, naive


def prepare(case: Case) -> tuple[dict[str, Run], Run | None]:
    return layer_runs(case) if case.what == "layer" else recurrence_runs(case)


def check(actual: Outputs, expected: Outputs, bound: float) -> float:
    found = {n: relative_rms(actual[n], expected[n]) for n in expected}
    wrong = {n: e for n, e in found.items() if not e <= bound}
    if wrong:
        raise Wrong(", ".join(f"{n}: relative RMS error {e:.1e} > {bound:.0e}" for n, e in wrong.items()))
    return max(found.values())


def checked(case: Case) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """The implementations that are here and right: at a small size against float64 (or, of the layer, against each
    other), at full size against the first.
    """
    records: dict[str, dict[str, Any]] = {}
    small, naive = prepare(case.small())
    runs, _ = prepare(case)
    right: dict[str, Run] = {}
    wanted = naive() if naive else None
    full: Outputs | None = None
    # Router and projections of the layer are sums of a thousand terms in another order.
    bound = TOLERANCE["fp32"] if case.what == "recurrence" else 1e-4
    for name, run in sorted(runs.items(), key=lambda item: item[0] == "remora"):
        records[name] = record = {"status": "ok"}
        try:
            got = small[name]()
            wanted = got if wanted is None else wanted
            record["error"] = check(got, wanted, bound)
            got = {n: t.clone() for n, t in run().items()}
            full = got if full is None else full
            record["full_size_error"] = check(got, full, bound)
            right[name] = run
        except (Wrong, ImportError) as e:
            record.update(status="wrong" if isinstance(e, Wrong) else "absent", reason=str(e))
    return right, records


def measure(cases: list[Case], budget: float) -> tuple[list[dict[str, Any]], bool]:
    good = True
    kept: dict[str, Run] = {}  # ours of every case, for the ratios between cases
    documents: list[dict[str, Any]] = []
    for case in cases:
        runs, records = checked(case)
        good &= records["remora"]["status"] == "ok"
        if case.what == "layer":
            runs[FLOOR], records[FLOOR] = products(case), {"status": "ok", "error": 0.0}
        times = cpu.interleave(runs, budget)
        rows = []
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["remora"], values, strict=True))
            records[name] |= {
                "median": statistics.median(values),
                "p20": cpu.quantile(values, 0.2),
                "p80": cpu.quantile(values, 0.8),
                "samples": len(values),
                "ours_over_this": ratio,
            }
            r = records[name]
            rows.append([name, f"{r['median'] * 1e3:.1f}", f"{r['p20'] * 1e3:.1f}", f"{r['p80'] * 1e3:.1f}",
                         r["samples"], f"{ratio:.2f}", "" if name == FLOOR else f"{r['error']:.0e}"])  # fmt: skip
        print(f"\n{case.name}\n{report.table(rows, ['implementation', 'ms', 'p20', 'p80', 'n', 'ours/this', 'error'])}")
        for name, r in records.items():
            if r["status"] != "ok":
                print(f"  {name}: {r['status']}: {r['reason']}")
        documents.append({"case": case.name, "results": records})
        if "remora" in runs:
            kept[case.name] = runs["remora"]
    for case in cases:
        balanced = Case(**{**case.__dict__, "routing": "balanced"})
        if case.routing == "collapsed" and {case.name, balanced.name} <= kept.keys():
            times = cpu.interleave({"collapsed": kept[case.name], "balanced": kept[balanced.name]}, budget)
            ratio = statistics.median(a / b for a, b in zip(times["collapsed"], times["balanced"], strict=True))
            print(f"\n{case.name}: {ratio:.2f} times the balanced one")
            documents.append({"case": case.name, "collapsed_over_balanced": ratio})
    return documents, good


def count(T: int, H: int, D: int, M: int, k: int) -> dict[str, Any]:
    """Counters of the forward kernels; needs REMORA_BACKEND=sim in the environment."""
    from remora import ops

    rng = torch.Generator().manual_seed(0)

    def inputs(*shape: int) -> dict[str, Tensor]:
        q, key = (F.normalize(torch.randn(*shape, H, D, generator=rng), dim=-1).bfloat16() for _ in range(2))
        v = torch.randn(*shape, H, D, generator=rng).bfloat16()
        return {"q": q, "k": key, "v": v, "g": -torch.rand(*shape, H, generator=rng) / 8,
                "beta": torch.rand(*shape, H, generator=rng)}  # fmt: skip

    x = inputs(1, T, k)  # every choice has its own q, k and v: as many rows as the plain call reads
    indices = torch.rand(1, T, M, generator=rng).argsort(-1)[..., :k].int().contiguous()
    weights = torch.rand(1, T, k, generator=rng)
    plain = {n: t.movedim(2, 0).flatten(1, 2).contiguous() for n, t in x.items()}
    with torch.no_grad():
        rows = {
            "plain": counters.count(lambda: ops.chunk_gated_delta_rule(**plain)),
            "routed": counters.count(
                lambda: ops.mom_gated_delta_rule(**x, weights=weights, indices=indices, num_memories=M)
            ),
        }
        from remora.ops.routed.naive import naive_mom_gated_delta_rule

        got, _ = ops.mom_gated_delta_rule(**x, weights=weights, indices=indices, num_memories=M)
        exact = {n: t.double() for n, t in {**x, "weights": weights}.items()}
        want, _ = naive_mom_gated_delta_rule(**exact, indices=indices, num_memories=M)
    recurrence = {
        name: counters.add(*(c for kernel, c in kernels.items() if "gated_delta_rule" in kernel))
        for name, kernels in rows.items()
    }
    touched = {n: c["load_touched"] + c["store_touched"] for n, c in recurrence.items()}
    return {
        "error": relative_rms(got, want),
        "kernels": rows,
        "bytes": touched,
        "routed_over_plain": touched["routed"] / touched["plain"],
    }


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench mom", description=__doc__)
    ap.add_argument("--cases", help="words that the case's name must contain")
    ap.add_argument("--budget", type=float, default=8.0, help="seconds of samples per case")
    ap.add_argument("--counters", action="store_true", help="count the CUDA kernels' work in the simulator")
    ap.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if o.worker:
        pathlib.Path(o.json).write_text(json.dumps(count(T=256, H=2, D=64, M=4, k=2)))
        return 0
    if o.counters:
        found = counters.spawn("bench", ["mom", "--worker"], {"REMORA_BACKEND": "sim"})
        for name, kernels in found["kernels"].items():
            print(f"\n{name}\n{counters.kernel_table(kernels)}")
        print(f"\nbytes touched by the recurrence, routed / plain over as many rows: {found['routed_over_plain']:.3f}")
        print(f"largest relative RMS error {found['error']:.1e}")
        report.save(o.json, {"kind": "simulated", "commit": report.commit(), **found})
        return 0 if found["error"] <= counters.TOLERANCE else 1
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    chosen = [
        c for c in CASES if set((o.cases or "").replace(",", " ").split()) <= set(c.name.replace(",", "").split())
    ]
    documents, good = measure(chosen, o.budget)
    print("\nms: median of interleaved samples; ours/this: median over rounds of our time over this one's.")
    report.save(o.json, {"kind": "measured", "host": host, "cases": documents})
    return 0 if good else 1
