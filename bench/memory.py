"""A whole product-key memory layer, and the optimizer step of its table, beside the same in torch: one process,
interleaved; nothing is timed before its results agree.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import report
from .cpu import Run, interleave, quantile

LEARNING_RATE = 1e-3


def eager_layer(layer: Any, x: Tensor) -> Tensor:
    """The layer as it is commonly written: all k^2 sums of each head, torch.topk, embedding_bag."""
    retrieval = layer.retrieval
    n, k = retrieval.num_keys, retrieval.topk
    query = retrieval.query_proj(x).view(-1, retrieval.num_heads, 2, retrieval.key_dim)
    scores, index = torch.einsum("thad,hand->than", query, retrieval.keys).topk(k, -1)
    pairs = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    slots = (index[:, :, 0, :, None] * n + index[:, :, 1, None, :]).flatten(2)
    best, at = pairs.topk(k, -1)
    return F.embedding_bag(
        slots.gather(-1, at).flatten(1), layer.table.weight, per_sample_weights=best.softmax(-1).flatten(1), mode="sum"
    )


def layer_runs(tokens: int, heads: int, keys: int, topk: int, width: int, backward: bool) -> dict[str, Run]:
    from remora.modules import ProductKeyMemory

    torch.manual_seed(0)
    layer = ProductKeyMemory(width, keys, topk, heads, width // 2, query_norm="none")
    x, d = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    parameters = [x, *layer.parameters()]

    def run(function: Any) -> Run:
        def call() -> dict[str, Tensor]:
            if not backward:
                with torch.no_grad():
                    return {"y": function(x)}
            y = function(x)
            grads = torch.autograd.grad(y, parameters, d)
            return {"y": y.detach(), **{f"d{i}": grad for i, grad in enumerate(grads)}}

        return call

    return {"remora": run(layer), "torch eager": run(lambda x: eager_layer(layer, x))}


def optimizer_runs(num_rows: int, width: int, touched: int) -> dict[str, Run]:
    """One step on a gradient of `touched` rows: torch's SparseAdam on the same rows, its fused AdamW on all."""
    from remora.ops import sparse_adamw_

    torch.manual_seed(0)
    rows = torch.randperm(num_rows)[:touched].sort().values
    values = torch.randn(touched, width)
    start = torch.randn(num_rows, width)

    def parameter(grad: Tensor) -> torch.nn.Parameter:
        p = torch.nn.Parameter(start.clone())
        p.grad = grad
        return p

    ours, m, v, step = start.clone(), torch.zeros_like(start), torch.zeros_like(start), [0]

    def sparse_adamw() -> dict[str, Tensor]:
        step[0] += 1
        sparse_adamw_(ours, m, v, rows, values, lr=LEARNING_RATE, step=step[0], weight_decay=0.0)
        return {"table": ours}

    sparse = parameter(torch.sparse_coo_tensor(rows[None], values, start.shape, is_coalesced=True))
    dense = parameter(torch.zeros_like(start).index_copy_(0, rows, values))
    peers = {
        "torch SparseAdam": (torch.optim.SparseAdam([sparse], lr=LEARNING_RATE), sparse),
        "torch AdamW, all rows": (torch.optim.AdamW([dense], lr=LEARNING_RATE, weight_decay=0.0, fused=True), dense),
    }

    def run(optimizer: Any, p: torch.nn.Parameter) -> Run:
        def call() -> dict[str, Tensor]:
            optimizer.step()
            return {"table": p.detach()}

        return call

    return {"remora": sparse_adamw, **{name: run(*peer) for name, peer in peers.items()}}


def check(runs: dict[str, Run]) -> None:
    """Raises if an implementation's results after one call are not those of ours."""
    want = {name: tensor.clone() for name, tensor in runs["remora"]().items()}
    for name, run in runs.items():
        if name == "remora":
            continue
        for output, tensor in run().items():
            error = float((tensor - want[output]).norm() / want[output].norm())
            if not error < 1e-4:
                raise ValueError(f"{output} of {name} differs from ours by {error:.1e}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--keys", type=int, default=512)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--touched", type=int, default=4096, help="rows with a gradient, of the optimizers")
    parser.add_argument("--rows", type=int, default=65536, help="rows of the optimizers' table")
    parser.add_argument("--cases", choices=("layer", "optimizer"), help="default: both")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of samples per case")
    parser.add_argument("--json", help="write everything here")
    o = parser.parse_args(argv)
    host = report.host()
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    shape = f"T={o.tokens} H={o.heads} n={o.keys} k={o.topk} d={o.width} fp32"
    document: dict[str, Any] = {"kind": "measured", "host": host, "cases": []}
    cases = []
    if o.cases != "optimizer":
        for name, backward in (("forward", False), ("forward+backward", True)):
            cases.append((f"memory layer, {name}, {shape}",
                          lambda b=backward: layer_runs(o.tokens, o.heads, o.keys, o.topk, o.width, b)))  # fmt: skip
    if o.cases != "layer":
        cases.append((f"optimizer step, {o.touched} of {o.rows} rows, d={o.width} fp32",
                      lambda: optimizer_runs(o.rows, o.width, o.touched)))  # fmt: skip
    for name, make in cases:
        runs = make()
        check(runs)
        times = interleave(runs, o.budget)
        rows = []
        for run, values in times.items():
            ratio = statistics.median(b / a for a, b in zip(times["remora"], values, strict=True))
            rows.append([run, f"{statistics.median(values) * 1e3:.1f}", f"{quantile(values, 0.2) * 1e3:.1f}",
                         f"{quantile(values, 0.8) * 1e3:.1f}", len(values), f"{ratio:.2f}"])  # fmt: skip
        print(f"\n{name}\n" + report.table(rows, ["implementation", "ms", "p20", "p80", "n", "times ours"]), flush=True)
        document["cases"].append({"case": name, "seconds": times})
    if o.json:
        with open(o.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
    return 0
