"""What this installation of remora can do, and why it cannot do the rest."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch

from remora._ext import BUILD, HOST_BACKEND, LIBRARIES


@dataclass(frozen=True)
class Info:
    """Versions, architectures and libraries of this installation; `str()` is what `python -m remora info` prints."""

    remora: str
    python: str
    torch: str
    torch_cuda: str | None
    built_with_torch: str
    built_with_cuda: str | None
    compiler: str
    cuda_architectures: tuple[str, ...]
    cpu_capability: str
    cpu_tensors: str
    gpus: tuple[str, ...]
    libraries: dict[str, str]

    def __str__(self) -> str:
        rows = {
            "remora": self.remora,
            "python": self.python,
            "torch": f"{self.torch} (CUDA {self.torch_cuda})" if self.torch_cuda else f"{self.torch} (no CUDA)",
            "built with": f"torch {self.built_with_torch}, CUDA {self.built_with_cuda}, {self.compiler}",
            "architectures": " ".join(self.cuda_architectures) or "none",
            "CPU kernels": self.cpu_capability,
            "CPU tensors": f"run by the {self.cpu_tensors} backend",
            "GPUs": ", ".join(self.gpus) or "none visible",
        }
        rows.update({f"lib{name}": state for name, state in self.libraries.items()})
        return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


def info() -> Info:
    """Reports versions, CUDA architectures built in, libraries loaded and, for each that is not, why."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Info(
        remora=version("remora"),
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        built_with_torch=BUILD["torch"],
        built_with_cuda=BUILD["cuda"] or None,
        compiler=BUILD["compiler"],
        cuda_architectures=tuple(BUILD["cuda_architectures"]),
        cpu_capability=BUILD["cpu_capability"],
        cpu_tensors=HOST_BACKEND,
        gpus=tuple(gpus),
        libraries={
            library.name: f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
            for library in LIBRARIES.values()
        },
    )
