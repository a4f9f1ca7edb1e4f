"""The simulator under test, and programs of nvcc linked to its library."""

import hashlib
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
PURELIB = pathlib.Path(sysconfig.get_path("purelib"))

# The module and the library come from the installed package, or from a build folder of sim/ alone.
BUILD = os.environ.get("PTXSIM_BUILD")
if BUILD:
    sys.path.insert(0, BUILD)
    ptxsim = importlib.import_module("_ptxsim")
else:
    ptxsim = importlib.import_module("remora.testing._ptxsim")
LIBRARY = pathlib.Path(ptxsim.__file__).parent / "libptxsim.a"
CACHE = pathlib.Path(
    os.environ.get("PTXSIM_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / f"ptxsim-tests-{os.getuid()}")
)


def find_nvcc():
    nvcc = shutil.which("nvcc") or PURELIB / "nvidia" / "cu13" / "bin" / "nvcc"
    assert pathlib.Path(nvcc).exists(), "these tests need nvcc: on PATH or from the wheel nvidia-cuda-nvcc"
    return str(nvcc)


def compile_object(source, arch="compute_80", flags=(), code=None, compress="none"):
    """An object with PTX-only device code; cached by content."""
    CACHE.mkdir(parents=True, exist_ok=True)
    source = pathlib.Path(source)
    command = [find_nvcc(), "-std=c++20", "-O2", "-lineinfo", f"--compress-mode={compress}", "-Xcompiler", "-fPIC"]
    command += ["--cudart=none", "-gencode", f"arch={arch},code={code or arch}", *flags, "-c", str(source)]
    key = hashlib.sha1(source.read_bytes() + " ".join(command).encode()).hexdigest()[:12]
    obj = CACHE / f"{source.stem}-{key}.o"
    if not obj.exists():
        part = obj.with_suffix(f".{os.getpid()}.o")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        part.rename(obj)
    return obj


def build_cuda(source, arch="compute_80", flags=()):
    """A program linked to the simulator instead of the CUDA runtime."""
    obj = compile_object(source, arch, flags)
    exe = obj.with_suffix("." + hashlib.sha1(str(LIBRARY).encode()).hexdigest()[:6])
    if not exe.exists() or exe.stat().st_mtime < LIBRARY.stat().st_mtime:
        part = exe.with_suffix(f".{os.getpid()}")
        command = ["g++", str(obj), str(LIBRARY), "-lpthread", "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        part.rename(exe)
    return exe


def cutlass_root():
    root = PURELIB / "cutlass_library" / "source"
    assert root.is_dir(), "this test needs the wheel nvidia-cutlass"
    return root


def run(exe, *args, **options):
    env = dict(os.environ)
    env.update({f"PTXSIM_{k.upper()}": str(v) for k, v in options.items()})
    return subprocess.run([str(exe), *map(str, args)], capture_output=True, text=True, env=env, timeout=900)


def kernel(body, params, regs="", arch="sm_90", shared=""):
    """PTX text of a kernel `k` with .u64/.f32/... parameters named p0, p1, ..."""
    plist = ", ".join(f".param .{t} p{i}" for i, t in enumerate(params))
    return f""".version 8.7
.target {arch}
.address_size 64
{shared}
.visible .entry k({plist})
{{
{regs}
{body}
ret;
}}
"""
