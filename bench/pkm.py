"""Product-key selection on the CPU beside what users have, in one process, interleaved; results are compared before
anything is timed. With REMORA_BACKEND=sim, counts of the CUDA kernels in the simulator instead: counts, not times.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import report
from .cases import DTYPES, Wrong, relative_rms
from .cpu import interleave, machine_limits, quantile

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    mode: str  # topk: scores and selection; select: selection from given scores; topk+bwd
    dtype: str
    T: int = 4096
    H: int = 4
    n: int = 512
    ds: int = 128
    k: int = 32

    @property
    def name(self) -> str:
        return f"{self.mode} {self.dtype} T{self.T} H{self.H} n{self.n} ds{self.ds} k{self.k}"

    def flops(self) -> float:
        """Products of all query halves and sub-keys; the gradient's are few beside them."""
        return 0.0 if self.mode == "select" else 4.0 * self.T * self.H * self.n * self.ds

    def bytes(self) -> float:
        """Inputs once and outputs once; of given scores, the scores."""
        element = 4 if self.dtype == "fp32" else 2
        read = self.T * self.H * 2 * (self.n * 4 if self.mode == "select" else self.ds * element)
        return read + self.T * self.H * self.k * 8


CASES = [
    Case("topk", "fp32"), Case("topk", "bf16"), Case("select", "fp32"), Case("topk+bwd", "fp32"),
    Case("topk", "fp32", T=1024, n=1024, ds=256), Case("select", "fp32", T=1024, H=1, n=528, k=128),
    Case("topk", "fp32", T=1),
]  # fmt: skip


@dataclass
class Inputs:
    case: Case
    query: Tensor  # [T, H, 2, ds]
    keys: Tensor  # [H, 2, n, ds]
    sub_scores: Tensor  # [T, H, 2, n]
    d: Tensor  # [T, H, k]

    def by_axis(self) -> tuple[Tensor, Tensor]:
        """[2 H, T, ds] and [2 H, ds, n], contiguous or as torch.bmm likes them."""
        return self.query.flatten(1, 2).transpose(0, 1).contiguous(), self.keys.flatten(0, 1).mT


def make_inputs(case: Case) -> Inputs:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DTYPES[case.dtype])

    return Inputs(
        case, normal(case.T, case.H, 2, case.ds), normal(case.H, 2, case.n, case.ds),
        normal(case.T, case.H, 2, case.n).float(), normal(case.T, case.H, case.k).float(),
    )  # fmt: skip


def differentiated(x: Inputs, f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
    leaves = [t.detach().requires_grad_() for t in (x.query, x.keys)]

    def run() -> tuple[Tensor, ...]:
        scores, slots = f(*leaves)
        return scores.detach(), slots, *torch.autograd.grad(scores, leaves, x.d)

    return run


def remora(x: Inputs) -> Run:
    import remora.ops as ops

    if x.case.mode == "select":
        return lambda: ops.pk_select(x.sub_scores, x.case.k)
    if x.case.mode == "topk":
        return lambda: ops.pk_topk(x.query, x.keys, x.case.k)
    return differentiated(x, lambda query, keys: ops.pk_topk(query, keys, x.case.k))


def combine(best: Tensor, index: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The usual code: all k^2 sums of [..., 2, k] and the best of them."""
    sums = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
    slots = (index[..., 0, :, None] * case.n + index[..., 1, None, :]).flatten(-2)
    scores, at = sums.topk(case.k, dim=-1)
    return scores, slots.gather(-1, at)


def plain_torch(x: Inputs) -> Run:
    case = x.case
    if case.mode == "select":
        return lambda: combine(*x.sub_scores.topk(case.k, dim=-1), case)

    def f(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        products = torch.bmm(query.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).mT).float()
        best, index = products.view(case.H, 2, case.T, case.n).transpose(1, 2).topk(case.k, dim=-1)
        scores, slots = combine(best, index, case)
        return scores.transpose(0, 1), slots.transpose(0, 1)

    return differentiated(x, f) if case.mode == "topk+bwd" else lambda: f(x.query, x.keys)


def torch_bmm(x: Inputs) -> Run:
    """The products alone."""
    query, keys = x.by_axis()
    return lambda: torch.bmm(query, keys)


def faiss_knn(x: Inputs) -> Run:
    """The first stage alone: the k best of each axis."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    query, keys = x.by_axis()
    queries, bases = [q.numpy() for q in query], [k.mT.contiguous().numpy() for k in keys]
    return lambda: [
        faiss.knn(q, b, x.case.k, metric=faiss.METRIC_INNER_PRODUCT) for q, b in zip(queries, bases, strict=True)
    ]


def peers(case: Case) -> dict[str, Callable[[Inputs], Run]]:
    found = {"remora": remora, "torch: bmm, topk, k^2 sums, topk": plain_torch}
    if case.mode == "topk":
        found["torch.bmm alone"] = torch_bmm
        if case.dtype == "fp32":
            found["faiss.knn, first stage alone"] = faiss_knn
    return found


def scores_at(x: Inputs, slots: Tensor) -> Tensor:
    """Sums of float32 sub-scores at slots [T, H, k]."""
    sub_scores = x.sub_scores
    if x.case.mode != "select":
        sub_scores = torch.einsum("thad,hand->than", x.query.float(), x.keys.float())
    index = slots.long()
    rows, columns = index // x.case.n, index % x.case.n
    return sub_scores[:, :, 0].gather(-1, rows) + sub_scores[:, :, 1].gather(-1, columns)


def check(x: Inputs, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Relative RMS error of scores beside plain torch; raises Wrong. Slots may differ where rounding decides between
    them, if their float32 scores agree at every place; each that differs sends its gradient elsewhere.
    """
    bound, tie = (1e-5, 1e-4) if x.case.dtype == "fp32" else (1e-2, 5e-2)  # torch rounds bf16 products to bf16
    (scores, slots, *gradients), (their_scores, their_slots, *their_gradients) = ours, theirs
    error = relative_rms(scores, their_scores)
    have, want = scores_at(x, slots), scores_at(x, their_slots)
    apart = ((have - want).abs().max() / want.square().mean().sqrt()).item()
    if not (error <= bound and apart <= tie):
        raise Wrong(f"relative RMS error {error:.1e}, scores of slots up to {apart:.1e} apart")
    others = slots != their_slots
    elsewhere = (x.d[others].double().square().sum() / x.d.double().square().sum()).sqrt().item()
    for a, b in zip(gradients, their_gradients, strict=True):
        if not relative_rms(a, b) <= bound + 2 * elsewhere:
            raise Wrong(f"gradient: relative RMS error {relative_rms(a, b):.1e}, {int(others.sum())} slots differ")
    return error


def measure(case: Case, limits: dict[str, float], budget: float) -> dict[str, Any]:
    x = make_inputs(case)
    runs, absent = {}, {}
    for name, prepare in peers(case).items():
        try:
            runs[name] = prepare(x)
        except ImportError as e:
            absent[name] = str(e)
    error = check(x, runs["remora"](), runs["torch: bmm, topk, k^2 sums, topk"]())
    times = interleave(runs, budget)
    floor = max(case.flops() / limits["mm_fp32"], case.bytes() / max(limits["dram"], limits["cache"]))
    results = {
        name: {
            "median": statistics.median(t),
            "p20": quantile(t, 0.2),
            "p80": quantile(t, 0.8),
            "ours_over_this": statistics.median(a / b for a, b in zip(times["remora"], t, strict=True)),
        }
        for name, t in times.items()
    }
    return {"case": case.name, "floor": floor, "error": error, "results": results, "absent": absent}


def show(m: dict[str, Any]) -> str:
    rows = [
        [name, f"{r['median'] * 1e3:.2f}", f"{r['p20'] * 1e3:.2f}", f"{r['p80'] * 1e3:.2f}",
         f"{r['median'] / m['floor']:.1f}", f"{r['ours_over_this']:.2f}"]
        for name, r in sorted(m["results"].items(), key=lambda item: item[1]["median"])
    ]  # fmt: skip
    notes = "".join(f"\n  {name}: absent: {reason}" for name, reason in m["absent"].items())
    title = f"\n{m['case']}   floor {m['floor'] * 1e3:.2f} ms   error {m['error']:.0e}\n"
    return title + report.table(rows, ["implementation", "ms", "p20", "p80", "x floor", "ours/this"]) + notes


COUNTED = [
    Case("topk", "bf16", T=512, H=1), Case("topk", "fp32", T=512, H=1), Case("topk+bwd", "bf16", T=512, H=1),
    Case("select", "fp32", T=64, H=1, n=528, k=128), Case("topk", "bf16", T=16, H=1, n=2048, ds=64, k=1024),
]  # fmt: skip


def count(case: Case) -> str:
    from remora.testing import sim

    from . import counters

    x = make_inputs(case)
    rows = []
    with sim.options(memory_stats=1, arch=90):
        run = remora(x)
        sim.reset_stats()
        run()
        for name, stats in sim.stats().items():
            c = counters.flatten(stats)
            waves, excess = (sum(c[f"shared_{kind}_{what}"] for kind in ("load", "store"))
                             for what in ("wavefronts", "excess"))  # fmt: skip
            sectors, ideal = (sum(c[f"{kind}_{what}"] for kind in ("load", "store"))
                              for what in ("sectors", "ideal_sectors"))  # fmt: skip
            rows.append([
                name, int(c["ctas"]), f"{c['load_touched'] / 1e6:.2f}", f"{c['store_touched'] / 1e6:.2f}",
                f"{sectors / max(1, ideal):.2f}", f"{counters.mma(c) / max(1.0, case.flops()):.2f}",
                f"{c['warp_instructions'] / (case.T * case.H):.0f}", f"{100 * excess / max(1, waves):.1f}",
            ])  # fmt: skip
    head = ["kernel", "CTAs", "MB read", "MB written", "sectors / least", "tensor-core FLOP / useful",
            "warp instructions / token and head", "bank conflicts, %"]  # fmt: skip
    return f"\n{case.name}: compulsory {case.bytes() / 1e6:.2f} MB (counted)\n" + report.table(rows, head)


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench pkm", description=__doc__)
    ap.add_argument("--cases", default="", help="words that the case's name must contain, for example 'topk fp32'")
    ap.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    ap.add_argument("--budget", type=float, default=8.0, help="seconds of samples per case")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    if os.environ.get("REMORA_BACKEND") == "sim":
        for case in COUNTED:
            if set(o.cases.split()) <= set(case.name.split()):
                print(count(case), flush=True)
        return 0
    limits, host = machine_limits(), report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    document: dict[str, Any] = {"kind": "measured", "host": host, "limits": limits, "cases": []}
    for case in CASES:
        if set(o.cases.split()) <= set(case.name.split()):
            document["cases"].append(measure(case, limits, o.budget))
            print(show(document["cases"][-1]), flush=True)
    print("\nfloor: products at torch.mm's rate, or bytes at copy_'s, both measured in this run.")
    report.save(o.json, document)
    return 0
