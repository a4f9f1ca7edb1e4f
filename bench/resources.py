"""Registers, spills and shared memory of every kernel instantiation, by architecture. A spill is an error."""

import argparse
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass

from . import nvcc, report

ARCHITECTURES = ("80", "90a", "100f", "120f")
REGISTER_FILE, SMEM_PER_SM = 65536, {"80": 164, "90a": 228, "100f": 228, "120f": 100}


@dataclass(frozen=True)
class Row:
    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_smem: int
    barriers: int

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?")
SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> list[Row]:
    """Rows of a `ptxas -v` log."""
    rows, entry, arch, frame = [], "", "", (0, 0, 0)
    for line in log.splitlines():
        if m := ENTRY.search(line):
            entry, arch, frame = m[1], m[2], (0, 0, 0)
        elif m := FRAME.search(line):
            frame = (int(m[1]), int(m[2]), int(m[3]))
        elif (m := USED.search(line)) and entry:
            smem = SHARED.search(line)
            rows.append(Row(entry, arch, int(m[1]), *frame, int(smem[1]) if smem else 0, int(m[2] or 0)))
            entry = ""
    return rows


def demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return {n: n for n in names}
    text = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {n: short(t) for n, t in zip(names, text, strict=True)}


def short(name: str) -> str:
    """A demangled kernel without its namespace, parameters and the spelling of types."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(.*\)$", "", re.sub(r"\(bool\)|\(int\)", "", name))
    return (
        name.replace("remora::", "")
        .replace("__nv_bfloat16", "bf16")
        .replace("__half", "fp16")
        .replace("(anonymous namespace)::", "")
    )


def main(argv: list[str]) -> int:
    ap = argparse.ArgumentParser(prog="python -m bench resources", description=__doc__)
    ap.add_argument("--arch", nargs="*", default=list(ARCHITECTURES))
    ap.add_argument("--match", default="", help="only source files whose name contains this")
    ap.add_argument("--jobs", type=int, default=2)
    ap.add_argument("--json", help="write the table here")
    o = ap.parse_args(argv)
    rows = [r for c in nvcc.compile_all(o.arch, match=o.match, jobs=o.jobs) for r in parse(c.log)]
    names = demangle(sorted({r.kernel for r in rows}))
    rows.sort(key=lambda r: (names[r.kernel], o.arch.index(r.arch) if r.arch in o.arch else 99))
    print(
        report.table(
            [
                [
                    names[r.kernel],
                    f"sm_{r.arch}",
                    r.registers,
                    r.stack,
                    f"{r.spill_stores}/{r.spill_loads}",
                    r.static_smem,
                    r.barriers,
                ]
                for r in rows
            ],
            ["kernel", "arch", "registers", "stack", "spill st/ld", "static smem", "barriers"],
        )
    )
    bad = [r for r in rows if r.spills]
    print(f"\n{len(rows)} kernels, {len(bad)} with spills" + "".join(f"\n  {names[r.kernel]} sm_{r.arch}" for r in bad))
    print("bytes; dynamic shared memory depends on the launch: `python -m bench model` shows it")
    report.save(
        o.json,
        {"kind": "ptxas", "commit": report.commit(), "kernels": [{**asdict(r), "name": names[r.kernel]} for r in rows]},
    )
    return 1 if bad else 0
