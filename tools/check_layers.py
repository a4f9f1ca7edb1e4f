"""Refuses an include or an import that points the wrong way. csrc/README.md draws the layers.

check_layers.py [ROOT]    prints one line per violation; exits with 1 if there is one
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CXX = (".cpp", ".h", ".hpp", ".cu", ".cuh")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
COMMENT_OR_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
ASM = re.compile(r"\b(?:asm|__asm__|__asm)\b\s*(?:volatile|__volatile__|goto|\()")

# A package may import itself and those before it. `testing` stands apart: only tests and benchmarks import it.
PYTHON_LAYERS = ("ops", "optim", "modules", "distributed", "models", "train", "experiments", "cli")


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def _is_torch(header: str) -> bool:
    return header.startswith(("torch/", "ATen/", "c10/"))


def _is_cute(header: str) -> bool:
    return header.startswith(("cute/", "cutlass/"))


def _is_cuda(header: str) -> bool:
    return header.startswith(("cuda", "cub/", "thrust/", "cooperative_groups")) or header.endswith(".cuh")


def _is_python(header: str) -> bool:
    return header.startswith("pybind11/") or header == "Python.h"


def _without_comments(text: str) -> str:
    """Comments and strings blanked, lines kept. Include paths survive because they are read from the original."""
    return COMMENT_OR_TEXT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _reason_against(path: PurePosixPath, header: str) -> str | None:
    """Why a file of csrc/ may not include `header`; `path` is relative to csrc/."""
    layer = path.parts[0]
    is_binding = layer == "torch" or path.name in ("bind.cpp", "token_inputs.h")
    is_host = path.name in ("params.h", "heuristics.h", "launch.h", "traits.h") or layer == "python"
    is_cpu = path.name.startswith("cpu") or path.parts[:2] == ("common", "cpu")
    if _is_torch(header) and not is_binding:
        return "torch headers belong to csrc/torch and bind.cpp"
    if _is_python(header) and layer != "python":
        return "Python headers belong to csrc/python"
    if _is_cute(header) and (is_binding or is_host or is_cpu):
        return "CuTe and CUTLASS headers belong to kernels"
    if _is_cuda(header) and ((is_binding and layer != "torch") or is_host or is_cpu):
        return "CUDA headers belong to kernels, launch.cu and csrc/torch/stable.h"
    if layer == "common" and header.endswith(CXX) and "/" in header and not header.startswith("common/"):
        return "csrc/common includes only csrc/common" if _is_ours(header) else None
    if _is_ours(header) and header.split("/")[0] not in ("common", "torch"):
        folder = PurePosixPath(header).parent
        if layer == "torch":
            return "csrc/torch knows no operator"
        if layer == "python":
            return None if header.endswith("/heuristics.h") else "csrc/python includes only heuristics.h of an operator"
        if folder not in (path.parent, path.parent.parent):
            return "an operator includes its own folder, its family's and csrc/common"
    return None


def _is_ours(header: str) -> bool:
    return header.split("/")[0] in ("common", "recurrence", "routed", "pkm", "segment", "torch", "python")


def check_cxx(root: Path) -> Iterator[Violation]:
    for file in sorted(path for path in (root / "csrc").rglob("*") if path.suffix in CXX):
        path = PurePosixPath(file.relative_to(root / "csrc").as_posix())
        text = file.read_text()
        for match in INCLUDE.finditer(text):
            if reason := _reason_against(path, match[1]):
                line = text.count("\n", 0, match.start(1)) + 1
                yield Violation(f"csrc/{path}", line, f"includes {match[1]}: {reason}")
        if path.parts[0] != "common":
            code = _without_comments(text)
            for match in ASM.finditer(code):
                line = code.count("\n", 0, match.start()) + 1
                yield Violation(f"csrc/{path}", line, "inline asm belongs to csrc/common")
    for file in sorted(path for path in (root / "sim").rglob("*") if path.suffix in CXX):
        text = file.read_text()
        for match in INCLUDE.finditer(text):
            if _is_torch(match[1]) or match[1].split("/")[0] in ("common", "recurrence", "routed", "pkm", "segment"):
                line = text.count("\n", 0, match.start(1)) + 1
                yield Violation(
                    file.relative_to(root).as_posix(), line, f"includes {match[1]}: sim/ knows neither torch nor csrc"
                )


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module or member."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _layer(module: str) -> str:
    """`ops` for `remora.ops.recurrence`; empty for the foundation (`remora`, `remora._ext`, ...)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in (*PYTHON_LAYERS, "testing") else ""


def check_python(root: Path) -> Iterator[Violation]:
    source = root / "python"
    for file in sorted((source / "remora").rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        module = ".".join(parts)
        package = module if parts[-1] == "__init__" else ".".join(parts[:-1])
        package = package.removesuffix(".__init__")
        own = "cli" if parts[-1] == "__main__" else _layer(module)
        for line, name in _imports(ast.parse(file.read_text()), package):
            if name.split(".")[0] != "remora":
                continue
            other = _layer(name)
            if reason := _reason_against_import(own, other):
                yield Violation(file.relative_to(root).as_posix(), line, f"imports {name}: {reason}")


def _reason_against_import(own: str, other: str) -> str | None:
    if other in ("", own):
        return None
    if other == "testing":
        return "remora.testing is for tests and benchmarks"
    if own == "testing":
        return None
    if own == "":
        return f"the foundation of the package does not know remora.{other}"
    if PYTHON_LAYERS.index(other) > PYTHON_LAYERS.index(own):
        return f"remora.{own} lies below remora.{other}"
    return None


def check(root: Path) -> list[Violation]:
    return [*check_cxx(root), *check_python(root)]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    violations = check(root)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
