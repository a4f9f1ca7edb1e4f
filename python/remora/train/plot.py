"""The loss curve and the use of the memories as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def save_loss_curve(log: Sequence[dict[str, Any]], baseline: float, path: Path) -> None:
    """Draw training and validation loss over the bytes read, beside the n-gram baseline, as PNG.

    Args:
        log: entries of a run's log.
        baseline: bits per byte of the n-gram model.
        path: where to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("train_bits_per_byte", "training", {"color": "tab:blue", "alpha": 0.4, "linewidth": 1}),
        ("validation_bits_per_byte", "validation", {"color": "tab:blue", "marker": "o"}),
    ):
        points = [(entry["bytes"] / 1e6, entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.axhline(baseline, color="tab:orange", linestyle="--", label="order-2 byte n-gram, validation")
    axes.set(xlabel="megabytes read", ylabel="bits per byte", ylim=(0, 8))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def save_memory_usage(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the share of the choices that each memory of each layer gets over the steps, and the balance loss, as PNG.

    Args:
        log: entries of a run's log, some of them with `memory_usage` and `balance_loss`.
        path: where to write.
    """
    entries = [entry for entry in log if "memory_usage" in entry]
    steps = [entry["step"] for entry in entries]
    usage = np.array([entry["memory_usage"] for entry in entries])  # [steps, layers, M]
    num_layers, num_memories = usage.shape[1:]
    figure = Figure(figsize=(8, 2 * num_layers + 2), layout="constrained")
    axes = figure.subplots(num_layers + 1, sharex=True)
    for layer_idx in range(num_layers):
        labels = [f"memory {idx}" for idx in range(num_memories)]
        axes[layer_idx].stackplot(steps, usage[:, layer_idx].T, labels=labels)
        axes[layer_idx].set(ylabel=f"layer {layer_idx}", ylim=(0, 1))
    axes[0].set_title("share of the tokens' choices")
    axes[0].legend(loc="upper right", ncols=min(num_memories, 4), fontsize="small")
    axes[-1].plot(steps, [entry["balance_loss"] for entry in entries])
    axes[-1].set(xlabel="step", ylabel="balance loss")
    axes[-1].grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
