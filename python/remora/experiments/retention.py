"""Retention of few-shot memories: how long a fact survives training on others, in a memory layer and in a dense one.

A fact is a random key, three symbols, and a random value. Facts are written by gradient descent: each stands in one to
five batches, and then in none. Afterwards training goes on with fresh facts, each shown once, and the written ones are
probed: recognition, whether the right value scores above one other value; and recall, whether it scores above all.

The protocol follows the tests of few-shot memory of language models: recognition, recall and retention after a fact was
seen a few times, against the number of updates since.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from remora.experiments.report import percent, summary, text_table
from remora.models.files import replacing
from remora.modules import ProductKeyMemory, RMSNorm, SwiGLU, UltraMemV2
from remora.optim import SparseAdamW, clip_grad_norm_
from remora.train.trainer import choose_device

RESULTS_NAME = "retention.json"
PLOT_NAME = "retention.png"
KEY_LENGTH = 3
MEASURES = ("recognition", "recall")


@dataclass(frozen=True)
class RetentionConfig:
    """Settings of the experiment; the same for every model.

    Attributes:
        seeds: runs of each model, with seeds `0 ... seeds - 1` of weights and facts.
        hidden_size, num_layers: shape of the models.
        num_keys, topk, num_heads: `n`, `k` and `H` of the memories: `n^2` slots a layer.
        num_symbols, num_values: of which keys and values are made.
        facts: facts to write for each number of exposures.
        max_exposures: facts are shown once, twice, ... so many times.
        batch_size: facts in a batch; half of them are written ones while these are written.
        warmup_updates: updates on fresh facts before.
        updates: numbers of updates on fresh facts after which to probe.
        learning_rate, grad_clip: of every training; AdamW without weight decay.
        device: torch device, or "auto".
    """

    seeds: int = 3
    hidden_size: int = 64
    num_layers: int = 2
    num_keys: int = 64
    topk: int = 8
    num_heads: int = 2
    num_symbols: int = 32
    num_values: int = 64
    facts: int = 100
    max_exposures: int = 5
    batch_size: int = 32
    warmup_updates: int = 200
    updates: tuple[int, ...] = (0, 10, 30, 100, 300, 1000)
    learning_rate: float = 3e-3
    grad_clip: float = 1.0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("seeds", "facts", "max_exposures", "batch_size", "num_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.updates or min(self.updates) < 0 or list(self.updates) != sorted(set(self.updates)):
            raise ValueError(f"updates must rise from 0 or more, got {self.updates}")
        if self.num_symbols**KEY_LENGTH < 2 * self.facts * self.max_exposures:
            raise ValueError(
                f"num_symbols^{KEY_LENGTH} must be at least twice the {self.facts * self.max_exposures} facts, got "
                f"num_symbols = {self.num_symbols}"
            )

    @classmethod
    def quick(cls, **given: Any) -> RetentionConfig:
        """Small enough for a minute: it shows that the experiment runs, not who wins it."""
        small = {"seeds": 2, "hidden_size": 32, "num_keys": 32, "topk": 4, "facts": 30, "warmup_updates": 40,
                 "updates": (0, 10, 30, 100)}  # fmt: skip
        return cls(**{**small, **given})


class FactModel(nn.Module):
    """Residual blocks over the summed embeddings of a key's symbols: `x + ffn(norm(x))`, `+ memory(norm(x))`."""

    places: Tensor

    def __init__(self, config: RetentionConfig, intermediate_size: int, memory: str | None) -> None:
        super().__init__()
        D = config.hidden_size
        self.symbols = nn.Embedding(KEY_LENGTH * config.num_symbols, D)
        self.register_buffer("places", torch.arange(KEY_LENGTH) * config.num_symbols, persistent=False)
        self.norms = nn.ModuleList(RMSNorm(D) for _ in range(config.num_layers))
        self.ffns = nn.ModuleList(SwiGLU(D, intermediate_size) for _ in range(config.num_layers))
        self.memories = nn.ModuleList(make_memory(config, memory, intermediate_size) for _ in range(config.num_layers))
        self.norm = RMSNorm(D)
        self.head = nn.Linear(D, config.num_values, bias=False)

    def forward(self, keys: Tensor) -> Tensor:
        """Scores of the values, `[B, values]`, for keys `[B, 3]`."""
        x = self.symbols(keys + self.places).sum(1)
        for norm, ffn, memory in zip(self.norms, self.ffns, self.memories, strict=True):
            h = norm(x)
            x = x + ffn(h) + (0 if isinstance(memory, nn.Identity) else memory(h))
        scores: Tensor = self.head(self.norm(x))
        return scores


def make_memory(config: RetentionConfig, name: str | None, intermediate_size: int) -> nn.Module:
    D, half, quarter = config.hidden_size, config.hidden_size // 2, config.hidden_size // 4
    if name == "product_key_memory":
        return ProductKeyMemory(
            D, config.num_keys, config.topk, config.num_heads, quarter, query_norm="rms", sparse_grad=True
        )
    if name == "ultramem_v2":
        return UltraMemV2(
            D, config.num_keys, config.topk * config.num_heads, quarter, quarter, half, num_layers=config.num_layers,
            ffn_expansion=intermediate_size / D, sparse_grad=True,
        )  # fmt: skip
    return nn.Identity()


def memory_flops(config: RetentionConfig, name: str | None) -> int:
    """Floating-point operations of a memory layer for one token: queries, scores, sums of values, projections."""
    D, n, ds = config.hidden_size, config.num_keys, config.hidden_size // 4
    lookups = config.topk * config.num_heads
    if name == "product_key_memory":
        return 4 * D * config.num_heads * ds + 4 * config.num_heads * n * ds + 2 * lookups * D
    if name == "ultramem_v2":
        dp, dv, r, h, k1 = D // 4, D // 2, 2, 2, min(128, n)
        scores = 4 * D * ds * r + 4 * n * ds * r + 4 * n * r + 2 * h * (r * r * k1 + r * k1 * k1)
        return scores + 2 * lookups * (dp + dv) + 2 * D * (dp + dv)
    return 0


def ffn_flops(hidden_size: int, intermediate_size: int) -> int:
    return 6 * hidden_size * intermediate_size


def contenders(config: RetentionConfig) -> dict[str, tuple[str | None, int]]:
    """Per model: its memory, and the inner width of its feed-forward layers, so that all take the same operations."""
    names = {"product-key memory": "product_key_memory", "UltraMemV2": "ultramem_v2"}
    base, D = 2 * config.hidden_size, config.hidden_size
    total = max(memory_flops(config, name) for name in names.values()) + ffn_flops(D, base)
    widths = {label: (name, round((total - memory_flops(config, name)) / (6 * D))) for label, name in names.items()}
    return {"dense": (None, round(total / (6 * D))), **widths}


@dataclass(frozen=True)
class Facts:
    """Keys `[facts, 3]`, values `[facts]`, another value for each, and how often each is shown."""

    keys: Tensor
    values: Tensor
    foils: Tensor
    exposures: Tensor

    @classmethod
    def draw(cls, config: RetentionConfig, generator: torch.Generator) -> Facts:
        count = config.facts * config.max_exposures
        codes = torch.randperm(config.num_symbols**KEY_LENGTH, generator=generator)[:count]
        values = torch.randint(config.num_values, (count,), generator=generator)
        foils = (
            values + torch.randint(1, max(2, config.num_values), (count,), generator=generator)
        ) % config.num_values
        exposures = torch.arange(count) % config.max_exposures + 1
        return cls(key_of(codes, config), values, foils, exposures)


def key_of(codes: Tensor, config: RetentionConfig) -> Tensor:
    base = config.num_symbols
    return torch.stack([codes // base**i % base for i in range(KEY_LENGTH)], dim=-1)


def fresh_facts(
    config: RetentionConfig, written: Facts, generator: torch.Generator, count: int
) -> tuple[Tensor, Tensor]:
    """Keys that are none of the written ones, and values."""
    powers = config.num_symbols ** torch.arange(KEY_LENGTH)
    taken = torch.zeros(config.num_symbols**KEY_LENGTH, dtype=torch.bool)
    taken[(written.keys * powers).sum(1)] = True
    codes = torch.randint(len(taken), (2 * count + 64,), generator=generator)
    codes = codes[~taken[codes]][:count]
    return key_of(codes, config), torch.randint(config.num_values, (len(codes),), generator=generator)


def writing_batches(
    config: RetentionConfig, written: Facts, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every written fact as often as it is shown, in random order, half of each batch; fresh facts fill it up."""
    order = torch.repeat_interleave(torch.arange(len(written.keys)), written.exposures)
    order = order[torch.randperm(len(order), generator=generator)]
    for chosen in order.split(max(1, config.batch_size // 2)):
        keys, values = fresh_facts(config, written, generator, config.batch_size - len(chosen))
        yield torch.cat([written.keys[chosen], keys]), torch.cat([written.values[chosen], values])


@torch.no_grad()
def probe(model: FactModel, facts: Facts, config: RetentionConfig) -> dict[str, list[float]]:
    """Shares of facts recognised and recalled, for each number of exposures."""
    device = model.head.weight.device
    model.eval()
    scores = model(facts.keys.to(device)).cpu()
    model.train()
    right = scores.gather(1, facts.values[:, None])[:, 0]
    recognised = right > scores.gather(1, facts.foils[:, None])[:, 0]
    recalled = scores.argmax(1) == facts.values
    groups = [facts.exposures == count for count in range(1, config.max_exposures + 1)]
    return {
        "recognition": [float(recognised[group].float().mean()) for group in groups],
        "recall": [float(recalled[group].float().mean()) for group in groups],
    }


def run_once(
    config: RetentionConfig, memory: str | None, width: int, seed: int, device: torch.device, bar: Any
) -> list[dict[str, list[float]]]:
    """Train one model; return what it recognises and recalls at every number of updates."""
    torch.manual_seed(seed)
    model = FactModel(config, width, memory).to(device)
    generator = torch.Generator().manual_seed(seed)
    written = Facts.draw(config, generator)
    optimizer = SparseAdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def update(keys: Tensor, values: Tensor) -> None:
        loss = F.cross_entropy(model(keys.to(device)), values.to(device))
        loss.backward()
        clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()

    for _ in range(config.warmup_updates):
        update(*fresh_facts(config, written, generator, config.batch_size))
    for batch in writing_batches(config, written, generator):
        update(*batch)
    probes, done = [], 0
    for updates in config.updates:
        for _ in range(updates - done):
            update(*fresh_facts(config, written, generator, config.batch_size))
        done = updates
        probes.append(probe(model, written, config))
    return probes


def run_retention(config: RetentionConfig, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Train and probe every model with every seed; write `retention.json` and `retention.png` to the folder `out`.

    Returns:
        what `retention.json` holds: settings, and per model its size and, for every number of updates, recognition and
        recall of all facts and by number of exposures, with mean and standard deviation over the seeds.

    Raises:
        ValueError: a device is not there.
    """
    start = time.perf_counter()
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.device)
    models = contenders(config)
    exposures = config.facts * config.max_exposures * (config.max_exposures + 1) // 2
    writing = -(-exposures // max(1, config.batch_size // 2))
    steps = config.warmup_updates + writing + config.updates[-1]
    report: dict[str, Any] = {"settings": dataclasses.asdict(config), "models": {}}
    with tqdm(total=len(models) * config.seeds * steps, unit="update") as bar:
        for name, (memory, width) in models.items():
            runs = []
            for seed in range(config.seeds):
                bar.set_description(f"{name}, seed {seed}")
                runs.append(run_once(config, memory, width, seed, device, bar))
            report["models"][name] = {
                "parameters": sum(p.numel() for p in FactModel(config, width, memory).parameters()),
                "flops_per_token_and_layer": ffn_flops(config.hidden_size, width) + memory_flops(config, memory),
                "probes": [
                    {"updates": updates} | {measure: _over_seeds(runs, i, measure) for measure in MEASURES}
                    for i, updates in enumerate(config.updates)
                ],
            }
            # After every model, so that an interrupted run leaves what it has.
            report["seconds"] = round(time.perf_counter() - start, 1)
            with replacing(path / RESULTS_NAME) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with replacing(path / PLOT_NAME) as temporary:
        save_retention_plot(report, temporary)
    return report


def _over_seeds(runs: list[list[dict[str, list[float]]]], at: int, measure: str) -> dict[str, Any]:
    """Shares over all facts and by number of exposures, at one probe."""
    shares = [run[at][measure] for run in runs]
    return {
        "all": summary([sum(share) / len(share) for share in shares]),
        "by_exposures": [summary(list(of_seeds)) for of_seeds in zip(*shares, strict=True)],
    }


def retention_table(report: dict[str, Any]) -> str:
    """Recognition and recall in percent, mean and deviation over the seeds, by model and updates since the writing."""
    updates = [str(number) for number in report["settings"]["updates"]]
    rows = [["model", "parameters", "measure", *(f"{number} updates" for number in updates)]]
    for name, result in report["models"].items():
        for measure in MEASURES:
            cells = [percent(at[measure]["all"]) for at in result["probes"]]
            rows.append([name, str(result["parameters"]), measure, *cells])
    return text_table(rows)


def save_retention_plot(report: dict[str, Any], path: Path) -> None:
    """Draw recognition and recall over updates, and recall over exposures right after the writing, as PNG."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    settings = report["settings"]
    updates, counts = settings["updates"], range(1, settings["max_exposures"] + 1)
    for name, result in report["models"].items():
        for axis, measure in zip(axes, MEASURES, strict=False):
            cells = [at[measure]["all"] for at in result["probes"]]
            axis.errorbar(
                updates, [c["mean"] for c in cells], [c["deviation"] for c in cells], marker="o", capsize=3, label=name
            )
        cells = result["probes"][0]["recall"]["by_exposures"]
        axes[2].errorbar(counts, [c["mean"] for c in cells], [c["deviation"] for c in cells], marker="o", capsize=3)
    for axis, measure, chance in ((axes[0], "recognition", 0.5), (axes[1], "recall", 1 / settings["num_values"])):
        axis.axhline(chance, color="grey", linestyle=":", label="chance")
        axis.set_xscale("symlog", linthresh=10)
        axis.set(xlabel="updates since", ylabel=measure, title=f"{measure} of facts seen 1 to {counts[-1]} times")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set(xlabel="exposures", ylabel="recall", title=f"recall after {updates[0]} updates")
    axes[2].grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
