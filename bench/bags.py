"""Times of weighted bags beside F.embedding_bag, a plain gather of the same rows, and PEER-pytorch: one process,
interleaved, ours compared with a float32 peer first. With REMORA_BACKEND=sim, counts of the CUDA kernels instead:

  requested   bytes that the lanes of loads and stores name
  touched     distinct 32-byte sectors of each launch, summed: device bytes if every launch's cache is ideal and cold
  compulsory  of requested: the rows of every lookup; of touched: every row and every row of gradients once; and in both
              what else the operator reads and writes, once
  sectors     per warp request, over the least that its bytes need
"""

import argparse
import concurrent.futures
import ctypes
import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remora import _ext, ops

from . import report
from .cases import relative_rms
from .cpu import interleave

LOOKUPS, ROWS, WIDTH = 128, 512**2, 512  # H = 4 heads, k = 32, n = 512
TOKENS = {"cpu": 4096, "cuda": 32768}
PEER_TOKENS = 1024
Run = Callable[[], Any]


def make_indices(kind: str, tokens: int, rows: int = ROWS, lookups: int = LOOKUPS) -> Tensor:
    if kind == "one row":
        return torch.full((tokens, lookups), rows // 3)
    if kind == "zipf":
        ranks = torch.rand(tokens, lookups).mul(torch.tensor(float(rows)).log()).exp().long() - 1
        return torch.randperm(rows)[ranks.clamp(0, rows - 1)]
    return torch.randint(rows, (tokens, lookups))


def plain_gather(table: Tensor, indices: Tensor) -> Run:
    """The C loop of gather.c over the threads that torch uses."""
    folder = tempfile.mkdtemp()
    library = pathlib.Path(folder) / "gather.so"
    source = pathlib.Path(__file__).with_name("gather.c")
    subprocess.run(["cc", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).gather
    function.restype = ctypes.c_float
    parts = indices.flatten().chunk(torch.get_num_threads())
    pool = concurrent.futures.ThreadPoolExecutor(len(parts))

    def run() -> None:
        calls = [
            pool.submit(
                function,
                ctypes.c_void_p(table.data_ptr()),
                ctypes.c_void_p(part.data_ptr()),
                ctypes.c_int64(part.numel()),
                ctypes.c_int64(table.shape[1]),
            )
            for part in parts
        ]
        for call in calls:
            call.result()

    return run


def bag_runs(kind: str, dtype: torch.dtype, backward: bool, device: str) -> dict[str, Run]:
    tokens = TOKENS[device]
    indices = make_indices(kind, tokens).to(device)
    table = (torch.randn(ROWS, WIDTH, device=device) * 0.1).to(dtype).requires_grad_(backward)
    weights = torch.rand(tokens, LOOKUPS, device=device).requires_grad_(backward)
    peer_weights = weights.detach().to(dtype).requires_grad_(backward)
    d_out = torch.randn(tokens, WIDTH, device=device).to(dtype)

    def ours() -> Tensor:
        return ops.memory_bag(indices, table, weights)

    def peer() -> Tensor:
        return F.embedding_bag(indices, table, per_sample_weights=peer_weights, mode="sum")

    def both(forward: Callable[[], Tensor], *leaves: Tensor) -> Run:
        return lambda: torch.autograd.grad(forward(), leaves, d_out.to(leaves[0].dtype))

    exact = [t.detach().float().requires_grad_(backward) for t in (table, weights)]

    def reference() -> Tensor:
        return F.embedding_bag(indices, exact[0], per_sample_weights=exact[1], mode="sum")

    runs: dict[str, Run] = {"remora": ours, "F.embedding_bag": peer}
    if backward:
        runs = {"remora": both(ours, table, weights), "F.embedding_bag": both(peer, table, peer_weights)}
        results = zip(runs["remora"](), both(reference, *exact)(), strict=True)
    else:
        results = zip([ours()], [reference()], strict=True)
    # embedding_bag adds all lookups of a row one after the other
    bound = 1e-2 if dtype != torch.float32 else 1e-4 if kind == "one row" else 1e-5
    for mine, other in results:
        error = relative_rms(mine, other)
        if not error <= bound:
            raise SystemExit(f"memory_bag and float32 F.embedding_bag differ: relative RMS {error:.1e}")
    try:
        runs["F.embedding_bag"]()
    except NotImplementedError as error:
        print(f"\nF.embedding_bag {dtype}: {error}")
        del runs["F.embedding_bag"]
    if not backward and dtype == torch.float32 and device == "cpu":
        runs["plain gather"] = plain_gather(table, indices)
    return runs


def peer_runs(backward: bool, device: str) -> dict[str, Run]:
    """The experts alone: PEER-pytorch's own tables and formula, from the same choices and scores."""
    indices = make_indices("uniform", PEER_TOKENS).to(device)
    x = torch.randn(PEER_TOKENS, WIDTH, device=device, requires_grad=backward)
    weights = torch.rand(PEER_TOKENS, LOOKUPS, device=device, requires_grad=backward)
    table = (torch.randn(ROWS, 2 * WIDTH, device=device) * 0.1).requires_grad_(backward)
    d_out = torch.randn(PEER_TOKENS, WIDTH, device=device)

    def ours() -> Tensor:
        return ops.peer_bag(indices, table, x, weights)

    runs: dict[str, Run] = {"remora": ours}
    leaves = {"remora": [table, x, weights]}
    from PEER_pytorch import PEER

    module = PEER(
        dim=WIDTH, heads=4, num_experts=ROWS, num_experts_per_head=32, product_key_topk=32, non_competing_scores=False
    ).to(device)
    with torch.no_grad():
        module.weight_down_embed.weight.copy_(table[:, :WIDTH])
        module.weight_up_embed.weight.copy_(table[:, WIDTH:])

    def theirs() -> Tensor:
        choice = indices.view(1, PEER_TOKENS, 4, 32)
        down, up = module.weight_down_embed(choice), module.weight_up_embed(choice)
        hidden = module.activation(torch.einsum("bnd,bnhkd->bnhk", x[None], down)) * weights.view_as(choice)
        return torch.einsum("bnhk,bnhkd->bnd", hidden, up)[0]

    runs["PEER-pytorch"] = theirs
    leaves["PEER-pytorch"] = [module.weight_down_embed.weight, module.weight_up_embed.weight, x, weights]
    error = relative_rms(ours(), theirs())
    if not error <= 1e-5:
        raise SystemExit(f"peer_bag and PEER-pytorch differ: relative RMS {error:.1e}")
    if not backward:
        return runs
    return {
        name: lambda f=forward, name=name: torch.autograd.grad(f(), leaves[name], d_out)
        for name, forward in runs.items()
    }


CASES: dict[str, Callable[[str], dict[str, Run]]] = {
    f"memory_bag {mode} {name} {kind}": lambda device, k=kind, d=dtype, b=mode != "fwd": bag_runs(k, d, b, device)
    for kind in ("uniform", "zipf", "one row")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for mode in ("fwd", "fwd+bwd")
}
CASES |= {
    f"peer_bag {mode} fp32 uniform": lambda device, b=mode != "fwd": peer_runs(b, device) for mode in ("fwd", "fwd+bwd")
}


def waited(run: Run) -> Run:
    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed


def time_cases(o: argparse.Namespace) -> dict[str, Any]:
    measured = {}
    for case, make in CASES.items():
        if not set(o.cases.split()) <= set(case.split()):
            continue
        try:
            runs = make(o.device)
        except ImportError as error:
            print(f"\n{case}: {error}")
            continue
        if o.device == "cuda":
            runs = {name: waited(run) for name, run in runs.items()}
        times = interleave(runs, o.budget)
        rows = []
        for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
            ratio = statistics.median(a / b for a, b in zip(times["remora"], values, strict=True))
            rows.append([name, f"{statistics.median(values) * 1e3:.3f}", len(values), f"{ratio:.2f}"])
        measured[case] = times
        print(f"\n{case}\n{report.table(rows, ['implementation', 'ms', 'n', 'ours/this'])}", flush=True)
    return measured


def count_cases() -> dict[str, Any]:
    """Counters of forward and backward passes small enough to simulate."""
    from remora.testing import sim

    from .counters import flatten

    T, P, N, d = 128, 32, 1024, 512
    counted = {}
    for kind in ("uniform", "one row"):
        for dtype in (torch.float32, torch.bfloat16):
            indices = make_indices(kind, T, N, P).int()
            table = torch.randn(N, d).to(dtype).requires_grad_()
            weights = torch.rand(T, P, requires_grad=True)
            row, number = d * dtype.itemsize, T * P * 4  # bytes of a row, of a number for every lookup
            unique = len(indices.unique())
            passes = {
                "fwd": (T * P * row + T * row + 2 * number, unique * row + T * row + 2 * number),
                "bwd": (
                    (unique + T * P + N) * row + 3 * number,  # rows of the table, of d_out and of the gradient
                    (unique + T + N) * row + 3 * number,
                ),
            }
            rows = []
            for name, compulsory in passes.items():
                out = ops.memory_bag(indices, table, weights) if name == "bwd" else None
                sim.reset_stats()
                with sim.options(memory_stats=1):
                    if out is None:
                        ops.memory_bag(indices, table, weights)
                    else:
                        torch.autograd.grad(out, [table, weights], torch.ones_like(out))
                total: dict[str, float] = {}
                for kernel, stats in sim.stats().items():
                    counters = flatten(stats)
                    requested = counters["load_bytes"] + counters["store_bytes"]
                    touched = counters["load_touched"] + counters["store_touched"]
                    sectors = counters["load_sectors"] + counters["store_sectors"]
                    ideal = counters["load_ideal_sectors"] + counters["store_ideal_sectors"]
                    rows.append([name, kernel, int(requested), int(touched), f"{sectors / max(ideal, 1):.2f}", ""])
                    total["requested"] = total.get("requested", 0) + requested
                    total["touched"] = total.get("touched", 0) + touched
                ratios = [total["requested"] / compulsory[0], total["touched"] / compulsory[1]]
                rows.append([name, "all", int(total["requested"]), int(total["touched"]), "",
                             f"{ratios[0]:.2f} {ratios[1]:.2f}"])  # fmt: skip
            title = f"memory_bag T={T} P={P} N={N} d={d} {dtype} {kind}"
            head = ["pass", "kernel", "requested", "touched", "sectors", "over compulsory"]
            print(f"\n{title}\n{report.table(rows, head)}", flush=True)
            counted[title] = rows
    return counted


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(
        prog="python -m bench bags", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--cases", default="", help="words that the case's name must contain, for example 'fwd fp32'")
    ap.add_argument("--device", default="cpu", choices=tuple(TOKENS))
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--budget", type=float, default=10.0, help="seconds of samples per case")
    ap.add_argument("--json", help="write everything here")
    o = ap.parse_args(argv)
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    host = report.host() | ({"gpu": torch.cuda.get_device_name()} if o.device == "cuda" else {})
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    if _ext.HOST_BACKEND == "sim":
        report.save(o.json, {"kind": "simulated", "host": host, "counts": count_cases()})
    else:
        report.save(o.json, {"kind": "measured", "host": host, "seconds": time_cases(o)})
    return 0
