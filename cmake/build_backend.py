"""scikit-build-core, with the CUDA compiler as a build requirement where the machine has none."""

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import scikit_build_core.build as _backend
from scikit_build_core.build import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
COMPONENTS = ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")


def _has_nvcc() -> bool:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), DEFAULT_NVCC]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{home}/bin/nvcc")
    return any(path and Path(path).exists() for path in candidates)


def _cuda_release() -> str:
    """Of the runtime that came with torch, so that compiler and headers are of one release."""
    try:
        return ".".join(importlib.metadata.version("nvidia-cuda-runtime").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "13.0"


def _cuda_compiler(config_settings: dict[str, Any] | None) -> list[str]:
    settings = config_settings or {}
    needed = settings.get("cmake.define.REMORA_CUDA") != "OFF" or settings.get("cmake.define.REMORA_SIM") == "ON"
    if not needed or _has_nvcc():
        return []
    return [f"nvidia-{name}=={_cuda_release()}.*" for name in COMPONENTS]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_cuda_compiler(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_cuda_compiler(config_settings)]
