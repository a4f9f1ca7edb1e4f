"""Compiler launcher for CUDA objects: passes nvcc through and keeps what ptxas says of each kernel.

record_resources.py COMMAND...            runs nvcc; writes OBJECT.resources with one line per kernel and architecture
record_resources.py --merge OUT OBJECT... joins them into a C++ initialiser list

A line is: mangled name, architecture, registers, spill stores (bytes), spill loads, stack bytes, static shared bytes.
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def kernels(log: str) -> list[str]:
    lines = []
    entry: tuple[str, str] | None = None
    stack = ("0", "0", "0")
    for line in log.splitlines():
        if match := ENTRY.search(line):
            entry = (match[1], match[2])
        elif match := STACK.search(line):
            stack = (match[1], match[2], match[3])
        elif entry and (match := USED.search(line)):
            shared = SHARED.search(line)
            lines.append(" ".join([*entry, match[1], stack[1], stack[2], stack[0], shared[1] if shared else "0"]))
            entry = None
    return lines


def compile_object(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    rest = [line for line in done.stderr.splitlines() if "ptxas info" not in line and not STACK.search(line)]
    sys.stderr.write("".join(f"{line}\n" for line in rest))
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".resources").write_text(
            "".join(f"{line}\n" for line in kernels(done.stderr))
        )
    return done.returncode


def merge(out: str, objects: list[str]) -> int:
    rows = []
    for name in objects:
        for line in Path(name + ".resources").read_text().splitlines():
            kernel, arch, *numbers = line.split()
            rows.append(f'{{"{kernel}", "{arch}", {", ".join(numbers)}}},\n')
    Path(out).write_text("".join(sorted(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(merge(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "--merge" else compile_object(sys.argv[1:]))
