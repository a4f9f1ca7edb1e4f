"""Named barriers between producer and consumer warps, as the checkers and the asynchronous modes see them."""

import pytest
from simtest import HERE, build_cuda, run

ALL = {"memcheck": 1, "racecheck": 1, "initcheck": 1, "synccheck": 1}
ORDERS = [{}, {"warp_order": "reverse"}, {"warp_order": "random", "quantum": 5}]


@pytest.fixture(scope="module")
def exe():
    return build_cuda(HERE / "cuda/pipeline.cu")


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
@pytest.mark.parametrize("mode", ["early", "late"])
def test_correct_ring_is_silent(exe, mode, order):
    done = run(exe, "none", **ALL, **order, **{"async": mode})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What is reported; where it depends on which warps run first, one of several.
HAZARD, TWICE = "hazard on shared memory", "arrives twice in one phase"
BUGS = {
    "no_copy_wait": ("has not been waited for",),
    "wrong_group": ("has not been waited for",),
    "no_empty_wait": (HAZARD, TWICE),
    "no_full_wait": (HAZARD, TWICE, "uninitialised"),
    "wrong_stage": ("deadlock",),
    "no_arrive": ("deadlock",),
    "count": ("different thread counts", HAZARD),
}


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(exe, bug, mode, order):
    done = run(exe, bug, **ALL, **order, **{"async": mode})
    assert done.returncode == 1
    assert any(message in done.stderr for message in BUGS[bug]), done.stderr
    # The caller sees the same message through cudaGetErrorString.
    assert done.stdout.startswith("launch failure: ")
    assert done.stdout.removeprefix("launch failure: ").strip() == done.stderr.removeprefix("ptxsim: ").strip()


@pytest.mark.parametrize(("case", "check", "found"), [("together", "1", False), ("together", "strict", True)])
def test_stores_of_equal_bytes(exe, case, check, found):
    done = run(exe, case, racecheck=check)
    assert ("write-after-write" in done.stderr) == found


def test_stores_of_different_bytes(exe):
    done = run(exe, "together_", racecheck=1)
    assert "write-after-write hazard" in done.stderr
