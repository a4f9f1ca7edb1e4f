"""SASS of a cubin: instructions with their control codes, branches and resource usage.

128-bit encoding of Volta and later, bits 105..125: stall (4), yield (1), write barrier (3), read barrier (3),
wait mask (6), reuse (4).
"""

import pathlib
import re
import subprocess
from dataclasses import dataclass

import triton

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*[;}]?\s*/\* (0x[0-9a-f]{16}) \*/"
)
HEX = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"^([.$\w]+):$")
TARGET = re.compile(r"`\(([.$\w]+)\)")
REG = re.compile(r"\bR(\d+)")


@dataclass
class Inst:
    addr: int
    pred: str
    op: str  # opcode with modifiers
    args: str
    stall: int = 0
    yld: int = 0
    wr: int = 7  # scoreboard set until the result is written (7: none)
    rd: int = 7  # scoreboard set until the sources are read
    wait: int = 0  # mask of scoreboards to wait for
    target: int = -1  # of branches: index of the target instruction
    base: str = ""
    dst: tuple[int, ...] = ()  # registers of a tensor-core result
    src: frozenset[int] = frozenset()


def decode(high: int) -> dict[str, int]:
    """The control fields of an instruction, from its upper 64 bits."""
    c = (high >> 41) & 0x1FFFFF
    return {"stall": c & 15, "yld": (c >> 4) & 1, "wr": (c >> 5) & 7, "rd": (c >> 8) & 7, "wait": (c >> 11) & 63}


def functions(cubin: str | pathlib.Path) -> list[str]:
    """Mangled names of a cubin's kernels."""
    text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"Function (\S+):", text)


def resources(cubin: str | pathlib.Path, function: str) -> dict[str, int]:
    """Registers, stack bytes (spills and local arrays) and static shared memory of a kernel."""
    text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    m = re.search(rf"Function {re.escape(function)}:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if not m:
        raise ValueError(f"{cubin}: no kernel {function}")
    return {"regs": int(m[1]), "stack": int(m[2]), "smem": int(m[3])}


def parse(text: str) -> list[Inst]:
    """Instructions of one function's `nvdisasm -c -hex` listing."""
    out: list[Inst] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if m := LABEL.match(line):
            labels[m[1]] = len(out)
        elif m := LINE.match(line):
            out.append(Inst(int(m[1], 16), m[2] or "", m[3], m[4], base=m[3].split(".")[0]))
        elif (m := HEX.match(line)) and out:
            for name, value in decode(int(m[1], 16)).items():
                setattr(out[-1], name, value)
    for i in out:
        if m := TARGET.search(i.args):
            i.target = labels.get(m[1], -1)
        regs = [int(r) for r in REG.findall(i.args)]
        if i.base == "HMMA" and regs:
            i.dst = tuple(range(regs[0], regs[0] + 4))
        # for the interlock on tensor-core results; wide operands by the opcode's width
        n = 4 if i.base == "HMMA" or ".128" in i.op else 2 if ".64" in i.op or ".WIDE" in i.op else 1
        i.src = frozenset(r + k for r in regs for k in range(n))
    return out


def disassemble(cubin: str | pathlib.Path, function: str | None = None) -> list[Inst]:
    """Instructions of the only function of a cubin, or of the first whose mangled name contains `function`."""
    text = subprocess.run([TOOLS / "nvdisasm", "-c", "-hex", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^//-+ +\.text\.(\S+) +-+$", text, flags=re.M)
    found = [body for name, body in zip(parts[1::2], parts[2::2], strict=True) if (function or "") in name]
    if not found or (function is None and len(found) > 1):
        raise ValueError(f"{cubin}: {len(found)} functions, name one")
    return parse(found[0])


def loops(code: list[Inst]) -> list[tuple[int, int]]:
    """(head, tail) of the backward branches, in the order of their tails, without the trap after EXIT."""
    return [(i.target, n) for n, i in enumerate(code) if i.base == "BRA" and 0 <= i.target < n]
