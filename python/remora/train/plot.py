"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
