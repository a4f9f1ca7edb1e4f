"""Tables and JSON."""

import json
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text, columns aligned; numbers to the right."""
    text = [[str(x) for x in r] for r in (header, *rows)]
    widths = [max(len(r[k]) for r in text) for k in range(len(header))]
    number = [all(r[k][:1].isdigit() or r[k][:1] in "-–~+<" or not r[k] for r in text[1:]) for k in range(len(header))]
    out = []
    for n, r in enumerate(text):
        out.append(
            "  ".join(x.rjust(w) if q else x.ljust(w) for x, w, q in zip(r, widths, number, strict=True)).rstrip()
        )
        if n == 0:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def commit() -> str:
    root = pathlib.Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def host() -> dict[str, Any]:
    """The machine and the software that numbers belong to."""
    import torch

    model = "unknown"
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def save(path: str | None, document: dict[str, Any]) -> None:
    if path:
        pathlib.Path(path).write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {path}")
