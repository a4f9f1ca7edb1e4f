"""An extension linked to the simulator lives beside a torch that has loaded the real libcudart."""

import subprocess
import sys

from simtest import HERE, LIBRARY, compile_object

SCRIPT = """
import ctypes, sys, torch
lib = ctypes.CDLL(sys.argv[1])
x, y = torch.arange(1000.0), torch.ones(1000)
lib.run_axpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
assert lib.run_axpy(x.data_ptr(), y.data_ptr(), 2.0, 1000) == 0
assert torch.equal(y, 1 + 2 * x)
"""


def build(code="compute_80", compress="none"):
    obj = compile_object(HERE / "cuda/extension.cu", code=code, compress=compress)
    so = obj.with_suffix(".so")
    flags = ["-lpthread", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL"]
    subprocess.run(["g++", "-shared", str(obj), str(LIBRARY), *flags, "-o", str(so)], check=True)
    return so


def test_beside_torch():
    subprocess.run([sys.executable, "-c", SCRIPT, str(build())], check=True)


def test_wrong_flags_are_explained():
    for so, message in ((build(compress="size"), "is compressed"), (build(code="sm_80"), "machine code but no PTX")):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(so)], capture_output=True, text=True)
        assert message in done.stderr, done.stderr
        assert "--compress-mode=none" in done.stderr
