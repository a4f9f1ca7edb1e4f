"""Compiles the project's CUDA sources for the benchmarks; results are kept in build/bench until a source changes."""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "bench"


def nvcc() -> str:
    found = shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.access(p, os.X_OK)), None)
    if not found:
        raise RuntimeError("no nvcc on PATH")
    return found


def sources() -> list[pathlib.Path]:
    """The .cu files: kernel instantiations and launch functions."""
    return sorted(CSRC.rglob("*.cu"))


def included(source: pathlib.Path) -> set[pathlib.Path]:
    """The source and what it includes of the project, directly or not."""
    found: set[pathlib.Path] = set()
    todo = [source]
    while todo:
        f = todo.pop()
        if f in found or not f.exists():
            continue
        found.add(f)
        todo += [CSRC / name for name in re.findall(r'^\s*#include "([^"]+)"', f.read_text(), re.M)]
    return found


def digest(source: pathlib.Path, flags: list[str]) -> str:
    h = hashlib.sha256(repr(flags).replace(str(ROOT), "").encode())
    for f in sorted(included(source)):
        h.update(f.read_bytes())
    return h.hexdigest()[:16]


@dataclass(frozen=True)
class Compiled:
    source: pathlib.Path
    arch: str
    path: pathlib.Path
    log: str  # of ptxas -v


def compile_one(source: pathlib.Path, arch: str, kind: str = "cubin") -> Compiled:
    """kind: cubin, or o for an object with host code and one cubin, without a CUDA runtime."""
    flags = [
        "-std=c++20",
        f"-I{CSRC}",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Xptxas",
        "-v",
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
    ]
    flags += ["-cubin"] if kind == "cubin" else ["-c", "--cudart=none", "-Xcompiler", "-fPIC"]
    out = CACHE / f"{source.stem}.{arch}.{digest(source, flags)}.{kind}"
    log = out.with_suffix(".log")
    if not out.exists() or not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(f".{os.getpid()}.tmp.{kind}")
        run = subprocess.run(
            [nvcc(), *flags, str(source), "-o", str(temporary)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(f"nvcc {source.relative_to(ROOT)} for sm_{arch}:\n{run.stderr[-4000:]}")
        log.write_text(run.stderr + run.stdout)
        temporary.rename(out)
    return Compiled(source, arch, out, log.read_text())


def compile_all(archs: list[str], kind: str = "cubin", match: str = "", jobs: int = 2) -> list[Compiled]:
    work = [(s, a) for a in archs for s in sources() if match in s.name]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda w: compile_one(*w, kind=kind), work))
