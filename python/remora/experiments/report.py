"""What the reports of experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample (0 for one run) and the runs themselves."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "deviation": deviation, "runs": list(values)}


def percent(cell: dict[str, Any]) -> str:
    """A `summary` as text."""
    return f"{100 * cell['mean']:.1f} ± {100 * cell['deviation']:.1f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
