"""What the CUDA launch functions launch for a shape: compiled for sm_90a, linked with a runtime that only takes
notes.
"""

import json
import pathlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from . import nvcc
from .timemodel import sass

ARCH = "90a"


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    HV: int
    D: int = 128
    dtype: str = "bf16"


@dataclass(frozen=True)
class Recorded:
    """One launch. kernel "memset" has no cubin and its bytes in smem."""

    kernel: str
    cubin: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem: int
    params: bytes


def parameter_sizes(cubin: pathlib.Path) -> dict[str, list[int]]:
    """Sizes of every kernel's parameters, in order."""
    text = subprocess.run([sass.TOOLS / "cuobjdump", "-elf", cubin], capture_output=True, text=True, check=True).stdout
    out: dict[str, list[int]] = {}
    for name, body in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\S|\Z)", text, re.M | re.S):
        found = re.findall(r"Ordinal : (0x[0-9a-f]+)\s+Offset\s*: 0x[0-9a-f]+\s+Size\s*: (0x[0-9a-f]+)", body)
        out[name] = [int(size, 16) for _, size in sorted((int(o, 16), size) for o, size in found)]
    return out


class Recorder:
    """The launch functions and the cubins of one dtype and head dimension."""

    def __init__(self, dtype: str = "bf16", head_dim: int = 128):
        chosen = [
            s
            for s in nvcc.sources()
            if s.parent.name == "gated_delta_rule"
            and (not re.search(r"_(bf16|fp16|fp32)", s.name) or wanted(s.name, dtype, head_dim))
        ]
        objects = [nvcc.compile_one(s, ARCH, "o").path for s in chosen]
        self.cubins: dict[str, str] = {}
        sizes: dict[str, list[int]] = {}
        for o in objects:
            for cubin in self.extract(o):
                for name, values in parameter_sizes(cubin).items():
                    self.cubins[name] = str(cubin)
                    sizes[name] = values
        self.sizes = "\n".join(" ".join([n, *map(str, s)]) for n, s in sizes.items())
        self.program = nvcc.CACHE / f"record.{dtype}.{head_dim}"
        source = pathlib.Path(__file__).parent / "timemodel" / "record.cpp"
        command = [
            nvcc.nvcc(),
            "--cudart=none",
            "-std=c++20",
            f"-I{nvcc.CSRC}",
            str(source),
            *map(str, objects),
            "-o",
            str(self.program),
        ]
        # the instantiations that are not linked are not called
        run = subprocess.run(
            [*command, "-Xcompiler", "-no-pie", "-Xlinker", "--unresolved-symbols=ignore-all"],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"recorder of launches: {run.stderr[-3000:]}")

    @staticmethod
    def extract(o: pathlib.Path) -> list[pathlib.Path]:
        folder = o.with_suffix(".elf")
        if not folder.exists():
            folder.mkdir()
            subprocess.run([sass.TOOLS / "cuobjdump", "-xelf", "all", o], cwd=folder, check=True, capture_output=True)
        return sorted(folder.glob("*.cubin"))

    def record(self, mode: str, s: Shape, num_sms: int = 132, arch: int = 90) -> list[Recorded]:
        words = [mode, *map(str, (s.B, s.T, s.H, s.HV, s.D, s.D)), s.dtype, str(num_sms), str(arch)]
        run = subprocess.run([str(self.program), *words], input=self.sizes, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(words)}: {run.stderr.strip() or run.returncode}")
        out = []
        for line in run.stdout.splitlines():
            x = json.loads(line)
            if x["kernel"] == "memset":
                out.append(Recorded("memset", "", (1, 1, 1), (1, 1, 1), x["bytes"], b""))
            else:
                out.append(
                    Recorded(
                        x["kernel"],
                        self.cubins[x["kernel"]],
                        triple(x["grid"]),
                        triple(x["block"]),
                        x["smem"],
                        bytes.fromhex(x["params"]),
                    )
                )
        return out


def triple(v: Sequence[int]) -> tuple[int, int, int]:
    return v[0], v[1], v[2]


def wanted(name: str, dtype: str, head_dim: int) -> bool:
    return dtype in name and ("_k" not in name or f"_k{head_dim}." in name)
