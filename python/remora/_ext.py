"""Loads the operator libraries and knows which of them are there, and why the others are not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remora import _C, _forward

BACKENDS = ("cpu", "cuda", "sim")
_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """One operator library: where it was loaded from, or why it was not."""

    name: str
    path: str | None
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.path is not None


def _load(name: str, reason: str | None) -> Library:
    if reason is not None:
        return Library(name, None, reason)
    path = _ROOT / f"lib{name}.so"
    if not path.exists():
        return Library(name, None, f"{path.name} is not part of this installation")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(name, None, str(error))
    return Library(name, str(path), None)


def _host_backend() -> str:
    backend = os.environ.get("REMORA_BACKEND", "")
    if backend not in ("", *BACKENDS):
        raise ValueError(f"REMORA_BACKEND must be 'cpu', 'sim' or 'cuda', got {backend!r}")
    return backend or "cpu"


def _why_no_cuda(build: dict[str, Any], host: str) -> str | None:
    if build["cuda_off_reason"]:
        return str(build["cuda_off_reason"])
    if host == "sim":
        return "REMORA_BACKEND=sim runs the CUDA kernels in the simulator"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if int(torch.version.cuda.split(".")[0]) != int(build["cuda"].split(".")[0]):
        return f"built for CUDA {build['cuda']}, torch {torch.__version__} has CUDA {torch.version.cuda}"
    return None


def _load_all() -> tuple[dict[str, Any], dict[str, Library]]:
    build = _C.build_info()
    host = _host_backend()
    if host == "sim" and not build["simulator"]:
        raise ImportError(
            "REMORA_BACKEND=sim needs a build with the simulator: pip install . -Ccmake.define.REMORA_SIM=ON"
        )
    libraries = {
        "cpu": _load("remora_cpu", "REMORA_BACKEND=sim" if host == "sim" else None),
        "sim": _load("remora_sim", None if host == "sim" else "REMORA_BACKEND is not 'sim'"),
        "cuda": _load("remora_cuda", _why_no_cuda(build, host)),
    }
    if not libraries[host].loaded:
        raise ImportError(f"remora cannot load its {host} operators: {libraries[host].reason}")
    if host == "cuda":
        _forward.install()
    return build, libraries


BUILD, LIBRARIES = _load_all()
HOST_BACKEND = _host_backend()


def require_backend(tensor: torch.Tensor, name: str) -> None:
    """Raises ValueError, naming the reason, if no kernels are loaded for the device of `tensor`."""
    kind = tensor.device.type
    if kind in ("cpu", "meta"):
        return
    if kind != "cuda":
        raise ValueError(f"{name} is on device {tensor.device}; remora has kernels for cpu and cuda tensors")
    if not LIBRARIES["cuda"].loaded:
        raise ValueError(
            f"{name} is on device {tensor.device}, but remora's CUDA kernels are not loaded: {LIBRARIES['cuda'].reason}"
        )


def runs_on_cpu_kernels(tensor: torch.Tensor) -> bool:
    """Whether the CPU kernels, which take more dtypes and sizes than those for CUDA, serve `tensor`."""
    return tensor.device.type == "meta" or (tensor.device.type == "cpu" and HOST_BACKEND == "cpu")
