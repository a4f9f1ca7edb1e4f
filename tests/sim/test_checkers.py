"""Each checker finds a planted bug, names its line, and is silent on correct code."""

import pytest
from simtest import HERE, build_cuda, run

CASES = [  # name, checker, what the message says
    ("oob", "memcheck", "memcheck: invalid global write"),
    ("use_after_free", "memcheck", "inside freed cudaMalloc"),
    ("oob_shared", "memcheck", "shared memory access out of bounds"),
    ("misaligned", "memcheck", "misaligned access of 16 bytes"),
    ("race", "racecheck", "hazard on shared memory"),
    ("race_war", "racecheck", "hazard on shared memory"),
    ("race_warp", "racecheck", "read-after-write hazard"),
    ("race_named", "racecheck", "hazard"),
    ("uninit", "initcheck", "uninitialised shared memory"),
    ("uninit_global", "initcheck", "uninitialised global memory"),
    ("divergent", "synccheck", "divergent threads in an aligned barrier"),
    ("mismatched", "synccheck", "deadlock"),
]
ALL = {"memcheck": 1, "racecheck": 1, "initcheck": 1, "synccheck": 1}


@pytest.fixture(scope="module")
def exe():
    return build_cuda(HERE / "cuda/checkers.cu")


@pytest.mark.parametrize(("name", "checker", "message"), CASES)
def test_bug_is_found(exe, name, checker, message):
    done = run(exe, name, "bad", **{checker: 1})
    assert message in done.stderr, done.stderr
    assert done.returncode == 1
    assert "PTX line" in done.stderr
    assert "checkers.cu:" in done.stderr
    assert "block (0,0,0)" in done.stderr


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("name", [c[0] for c in CASES] + ["missing_wait"])
def test_correct_version_is_silent(exe, name, mode):
    done = run(exe, name, "good", **ALL, **{"async": mode})
    assert (done.returncode, done.stderr) == (0, "")


def test_late_exposes_missing_wait(exe):
    assert run(exe, "missing_wait", "bad", **{"async": "early"}).returncode == 0
    assert run(exe, "missing_wait", "bad", **{"async": "late"}).returncode == 2


def test_reverse_warp_order_changes_racy_result(exe):
    assert run(exe, "race", "good", warp_order="reverse").returncode == 0
