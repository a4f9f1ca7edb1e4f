"""The command line: `python -m remora info | train | generate | experiment`."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEFAULT_OUT = "remora-run"
DEFAULT_RECALL_OUT = "remora-recall"
DEFAULT_RETENTION_OUT = "remora-retention"
DEFAULT_NEEDLE_OUT = "remora-needle"
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

# Options of `train` that set the field of TrainConfig of the same name.
TRAIN_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("data", str, "file or folder of text (default: the Python standard library's source)"),
    ("steps", int, "optimizer steps"),
    ("batch_size", int, "windows per step"),
    ("seq_len", int, "bytes per window"),
    ("learning_rate", float, "peak learning rate"),
    ("warmup_steps", int, "steps over which the learning rate rises"),
    ("mixer", str, "token mixer: mixture_of_memories, gated_delta_net, mamba or sliding_window_attention"),
    ("num_memories", int, "memories of a mixture among which a token chooses"),
    ("topk", int, "memories that a token chooses"),
    ("balance_coefficient", float, "weight of the balance loss of the routers"),
    ("segment_stride", int, "tokens of a segment of scout"),
    ("compress", str, "compression of the segments of scout: last, mean, max or softmax"),
    ("window", int, "window of sliding_window_attention"),
    ("hidden_size", int, "width of the model"),
    ("num_layers", int, "number of layers"),
    ("num_heads", int, "heads of the mixer"),
    ("head_dim", int, "size of a head"),
    ("intermediate_size", int, "inner width of the feed-forward layers"),
    ("seed", int, "seed of initial weights and order of the data"),
    ("dtype", str, "float32, bfloat16, or auto: bfloat16 on a GPU"),
    ("device", str, "cpu, cuda, cuda:N, or auto: a GPU if there is one"),
    ("eval_every", int, "steps between validations"),
    ("eval_bytes", int, "bytes of the validation split to measure on"),
    ("checkpoint_every", int, "steps between checkpoints"),
)

# What `train --model` sets, unless an option says otherwise.
MODELS: dict[str, dict[str, Any]] = {
    "ultramem_v2": {"memory": "ultramem_v2"},
    "scout": {"mixer": "sliding_window_attention", "segment_stride": 8},
}

# Options of `experiment recall` that set the field of RecallConfig of the same name.
RECALL_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("data", str, "file or folder of text (default: the Python standard library's source)"),
    ("seeds", int, "runs of each model"),
    ("recall_steps", int, "optimizer steps on associative recall"),
    ("text_steps", int, "optimizer steps on text"),
    ("num_memories", int, "memories of the mixture"),
    ("topk", int, "memories that a token chooses"),
    ("hidden_size", int, "width of the models"),
    ("head_dim", int, "size of a head"),
    ("learning_rate", float, "peak learning rate"),
    ("device", str, "cpu, cuda, cuda:N, or auto: a GPU if there is one"),
    ("jobs", int, "runs at a time (default: one per core; on a GPU one)"),
)

# Options of `experiment retention` that set the field of RetentionConfig of the same name.
RETENTION_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("seeds", int, "runs of each model"),
    ("facts", int, "facts to write for each number of exposures"),
    ("hidden_size", int, "width of the models"),
    ("num_keys", int, "sub-keys of an axis of the memories"),
    ("learning_rate", float, "learning rate"),
    ("device", str, "cpu, cuda, cuda:N, or auto: a GPU if there is one"),
)

# Options of `experiment needle` that set the field of NeedleConfig of the same name.
NEEDLE_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("seeds", int, "runs of each model"),
    ("steps", int, "optimizer steps"),
    ("seq_len", int, "tokens of a sequence"),
    ("stride", int, "tokens of a segment of SCOUT"),
    ("compress", str, "compression of its segments: last, mean, max or softmax"),
    ("window", int, "window of its mixer, and of the mixer alone"),
    ("hidden_size", int, "width of the models"),
    ("num_blocks", int, "blocks of SCOUT; the others have twice as many layers"),
    ("learning_rate", float, "peak learning rate"),
    ("device", str, "cpu, cuda, cuda:N, or auto: a GPU if there is one"),
    ("jobs", int, "runs at a time (default: one per core; on a GPU one)"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _make_parser()
    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    try:
        return COMMANDS[command](**arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"remora {command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remora", description="Memory mechanisms of modern sequence models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, architectures and libraries of this installation")

    train = commands.add_parser(
        "train",
        help="train a byte-level language model on text",
        description="Train a byte-level language model. Without options: on the Python standard library's own source.",
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("--out", default=DEFAULT_OUT, help="folder of the run (default: %(default)s)")
    train.add_argument(
        "--model",
        choices=tuple(MODELS),
        help="ultramem_v2: a memory layer beside every feed-forward layer; "
        "scout: attention over compressed segments after every block",
    )
    train.add_argument("--resume", action="store_true", default=False, help="continue the run in the folder")
    for name, kind, text in TRAIN_OPTIONS:
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)

    generate = commands.add_parser("generate", help="continue a prompt with a trained model")
    generate.add_argument("--checkpoint", default=DEFAULT_OUT, help="folder of the model (default: %(default)s)")
    generate.add_argument("--prompt", default="", help="text to continue; empty starts a new document")
    generate.add_argument("--max-new-tokens", type=int, default=400, help="bytes to add (default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, help="sample among the k most likely bytes")
    generate.add_argument("--top-p", type=float, help="sample among the most likely bytes of this total probability")
    generate.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    generate.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default)")
    generate.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")

    experiment = commands.add_parser("experiment", help="compare memories")
    experiments = experiment.add_subparsers(dest="name", required=True)
    recall = experiments.add_parser(
        "recall",
        help="a mixture of memories against one memory, on recall",
        description="Train a mixture of memories, one memory with as large a state and one with as many parameters on "
        "associative recall and on text, and compare what they recall.",
        argument_default=argparse.SUPPRESS,
    )
    recall.add_argument("--out", default=DEFAULT_RECALL_OUT, help="folder of the results (default: %(default)s)")
    recall.add_argument("--quick", action="store_true", default=False, help="small models, a minute")
    for name, kind, text in RECALL_OPTIONS:
        recall.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    recall.add_argument("--pairs", type=int, nargs="+", help="numbers of key-value pairs")

    retention = experiments.add_parser(
        "retention",
        help="product-key memories against a dense layer, on facts seen a few times",
        description="Write random facts into a product-key memory, UltraMemV2 and a dense layer of equal FLOPs, go on "
        "training on others, and compare what is still recognised and recalled.",
        argument_default=argparse.SUPPRESS,
    )
    retention.add_argument("--out", default=DEFAULT_RETENTION_OUT, help="folder of the results (default: %(default)s)")
    retention.add_argument("--quick", action="store_true", default=False, help="small models, a minute")
    for name, kind, text in RETENTION_OPTIONS:
        retention.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    retention.add_argument("--updates", type=int, nargs="+", help="numbers of updates after which to probe")

    needle = experiments.add_parser(
        "needle",
        help="SCOUT against its mixer alone and full attention, on needles far back",
        description="Train SCOUT, its sliding window alone and full attention of equal size to find a needle in noise "
        "and to tell which of two came first, and measure time and memory by length.",
        argument_default=argparse.SUPPRESS,
    )
    needle.add_argument("--out", default=DEFAULT_NEEDLE_OUT, help="folder of the results (default: %(default)s)")
    needle.add_argument("--quick", action="store_true", default=False, help="small models, a minute")
    for name, kind, text in NEEDLE_OPTIONS:
        needle.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    needle.add_argument("--lengths", type=int, nargs="+", help="tokens at which time and memory are measured")
    return parser


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _info() -> int:
    from remora import info

    _say(str(info()))
    return 0


def _train(out: str, resume: bool, model: str | None = None, **given: Any) -> int:
    from remora.train import TrainConfig, Trainer, resumed_config

    given = MODELS.get(model or "", {}) | given
    config = resumed_config(out, given) if resume else dataclasses.replace(TrainConfig(), **given)
    trainer = Trainer(config, out, resume)
    _say(f"text      {trainer.corpus.description}")
    layers = " and ".join(
        [config.mixer, *([config.memory] if config.memory else []), *(["scout"] if config.segment_stride else [])]
    )
    _say(
        f"model     {layers}, {config.num_layers} layers of width {config.hidden_size}, "
        f"{trainer.model.num_parameters / 1e6:.2f} M parameters, {trainer.device}, {trainer.dtype}"
    )
    _say(f"baseline  order-2 byte n-gram: {trainer.baseline:.3f} bits per byte on the same validation bytes")
    if trainer.finished:
        raise ValueError(f"the run in {out} is complete at step {trainer.step}; --steps takes it further")
    interrupted = trainer.run()
    if interrupted:
        _say(f"interrupted at step {trainer.step}; continue with: python -m remora train --out {out} --resume")
        return INTERRUPTED
    bits = next(e["validation_bits_per_byte"] for e in reversed(trainer.log) if "validation_bits_per_byte" in e)
    _say(f"validation {bits:.3f} bits per byte; order-2 byte n-gram {trainer.baseline:.3f}")
    if "memory_usage" in (last := next(e for e in reversed(trainer.log) if "train_bits_per_byte" in e)):
        _say(f"balance loss {last['balance_loss']:.3f} (balanced: {config.topk}); share of the last step's choices:")
        for idx, shares in enumerate(last["memory_usage"]):
            _say(f"  layer {idx}  " + "  ".join(f"{100 * x:3.0f} % {'#' * round(20 * x):<10}" for x in shares).rstrip())
    _say(f"{trainer.seconds:.0f} s of training; model, checkpoint, log and plots are in {Path(out).resolve()}")
    _say(f'next: python -m remora generate --checkpoint {out} --prompt "def "')
    return 0


def _generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
    dtype: str,
) -> int:
    import torch

    from remora.models import LanguageModel
    from remora.train.data import SEPARATOR
    from remora.train.trainer import choose_device, choose_dtype

    target = choose_device(device)
    model = LanguageModel.from_pretrained(checkpoint, target, choose_dtype(dtype, target))
    if model.config.vocab_size != 256:
        raise ValueError(f"{checkpoint} has a vocabulary of {model.config.vocab_size}; only byte-level models work")
    tokens = torch.tensor([[SEPARATOR, *prompt.encode()]] if not prompt else [list(prompt.encode())], device=target)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(prompt)
    for token in model.stream(tokens, max_new_tokens, temperature, top_k, top_p, seed):
        if int(token) == SEPARATOR:
            break
        sys.stdout.write(decoder.decode(bytes([int(token)])))
        sys.stdout.flush()
    _say(decoder.decode(b"", final=True))
    return 0


def _experiment(name: str, out: str, quick: bool, **given: Any) -> int:
    from remora.experiments import (
        NeedleConfig,
        RecallConfig,
        RetentionConfig,
        needle_table,
        recall_table,
        retention_table,
        run_needle,
        run_recall,
        run_retention,
    )

    given = {option: tuple(value) if isinstance(value, list) else value for option, value in given.items()}
    if name == "recall":
        report = run_recall(RecallConfig.quick(**given) if quick else RecallConfig(**given), out)
        _say(recall_table(report))
        measured = f"right values, of right bytes and whole names among {report['names']}"
    elif name == "needle":
        report = run_needle(NeedleConfig.quick(**given) if quick else NeedleConfig(**given), out)
        _say(needle_table(report))
        measured = "right answers, by tokens between needle and question, and between two needles"
    else:
        report = run_retention(RetentionConfig.quick(**given) if quick else RetentionConfig(**given), out)
        _say(retention_table(report))
        measured = "written facts that are recognised and recalled"
    _say(f"percent of {measured}: mean ± deviation of {report['settings']['seeds']} seeds")
    _say(f"{report['seconds']:.0f} s; numbers and plot are in {Path(out).resolve()}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "info": _info,
    "train": _train,
    "generate": _generate,
    "experiment": _experiment,
}
