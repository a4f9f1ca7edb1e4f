"""nvcc-compiled programs linked to the simulator, in several modes."""

import pytest
from simtest import HERE, build_cuda, run

CASES = [
    "reduce",
    "scan",
    "gemm",
    "histogram",
    "lookback",
    "language",
    "cooperative",
    "specialised",
    "tensor_cores",
    "spin_lock",
    "collectives",
]
MODES = [
    {},
    {"async": "late"},
    {"warp_order": "reverse"},
    {"warp_order": "random", "quantum": 7},
    {"threads": 1},
    {"memcheck": 1, "initcheck": 1, "synccheck": 1, "racecheck": 1},
]


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(f"{k}={v}" for k, v in m.items()) or "default")
@pytest.mark.parametrize("case", CASES)
def test_program(case, mode, arch):
    exe = build_cuda(HERE / "cuda/programs.cu", arch)
    done = run(exe, case, **mode)
    assert done.returncode == 0, done.stdout + done.stderr
    if case == "language":
        assert done.stdout == "lane 3: 432.00 text 1099511627776 x%\n"


def test_stats_table():
    exe = build_cuda(HERE / "cuda/programs.cu")
    done = run(exe, "gemm", stats=1)
    assert "global load sectors" in done.stderr
    assert "fp32" in done.stderr
