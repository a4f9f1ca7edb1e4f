"""Registered tensors as memcheck and initcheck see them: overlapping, nested, uninitialised, many."""

import time

import pytest
import torch
from simtest import kernel

COPY = kernel(
    " ld.param.u64 %p, [p0]; ld.param.u64 %q, [p1]; mov.u32 %r, %tid.x; mul.wide.u32 %o, %r, 4;"
    " add.s64 %p, %p, %o; add.s64 %q, %q, %o; ld.global.b32 %r, [%p]; st.global.b32 [%q], %r;",
    ["u64", "u64"],
    ".reg .b64 %p, %q, %o; .reg .b32 %r;",
)
CHECKS = {"memcheck": 1, "initcheck": 1}


@pytest.fixture
def registered(sim):
    """register(tensor, name, initialised), undone at the end."""
    tensors = []

    def register(tensor, name, initialised=True):
        sim.register(tensor, name, initialised)
        tensors.append(tensor)

    yield register
    for tensor in tensors:
        sim.unregister(tensor)


@pytest.fixture
def copy(sim):
    module = sim.load_ptx(COPY)
    return lambda source, target, **options: module.launch("k", 1, 32, [source, target], **{**CHECKS, **options})


def test_output_is_initialised_by_the_kernel(sim, registered, copy):
    x, y, z = torch.ones(32), torch.empty(32), torch.empty(32)
    registered(x, "x")
    registered(y, "y", initialised=False)
    registered(z, "z", initialised=False)
    with pytest.raises(sim.Error, match=r"initcheck: read of uninitialised global memory at .* in y"):
        copy(y, z)
    copy(x, y)
    copy(y, z)
    assert torch.equal(z, x)


def test_zeroed_output_may_be_read(registered, copy):
    x, y = torch.zeros(32), torch.empty(32)
    registered(x, "zeroed", initialised=True)
    registered(y, "y", initialised=False)
    copy(x, y)


def test_nested_ranges(sim, registered, copy):
    whole, out = torch.zeros(96), torch.zeros(32)
    registered(whole, "whole")
    registered(whole[32:64], "middle")
    registered(out, "out")
    for begin in (0, 16, 32, 48, 64):  # inside one of the two at least
        copy(whole[begin:], out)
    with pytest.raises(sim.Error, match="memcheck: invalid global read of 4 bytes"):
        copy(whole[65:], out)
    sim.unregister(whole)
    sim.register(whole[0:0], "nothing")
    copy(whole[32:], out)
    with pytest.raises(sim.Error, match="0 bytes behind the end of middle of 128 bytes"):
        copy(whole[33:], out)


def test_overlapping_ranges_of_which_one_is_initialised(sim, registered, copy):
    storage, out = torch.zeros(64), torch.zeros(32)
    registered(storage, "workspace", initialised=False)
    registered(storage[:32], "input")
    registered(out, "out")
    copy(storage, out)
    with pytest.raises(sim.Error, match="initcheck"):
        copy(storage[1:], out)
    copy(out, storage[32:])
    copy(storage[32:], out)


def test_registered_twice(sim, copy):
    x, y = torch.ones(32), torch.ones(32)
    for t in (x, x, y):
        sim.register(t, "t")
    sim.unregister(x)
    copy(x, y)
    sim.unregister(x)
    with pytest.raises(sim.Error, match="memcheck"):
        copy(x, y)
    sim.unregister(y)


def test_thousands_of_launches_with_thirty_tensors(sim, copy):
    tensors = [torch.ones(1024) for _ in range(30)]
    begin = time.perf_counter()
    for _ in range(300):
        for i, t in enumerate(tensors):
            sim.register(t, f"tensor {i}", i % 2 == 0)
        copy(tensors[0], tensors[1], threads=1)
        for t in tensors:
            sim.unregister(t)
    assert time.perf_counter() - begin < 3  # 10 ms a launch would be an hour of tests
