"""Recall of a mixture of memories against one memory: of as many numbers of state, and of as many parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from remora.experiments.report import percent, summary, text_table
from remora.experiments.runs import perform_all
from remora.experiments.tasks import NameWindows, all_right, recall_batch, share_right
from remora.models import LanguageModel, LanguageModelConfig
from remora.models.files import replacing
from remora.modules import Cache
from remora.train.data import Corpus, TrainingWindows, load_corpus
from remora.train.trainer import choose_device, make_optimizer, warmup_then_cosine

RESULTS_NAME = "recall.json"
PLOT_NAME = "recall.png"


@dataclass(frozen=True)
class RecallConfig:
    """Settings of the experiment; the same for every model.

    Attributes:
        seeds: runs of each model and task, with seeds `0 ... seeds - 1` of weights and data.
        hidden_size, num_layers, intermediate_size, initializer_range: shape of the models, and the deviation of their
            first weights, which for a width of 64 is best larger than for language models.
        num_heads, head_dim, num_memories, topk: of the mixture of memories.
        num_symbols: different keys, and different values, of the associative recall.
        pairs: numbers of key-value pairs; a batch of the training holds one of them, in turn.
        recall_steps, recall_tokens: optimizer steps, and tokens in a batch, of the associative recall.
        eval_sequences: sequences to measure on for each number of pairs.
        data: file or folder of text; None is the Python standard library's source.
        text_steps, text_batch, text_seq_len: optimizer steps and batches of the language model on text.
        text_windows: repeated names to measure on.
        learning_rate, warmup_steps, weight_decay, grad_clip, balance_coefficient: of every training.
        device: torch device, or "auto".
        jobs: runs at a time, each in a process of its own with its share of the cores; 0 is one per core on the CPU,
            and one on a GPU. Results do not depend on it as long as every run has one thread.
    """

    seeds: int = 3
    hidden_size: int = 64
    num_layers: int = 2
    intermediate_size: int = 128
    initializer_range: float = 0.1
    num_heads: int = 2
    head_dim: int = 16
    num_memories: int = 4
    topk: int = 2
    num_symbols: int = 32
    pairs: tuple[int, ...] = (2, 4, 8, 16, 32)
    recall_steps: int = 1000
    recall_tokens: int = 2048
    eval_sequences: int = 256
    data: str | None = None
    text_steps: int = 400
    text_batch: int = 4
    text_seq_len: int = 256
    text_windows: int = 512
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    balance_coefficient: float = 0.01
    device: str = "auto"
    jobs: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "recall_steps", "text_steps", "eval_sequences", "text_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.jobs < 0:
            raise ValueError(f"jobs must be at least 0, got {self.jobs}")
        if not self.pairs or max(self.pairs) > self.num_symbols or min(self.pairs) < 1:
            raise ValueError(f"pairs must be in 1 ... num_symbols={self.num_symbols}, got {self.pairs}")

    @classmethod
    def quick(cls, **given: Any) -> RecallConfig:
        """Small enough for a minute: it shows that the experiment runs, not who wins it."""
        small = {
            "seeds": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_symbols": 16,
            "pairs": (2, 4, 8), "recall_steps": 60, "recall_tokens": 512, "eval_sequences": 64,
            "text_steps": 30, "text_batch": 2, "text_seq_len": 192, "text_windows": 64,
        }  # fmt: skip
        return cls(**{**small, **given})


def contenders(config: RecallConfig, vocab_size: int) -> dict[str, LanguageModelConfig]:
    """The models: the mixture, and one memory with its state size and one with its number of parameters."""
    heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    mixture = LanguageModelConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        mixer="mixture_of_memories",
        mixer_options={**heads, "expand_v": 1.0, "num_memories": config.num_memories, "topk": config.topk},
        intermediate_size=config.intermediate_size,
        initializer_range=config.initializer_range,
    )

    def single(**options: Any) -> LanguageModelConfig:
        return dataclasses.replace(mixture, mixer="gated_delta_net", mixer_options={**heads, **options})

    # The shared memory is one more.
    same_state = single(expand_v=float(config.num_memories + 1))
    wanted = num_parameters(mixture)
    by_heads = [single(expand_v=1.0, num_heads=n) for n in range(1, 8 * config.num_heads + 1)]
    same_parameters = min(by_heads, key=lambda candidate: abs(num_parameters(candidate) - wanted))
    return {"mixture of memories": mixture, "one memory, equal state": same_state,
            "one memory, equal parameters": same_parameters}  # fmt: skip


def num_parameters(config: LanguageModelConfig) -> int:
    with torch.device("meta"):
        return LanguageModel(config).num_parameters


@torch.no_grad()
def state_size(config: LanguageModelConfig) -> int:
    """Numbers of recurrent state that a sequence has in all layers."""
    cache = Cache()
    LanguageModel(config)(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    states = (cache.get(layer_idx) for layer_idx in cache.layers)
    return sum(state.recurrent_state.numel() for state in states if state is not None)


def run_recall(config: RecallConfig, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Train and measure every model with every seed; write `recall.json` and `recall.png` to the folder `out`.

    Returns:
        what `recall.json` holds: settings, sizes, and per model the accuracies of all seeds with mean and standard
        deviation (of the sample; 0 for one seed).

    Raises:
        ValueError: the text has no repeated names, or a device is not there.
        FileNotFoundError: there is no such text.
    """
    start = time.perf_counter()
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.device)
    corpus = load_corpus(config.data)
    names = NameWindows.find(corpus.validation, corpus.train, config.text_seq_len, config.text_windows)
    recall_models = contenders(config, 2 * config.num_symbols)
    text_models = contenders(config, 256)
    # The slowest first: what is left over at the end is short.
    runs: dict[tuple[str, ...], Callable[[], dict[str, float]]] = {}
    for name, shape in recall_models.items():
        for seed in range(config.seeds):
            runs["recall", name, f"seed {seed}"] = partial(_recall_run, shape, config, seed, device)
    for name, shape in text_models.items():
        for seed in range(config.seeds):
            runs["text", name, f"seed {seed}"] = partial(_text_run, shape, config, corpus, names, seed, device)
    found = perform_all(runs, config.jobs, device)
    results: dict[str, Any] = {}
    for name in recall_models:
        recall_runs, text_runs = (
            [found[task, name, f"seed {seed}"] for seed in range(config.seeds)] for task in ("recall", "text")
        )
        results[name] = {
            "parameters": num_parameters(recall_models[name]),
            "parameters_text": num_parameters(text_models[name]),
            "state": state_size(recall_models[name]),
            "recall": {str(pairs): summary([run[str(pairs)] for run in recall_runs]) for pairs in config.pairs},
            "names": summary([run["names"] for run in text_runs]),
            "bytes_of_names": summary([run["bytes"] for run in text_runs]),
            "bits_per_byte_of_names": summary([run["bits"] for run in text_runs]),
        }
    report = {
        "settings": dataclasses.asdict(config),
        "text": corpus.description,
        "names": names.inputs.shape[0],
        "seconds": round(time.perf_counter() - start, 1),
        "models": results,
    }
    with replacing(path / RESULTS_NAME) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with replacing(path / PLOT_NAME) as temporary:
        save_recall_plot(report, temporary)
    return report


def _train(model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], steps: int, config: RecallConfig) -> None:
    """The training that all models share."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_then_cosine(step, config.warmup_steps, steps)
        inputs, targets = next(batches)
        loss = model(inputs.to(device), targets.to(device)).loss
        for routing in model.routing:
            loss = loss + config.balance_coefficient / len(model.layers) * routing.balance_loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _recall_run(shape: LanguageModelConfig, config: RecallConfig, seed: int, device: torch.device) -> dict[str, float]:
    """Train on associative recall; return the accuracy for every number of pairs."""
    torch.manual_seed(seed)
    model = LanguageModel(shape).to(device)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for pairs in config.pairs:
                yield recall_batch(pairs, max(1, config.recall_tokens // (4 * pairs)), config.num_symbols, generator)

    _train(model, batches(), config.recall_steps, config)
    # The same sequences for all models and seeds, drawn apart from those of the training.
    generator = torch.Generator().manual_seed(2**40)
    result = {}
    with torch.no_grad():
        for pairs in config.pairs:
            inputs, targets = recall_batch(pairs, config.eval_sequences, config.num_symbols, generator)
            logits = torch.cat([model(chunk.to(device)).logits.cpu() for chunk in inputs.split(32)])
            result[str(pairs)] = share_right(logits, targets)
    return result


def _text_run(
    shape: LanguageModelConfig,
    config: RecallConfig,
    corpus: Corpus,
    names: NameWindows,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Train on text; return of the repeated names the share completed without a wrong byte, the share of their bytes
    that are right, and their bits per byte.
    """
    torch.manual_seed(seed)
    model = LanguageModel(shape).to(device)
    windows = TrainingWindows(corpus.train, config.text_seq_len, seed)
    batches = (windows.batch(step * config.text_batch, config.text_batch) for step in range(config.text_steps))
    _train(model, batches, config.text_steps, config)
    right, right_bytes, nats, count = 0, 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, targets in zip(names.inputs.split(16), names.targets.split(16), strict=True):
            logits, loss = model(inputs.to(device), targets.to(device))
            counted = int((targets >= 0).sum())
            right += int(all_right(logits.cpu(), targets).sum())
            right_bytes += share_right(logits.cpu(), targets) * counted
            nats, count = nats + float(loss) * counted, count + counted
    return {"names": right / names.inputs.shape[0], "bytes": right_bytes / count, "bits": nats / count / math.log(2)}


def recall_table(report: dict[str, Any]) -> str:
    """The results as text: per model its sizes and, as mean and deviation over the seeds, the accuracy for every number
    of pairs, the share of right bytes of repeated names and of names without a wrong one, in percent, and their bits
    per byte.
    """
    pairs = [str(number) for number in report["settings"]["pairs"]]
    columns = (*(f"{number} pairs" for number in pairs), "bytes of names", "whole names", "bits of names")
    rows = [["model", "parameters", "state", *columns]]
    for name, result in report["models"].items():
        shares = [*(result["recall"][number] for number in pairs), result["bytes_of_names"], result["names"]]
        cells = [percent(cell) for cell in shares]
        bits = result["bits_per_byte_of_names"]
        cells.append(f"{bits['mean']:.2f} ± {bits['deviation']:.2f}")
        rows.append([name, str(result["parameters"]), str(result["state"]), *cells])
    return text_table(rows)


def save_recall_plot(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy over the number of pairs, and of the names, as PNG."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    recall, names = figure.subplots(1, 2, width_ratios=(2, 1))
    pairs = report["settings"]["pairs"]
    for idx, (name, result) in enumerate(report["models"].items()):
        cells = [result["recall"][str(number)] for number in pairs]
        recall.errorbar(
            pairs, [c["mean"] for c in cells], [c["deviation"] for c in cells], marker="o", capsize=3, label=name
        )
        right = result["bytes_of_names"]
        names.bar(idx, right["mean"], yerr=right["deviation"], capsize=3)
    recall.set_xscale("log", base=2)
    recall.set(xlabel="key-value pairs", ylabel="accuracy", ylim=(0, 1.02), title="associative recall")
    recall.grid(alpha=0.3)
    recall.legend()
    names.set(ylabel="right bytes", title="repeated names in text", xticks=[])
    figure.savefig(path, format="png", dpi=120)
