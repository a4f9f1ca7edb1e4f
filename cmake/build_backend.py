"""scikit-build-core, with the CUDA compiler as a build requirement where the machine has none."""

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

CUDA_COMPILER = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")]


def _has_nvcc() -> bool:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return any(path and Path(path).exists() for path in candidates)


def _cuda_compiler(config_settings: dict[str, Any] | None) -> list[str]:
    settings = config_settings or {}
    needed = settings.get("cmake.define.REMORA_CUDA") != "OFF" or settings.get("cmake.define.REMORA_SIM") == "ON"
    return CUDA_COMPILER if needed and not _has_nvcc() else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_cuda_compiler(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_cuda_compiler(config_settings)]
