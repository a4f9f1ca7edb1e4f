"""What SCOUT finds far back, against its mixer alone and against full attention, and what the three cost by length."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
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
from remora.models import LanguageModel, LanguageModelConfig
from remora.models.files import replacing
from remora.models.language_model import IGNORE_INDEX
from remora.modules import Cache
from remora.train.trainer import choose_device, make_optimizer, warmup_then_cosine

RESULTS_NAME = "needle.json"
PLOT_NAME = "needle.png"
NUM_QUESTIONS = 4  # tokens of their own: ask for the needle, ask for the order, first, second


@dataclass(frozen=True)
class NeedleConfig:
    """Settings of the experiment; the same for every model.

    Attributes:
        seeds: runs of each model, with seeds `0 ... seeds - 1` of weights and data.
        hidden_size, num_blocks, num_heads, intermediate_size, initializer_range: shape of the models. A block of SCOUT
            has two attentions; the others have twice as many of one, so that all have as many parameters.
        stride, compress: of SCOUT's segments.
        window: of SCOUT's mixer, and of the mixer alone.
        seq_len: tokens of a sequence.
        num_fillers, num_needles: different tokens of the noise, and different needles.
        steps, batch_size: of the training, in turn on needles and on orders.
        questions: share of the tokens behind the needles that ask for them in training; to measure, only the last does.
        eval_sequences: sequences to measure on for each bin.
        bins: of the depth of the needle, and of the distance between two needles.
        learning_rate, warmup_steps, weight_decay, grad_clip: of the training.
        lengths: tokens at which time and memory are measured.
        device: torch device, or "auto".
        jobs: runs at a time; 0 is one per core on the CPU, and one on a GPU.
    """

    seeds: int = 3
    hidden_size: int = 64
    num_blocks: int = 2
    num_heads: int = 2
    intermediate_size: int = 128
    initializer_range: float = 0.1
    stride: int = 8
    compress: str = "last"
    window: int = 8
    seq_len: int = 64
    num_fillers: int = 32
    num_needles: int = 16
    steps: int = 800
    batch_size: int = 32
    questions: float = 0.2
    eval_sequences: int = 128
    bins: int = 8
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    device: str = "auto"
    jobs: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "eval_sequences", "bins", "window", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_needles < 2 or self.seq_len < self.bins + 5:
            raise ValueError(
                f"num_needles must be at least 2 and seq_len bins + 5 = {self.bins + 5}, "
                f"got {self.num_needles} and {self.seq_len}"
            )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths}")

    @classmethod
    def quick(cls, **given: Any) -> NeedleConfig:
        """Small enough for a minute: it shows that the experiment runs, not what the models can do."""
        small = {
            "seeds": 2, "hidden_size": 32, "num_blocks": 1, "intermediate_size": 64, "seq_len": 40, "steps": 60,
            "eval_sequences": 32, "bins": 4, "lengths": (256, 1024),
        }  # fmt: skip
        return cls(**{**small, **given})

    @property
    def vocab_size(self) -> int:
        return self.num_fillers + self.num_needles + NUM_QUESTIONS

    @property
    def places(self) -> int:
        """Where needles may stand; the question follows."""
        return self.seq_len - 4


def contenders(config: NeedleConfig) -> dict[str, LanguageModelConfig]:
    heads = {"num_heads": config.num_heads}

    def model(num_layers: int, window: int | None, segment_attention: dict[str, Any] | None) -> LanguageModelConfig:
        return LanguageModelConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=num_layers,
            mixer="sliding_window_attention",
            mixer_options={**heads, "window": window},
            intermediate_size=config.intermediate_size,
            segment_attention=segment_attention,
            initializer_range=config.initializer_range,
        )

    segments = {**heads, "stride": config.stride, "compress": config.compress}
    return {
        "SCOUT": model(config.num_blocks, config.window, segments),
        "window alone": model(2 * config.num_blocks, config.window, None),
        "full attention": model(2 * config.num_blocks, None, None),
    }


def needle_batch(
    config: NeedleConfig, places: Tensor, generator: torch.Generator, questions: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Noise with one needle at the given places `[B]`; the last token asks for it, and a share `questions` of those
    between.

    Returns:
        inputs `[B, seq_len]`, and targets: the needle where it is asked for, -100 elsewhere.
    """
    shape = (len(places), config.seq_len)
    inputs = torch.randint(config.num_fillers, shape, generator=generator)
    needles = config.num_fillers + torch.randint(config.num_needles, (len(places),), generator=generator)
    asks = (torch.rand(shape, generator=generator) < questions) & (torch.arange(config.seq_len) > places[:, None])
    asks[:, -1] = True
    inputs[torch.arange(len(places)), places] = needles
    inputs[asks] = config.vocab_size - NUM_QUESTIONS
    return inputs, torch.where(asks, needles[:, None], IGNORE_INDEX)


def order_batch(
    config: NeedleConfig, distances: Tensor, generator: torch.Generator, questions: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Noise with two different needles the given distances `[B]` apart; the last three tokens ask for their order and
    name them in random order, and so does a share `questions` of the triples between.

    Returns:
        inputs `[B, seq_len]`, and targets: at the last token of a question, whether the needle named first came first;
        -100 elsewhere.
    """
    B, rows = len(distances), torch.arange(len(distances))
    inputs = torch.randint(config.num_fillers, (B, config.seq_len), generator=generator)
    first = (torch.rand(B, generator=generator) * (config.places - distances)).long()
    pair = config.num_fillers + torch.rand(B, config.num_needles, generator=generator).argsort(1)[:, :2]
    inputs[rows, first], inputs[rows, first + distances] = pair[:, 0], pair[:, 1]
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for begin in range(config.seq_len - 3, 0, -3):
        swapped = torch.randint(2, (B,), generator=generator)
        asks = (torch.rand(B, generator=generator) < questions) & (first + distances < begin)
        if begin == config.seq_len - 3:
            asks[:] = True
        question = torch.full((B,), config.vocab_size - NUM_QUESTIONS + 1)
        triple = torch.stack([question, pair[rows, swapped], pair[rows, 1 - swapped]], 1)
        inputs[asks, begin : begin + 3] = triple[asks]
        targets[asks, begin + 2] = question[asks] + 1 + swapped[asks]
    return inputs, targets


def bin_edges(config: NeedleConfig) -> list[int]:
    """Of the tokens between a needle and the question, and between two needles."""
    return [1 + round(i * (config.places - 2) / config.bins) for i in range(config.bins + 1)]


def _draw(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, max(low + 1, high), (count,), generator=generator)


def train_and_measure(
    shape: LanguageModelConfig, config: NeedleConfig, seed: int, device: torch.device
) -> dict[str, list[float]]:
    """Train one model; return the share of right answers for every bin."""
    torch.manual_seed(seed)
    model = LanguageModel(shape).to(device)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for batch, low in ((needle_batch, 0), (order_batch, 1)):
                spans = _draw(low, config.places, config.batch_size, generator)
                yield batch(config, spans, generator, config.questions)

    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    for step, (inputs, targets) in zip(range(config.steps), batches()):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_then_cosine(step, config.warmup_steps, config.steps)
        loss = model(inputs.to(device), targets.to(device)).loss
        assert loss is not None
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # The same sequences for all models and seeds, drawn apart from those of the training.
    generator = torch.Generator().manual_seed(2**40)
    edges = bin_edges(config)
    found: dict[str, list[float]] = {"needle": [], "order": []}
    for low, high in itertools.pairwise(edges):
        spans = _draw(low, high, config.eval_sequences, generator)
        for name, (inputs, targets) in (
            ("needle", needle_batch(config, config.places - spans, generator)),
            ("order", order_batch(config, spans, generator)),
        ):
            with torch.no_grad():
                logits = torch.cat([model(part.to(device)).logits[:, -1].cpu() for part in inputs.split(32)])
            found[name].append(float((logits.argmax(-1) == targets[:, -1]).float().mean()))
    return found


@torch.no_grad()
def cost(shape: LanguageModelConfig, length: int, device: torch.device) -> dict[str, float]:
    """Seconds of reading `length` tokens and of one more, medians of three, and bytes of the cache."""
    torch.manual_seed(0)
    model = LanguageModel(shape).to(device)
    tokens = torch.randint(shape.vocab_size, (1, length), device=device)
    prefills, steps, cache = [], [], Cache()
    for _ in range(3):
        cache = Cache()
        prefills.append(_seconds(partial(model, tokens, cache=cache, last_token_only=True), device))
    num_bytes = cache.num_bytes
    steps = [_seconds(partial(model, tokens[:, :1], cache=cache), device) for _ in range(9)]
    return {"prefill": statistics.median(prefills), "step": statistics.median(steps), "bytes": num_bytes}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def run_needle(config: NeedleConfig, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Train and measure every model with every seed; write `needle.json` and `needle.png` to the folder `out`.

    Returns:
        what `needle.json` holds: settings, bins, and per model its parameters, the shares of right answers per bin with
        mean and standard deviation over the seeds, and time and memory by length.

    Raises:
        ValueError: a device is not there.
    """
    start = time.perf_counter()
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.device)
    models = contenders(config)
    runs: dict[tuple[str, ...], Callable[[], dict[str, list[float]]]] = {
        (name, f"seed {seed}"): partial(train_and_measure, shape, config, seed, device)
        for name, shape in models.items()
        for seed in range(config.seeds)
    }
    found = perform_all(runs, config.jobs, device)
    edges = bin_edges(config)
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(config),
        "bins": [[low, max(low, high - 1)] for low, high in itertools.pairwise(edges)],
        "models": {},
    }
    for name, shape in models.items():
        of_seeds = [found[name, f"seed {seed}"] for seed in range(config.seeds)]
        with torch.device("meta"):
            parameters = LanguageModel(shape).num_parameters
        report["models"][name] = {
            "parameters": parameters,
            **{task: [summary([run[task][i] for run in of_seeds]) for i in range(config.bins)]
               for task in ("needle", "order")},
            "cost": {str(length): cost(shape, length, device) for length in config.lengths},
        }  # fmt: skip
    report["seconds"] = round(time.perf_counter() - start, 1)
    with replacing(path / RESULTS_NAME) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with replacing(path / PLOT_NAME) as temporary:
        save_needle_plot(report, temporary)
    return report


def needle_table(report: dict[str, Any]) -> str:
    """The results as text: right answers in percent by the distance of the needle and by that of two needles, then
    milliseconds of reading and of one more token and kilobytes of the cache by length.
    """
    ranges = [f"{low}-{high}" for low, high in report["bins"]]
    answers = [["model", "parameters", "task", *ranges]]
    costs = [["model", "measure", *(f"{length} tokens" for length in report["settings"]["lengths"])]]
    for name, result in report["models"].items():
        for task in ("needle", "order"):
            answers.append([name, str(result["parameters"]), task, *(percent(cell) for cell in result[task])])
        for measure, unit, label in (
            ("prefill", 1e3, "ms to read"),
            ("step", 1e3, "ms a token"),
            ("bytes", 1e-3, "kB"),
        ):
            costs.append([name, label, *(f"{unit * at[measure]:.2f}" for at in result["cost"].values())])
    return text_table(answers) + "\n\n" + text_table(costs)


def save_needle_plot(report: dict[str, Any], path: Path) -> None:
    """Draw right answers over distance, and time and memory over length, as PNG."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    (needle, order), (prefill, memory) = figure.subplots(2, 2)
    settings = report["settings"]
    middles = [(low + high) / 2 for low, high in report["bins"]]
    for name, result in report["models"].items():
        for axis, task in ((needle, "needle"), (order, "order")):
            cells = result[task]
            axis.errorbar(
                middles, [c["mean"] for c in cells], [c["deviation"] for c in cells], marker="o", capsize=3, label=name
            )
        costs = result["cost"].values()
        prefill.plot(settings["lengths"], [1e3 * at["prefill"] for at in costs], marker="o")
        memory.plot(settings["lengths"], [1e-3 * at["bytes"] for at in costs], marker="o")
    needle.axhline(1 / settings["num_needles"], color="grey", linestyle=":", label="chance")
    order.axhline(0.5, color="grey", linestyle=":")
    needle.set(xlabel="tokens from the needle to the question", ylabel="right answers", ylim=(0, 1.02), title="needle")
    order.set(xlabel="tokens between the needles", ylabel="right answers", ylim=(0, 1.02), title="which came first")
    prefill.set(xlabel="tokens", ylabel="milliseconds", title="reading", xscale="log", yscale="log")
    memory.set(xlabel="tokens", ylabel="kilobytes", title="cache", xscale="log", yscale="log")
    needle.legend()
    for axis in (needle, order, prefill, memory):
        axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
