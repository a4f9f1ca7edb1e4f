"""The training run: model, optimizer, data position and log, and how they survive an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from remora import _ext
from remora.models import LanguageModel, LanguageModelConfig
from remora.models.files import replacing
from remora.modules import GroupedLinear, MemoryTable
from remora.optim import SparseAdamW, clip_grad_norm_
from remora.train.data import TrainingWindows, ValidationWindows, load_corpus
from remora.train.ngram import ByteNgram
from remora.train.plot import save_loss_curve, save_memory_usage

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"
CURVE_NAME = "loss.png"
USAGE_NAME = "memories.png"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a resumed run may set anew; everything else is fixed by its first step.
CHANGEABLE = frozenset({"data", "steps", "device", "eval_every", "eval_bytes", "checkpoint_every"})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        data: file or folder of text; None is the Python standard library's source.
        mixer: registered name of the token mixer.
        num_memories, topk: of the mixture of memories, how many there are and how many of them a token chooses.
        balance_coefficient: weight of the routers' balance loss, the mean over the layers, in the training loss. Every
            layer is balanced on its own; the released implementation pools the tokens of all layers, so that layers
            may make up for each other.
        memory: "ultramem_v2" puts a memory layer beside every feed-forward layer; None has none.
        memory_num_keys, memory_topk: of the memory layers, sub-keys of an axis and slots that a token reads.
        segment_stride: tokens of a segment of SCOUT's attention, which then follows every block; None has none.
        compress: how its segments are compressed.
        window: of the mixer "sliding_window_attention".
        hidden_size, num_layers, num_heads, head_dim, intermediate_size: shape of the model.
        steps: optimizer steps.
        batch_size: windows per step.
        seq_len: bytes per window.
        learning_rate: its peak, reached after `warmup_steps`; it then falls to zero along a cosine.
        warmup_steps: steps over which the learning rate rises linearly.
        weight_decay: AdamW's, on matrices only.
        grad_clip: largest gradient norm.
        seed: of the initial weights and of the order of the data.
        dtype: compute dtype ("float32" or "bfloat16"; parameters are always float32), or "auto": bfloat16 on a GPU.
        device: torch device, or "auto": a GPU if there is one that remora has kernels for.
        eval_every: steps between validations; 0 validates only at the end.
        eval_bytes: bytes of the validation split to measure on.
        checkpoint_every: steps between checkpoints; 0 writes one only at the end.
    """

    data: str | None = None
    mixer: str = "mixture_of_memories"
    num_memories: int = 4
    topk: int = 2
    balance_coefficient: float = 0.01
    memory: str | None = None
    memory_num_keys: int = 64
    memory_topk: int = 16
    segment_stride: int | None = None
    compress: str = "last"
    window: int = 64
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    steps: int = 800
    batch_size: int = 4
    seq_len: int = 256
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    eval_every: int = 200
    eval_bytes: int = 65536
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "eval_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be one of 'auto', 'float32', 'bfloat16', got {self.dtype!r}")

    @property
    def model(self) -> LanguageModelConfig:
        heads: dict[str, Any] = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        options = {
            "mamba": {},
            "mixture_of_memories": {**heads, "expand_v": 1.0, "num_memories": self.num_memories, "topk": self.topk},
            "sliding_window_attention": {**heads, "window": self.window},
        }.get(self.mixer, {**heads, "expand_v": 1.0})
        segment_attention = {**heads, "stride": self.segment_stride, "compress": self.compress}
        memory_options = {"num_keys": self.memory_num_keys, "topk": self.memory_topk, "sparse_grad": True}
        return LanguageModelConfig(
            vocab_size=256,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            mixer=self.mixer,
            mixer_options=options,
            intermediate_size=self.intermediate_size,
            memory=self.memory,
            memory_options=memory_options if self.memory else {},
            segment_attention=segment_attention if self.segment_stride else None,
        )


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU if torch sees one and remora's kernels for it are loaded.

    Raises:
        ValueError: it is a GPU and there is none, or no kernels for it.
    """
    why_no_gpu = None
    if not torch.cuda.is_available():
        why_no_gpu = "torch sees no GPU"
    elif not _ext.LIBRARIES["cuda"].loaded:
        why_no_gpu = f"remora's CUDA kernels are not loaded: {_ext.LIBRARIES['cuda'].reason}"
    if name == "auto":
        return torch.device("cuda" if why_no_gpu is None else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and why_no_gpu is not None:
        raise ValueError(f"device {name!r} cannot be used: {why_no_gpu}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype of that name; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


class Trainer:
    """A training run in a folder.

    The folder receives `config.json` and `model.safetensors` (the model to use), `checkpoint.pt` (everything needed to
    go on: model, optimizer, random state, data position), `log.jsonl` (one line per step and per validation),
    `loss.png`, and of a model with routers `memories.png`. Every file is replaced in one step, so the folder is usable
    whenever the process dies.

    A run that is interrupted and resumed ends with bitwise the same weights as one that is not.

    Args:
        config: settings of the run.
        out: the run's folder.
        resume: continue from the checkpoint in the folder.

    Raises:
        ValueError: a setting is out of range, the folder holds another run, or the data is not that of the checkpoint.
        FileNotFoundError: there is no such text, or nothing to resume.
    """

    def __init__(self, config: TrainConfig, out: str | os.PathLike[str], resume: bool = False) -> None:
        self.config = config
        self.out = Path(out)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        checkpoint = load_checkpoint(self.out) if resume else None
        if checkpoint is None and (self.out / CHECKPOINT_NAME).exists():
            raise ValueError(f"{self.out} holds a run already: resume it, or choose another folder")

        self.corpus = load_corpus(config.data)
        self.windows = TrainingWindows(self.corpus.train, config.seq_len, config.seed)
        self.validation = ValidationWindows.spread(self.corpus.validation, config.seq_len, config.eval_bytes)
        self.baseline = ByteNgram(self.corpus.train).bits_per_byte(
            self.validation.contexts.numpy(), self.validation.targets.numpy()
        )
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.optimizer = make_optimizer(self.model, config.learning_rate, config.weight_decay)
        self.step = 0
        self.num_windows_read = 0
        self.seconds = 0.0
        self.log: list[dict[str, Any]] = []
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def run(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`; return whether it was interrupted.

        Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_log()
        with (
            interruptible() as interrupted,
            tqdm(total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True) as bar,
        ):
            if self.step == 0:
                self.save()
            while self.step < last and not interrupted.is_set():
                bits = self._train_step()
                bar.set_postfix_str(self._progress(bits), refresh=False)
                bar.update()
                if self._is_due(self.config.eval_every):
                    validation_bits = self.evaluate()
                    bar.write(f"step {self.step:>6}  validation {validation_bits:.3f} bits per byte", file=sys.stderr)
                if self._is_due(self.config.checkpoint_every):
                    self.save()
        self.save()
        return self.step < last

    def _is_due(self, every: int) -> bool:
        return self.finished or (every > 0 and self.step % every == 0)

    def _bytes_per_second(self) -> float:
        return self.num_windows_read * self.config.seq_len / max(self.seconds, 1e-9)

    def _progress(self, bits: float) -> str:
        parts = [f"{bits:.3f} bits/byte", f"{self._bytes_per_second():.0f} bytes/s"]
        if "memory_usage" in self.log[-1]:
            usage = np.mean(self.log[-1]["memory_usage"], axis=0)
            parts.append(f"balance {self.log[-1]['balance_loss']:.3f}")
            parts.append("memories " + " ".join(f"{100 * share:.0f}" for share in usage) + " %")
        return ", ".join(parts)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _train_step(self) -> float:
        """Do one optimizer step; return the loss in bits per byte."""
        start = time.perf_counter()
        learning_rate = learning_rate_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        inputs, targets = self.windows.batch(self.num_windows_read, self.config.batch_size)
        with self._autocast():
            loss = self.model(inputs.to(self.device), targets.to(self.device)).loss
        routing = self.model.routing
        total = loss
        if routing:
            balance_loss = torch.stack([layer.balance_loss for layer in routing]).mean()
            total = loss + self.config.balance_coefficient * balance_loss
        total.backward()
        clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        bits = float(loss.detach()) / math.log(2)
        if not math.isfinite(bits):
            raise FloatingPointError(f"the loss is {bits} at step {self.step}; the last checkpoint is intact")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_windows_read += self.config.batch_size
        self.seconds += time.perf_counter() - start
        entry: dict[str, Any] = {
            "step": self.step,
            "bytes": self.num_windows_read * self.config.seq_len,
            "seconds": round(self.seconds, 3),
            "learning_rate": learning_rate,
            "train_bits_per_byte": bits,
        }
        if routing:
            hits = torch.stack([layer.hits for layer in routing]).float()
            entry["balance_loss"] = float(balance_loss.detach())
            entry["memory_usage"] = (hits / hits.sum(1, keepdim=True).clamp(min=1)).tolist()
        self._append_log(entry)
        return bits

    @torch.inference_mode()
    def evaluate(self) -> float:
        """Measure and log the validation loss in bits per byte. Every window starts from an empty state."""
        total = 0.0
        for inputs, targets in zip(
            self.validation.inputs.split(self.config.batch_size),
            self.validation.targets.split(self.config.batch_size),
            strict=True,
        ):
            with self._autocast():
                loss = self.model(inputs.to(self.device), targets.to(self.device)).loss
            total += float(loss) * targets.numel()
        bits = total / self.validation.targets.numel() / math.log(2)
        self._append_log(
            {
                "step": self.step,
                "bytes": self.num_windows_read * self.config.seq_len,
                "seconds": round(self.seconds, 3),
                "validation_bits_per_byte": bits,
                "ngram_bits_per_byte": self.baseline,
            }
        )
        return bits

    def save(self) -> None:
        """Write the model, the checkpoint and the loss curve."""
        self.model.save_pretrained(self.out)
        checkpoint = {
            "config": dataclasses.asdict(self.config),
            "data_fingerprint": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "step": self.step,
            "num_windows_read": self.num_windows_read,
            "seconds": self.seconds,
            "log": self.log,
        }
        with replacing(self.out / CHECKPOINT_NAME) as temporary:
            torch.save(checkpoint, temporary)
        if self.log:
            with replacing(self.out / CURVE_NAME) as temporary:
                save_loss_curve(self.log, self.baseline, temporary)
        if any("memory_usage" in entry for entry in self.log):
            with replacing(self.out / USAGE_NAME) as temporary:
                save_memory_usage(self.log, temporary)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["data_fingerprint"] != self.corpus.fingerprint:
            raise ValueError(f"the text is not the one {self.out} was trained on: {self.corpus.description}")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random_state"])
        if self.device.type == "cuda" and checkpoint["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_random_state"], self.device)
        self.step = checkpoint["step"]
        self.num_windows_read = checkpoint["num_windows_read"]
        self.seconds = checkpoint["seconds"]
        self.log = checkpoint["log"]

    def _append_log(self, entry: dict[str, Any]) -> None:
        self.log.append(entry)
        with (self.out / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _write_log(self) -> None:
        """Bring the log file to this run's step: a killed run may have logged steps after its last checkpoint."""
        with replacing(self.out / LOG_NAME) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.log), encoding="utf-8")


def load_checkpoint(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the checkpoint of a run's folder onto the CPU.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(out) / CHECKPOINT_NAME
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def resumed_config(out: str | os.PathLike[str], given: dict[str, Any]) -> TrainConfig:
    """Return the settings of the run in folder `out`, with those of `given` that may change in a running run.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a given setting differs from the run's and is fixed by it.
    """
    stored = load_checkpoint(out)["config"]
    for name, value in given.items():
        if name not in CHANGEABLE and value != stored[name]:
            raise ValueError(f"{name} of the run in {out} is {stored[name]!r} and cannot become {value!r}")
    return TrainConfig(**{**stored, **given})


def make_optimizer(model: LanguageModel, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices only: norms, gates, convolutions and memory tables keep their scale. It
    is remora's where tables have row gradients.
    """
    layers = (nn.Linear, nn.Embedding, GroupedLinear)
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    matrices = [p for p in model.parameters() if id(p) in decayed]
    others = [p for p in model.parameters() if id(p) not in decayed]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if any(isinstance(module, MemoryTable) and module.sparse_grad for module in model.modules()):
        return SparseAdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The configuration's learning rate at a step."""
    return config.learning_rate * warmup_then_cosine(step, config.warmup_steps, config.steps)


def warmup_then_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up over `warmup_steps`, then a cosine to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM within the block into an event; the second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield event
    finally:
        restore()
