"""The simulator, seen from Python: options, counters and errors of simulated CUDA kernels.

A process may hold two simulators, because each binary links its own hidden copy:

* the one inside `libremora_sim.so`, which runs the operators under `REMORA_BACKEND=sim`. `stats`, `reset_stats` and
  `last_error` speak of this one;
* the extension module `ptx`, which launches PTX text from any compiler (`ptx.load_ptx(text).launch(...)`); it has
  `ptx.stats`, `ptx.reset_stats` and `ptx.Error`.

`options` sets an option in both. The options are listed in sim/README.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

try:
    import remora.testing._ptxsim as ptx
except ImportError as error:
    raise ImportError("this build of remora has no simulator; build with -Ccmake.define.REMORA_SIM=ON") from error

__all__ = ["last_error", "options", "ptx", "reset_stats", "stats"]


@functools.cache
def _open(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    for name in ("set_option", "option", "stats_json", "last_error"):
        getattr(library, f"remora_sim_{name}").restype = ctypes.c_char_p
    library.remora_sim_set_option.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.remora_sim_option.argtypes = [ctypes.c_char_p]
    library.remora_sim_reset_stats.restype = None
    return library


def _library() -> ctypes.CDLL | None:
    """The simulator backend, if this process has loaded it."""
    for path in torch.ops.loaded_libraries:
        if Path(path).name == "libremora_sim.so":
            return _open(str(path))
    return None


def _required() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the simulator backend is not loaded: set REMORA_BACKEND=sim before importing remora")
    return library


def _set(name: str, value: str) -> None:
    ptx.set_option(name, value)
    library = _library()
    if library is not None and (error := library.remora_sim_set_option(name.encode(), value.encode())):
        raise ValueError(error.decode())


@contextlib.contextmanager
def options(**values: Any) -> Iterator[None]:
    """Sets options for the duration of a `with` block. `async` is a keyword of Python, so it is spelled `async_`."""
    wanted = {name.rstrip("_"): value for name, value in values.items()}
    library = _library()
    before = {}
    for name in wanted:
        before[name] = ptx.option(name) if library is None else library.remora_sim_option(name.encode())
        if before[name] is None:
            raise ValueError(f"unknown option {name}")
    texts = {name: value if isinstance(value, str) else value.decode() for name, value in before.items()}
    try:
        for name, value in wanted.items():
            _set(name, str(int(value)) if isinstance(value, bool) else str(value))
        yield
    finally:
        for name, text in texts.items():
            _set(name, text)


def stats() -> dict[str, dict[str, Any]]:
    """Counters of the operators' kernels by kernel name, summed over the launches since `reset_stats`."""
    counters: dict[str, dict[str, Any]] = json.loads(_required().remora_sim_stats_json())
    return counters


def reset_stats() -> None:
    _required().remora_sim_reset_stats()


def last_error() -> str:
    """What the last failed launch of an operator said; empty if none has failed."""
    message: bytes = _required().remora_sim_last_error()
    return message.decode()
