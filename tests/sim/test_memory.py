"""Memory instructions, traffic counters, and Hopper's asynchronous copies, from hand-written PTX."""

import numpy as np
import pytest
import torch
from simtest import kernel

RNG = np.random.default_rng(3)
MODES = ["early", "late"]


def test_sectors_and_footprint(sim):
    body = """ ld.param.u64 %a, [p0]; ld.param.u32 %s, [p1]; mov.u32 %t, %tid.x; mul.lo.s32 %t, %t, %s;
      mul.wide.u32 %o, %t, 4; add.s64 %a, %a, %o; ld.global.f32 %f, [%a]; add.f32 %f, %f, %f; st.global.f32 [%a], %f;"""
    m = sim.load_ptx(kernel(body, ["u64", "u32"], ".reg .b64 %a, %o; .reg .b32 %t, %s; .reg .f32 %f;"))
    raw = np.ones(32 * 32 + 64, np.float32)
    x = raw[(-raw.ctypes.data // 4) % 32 :]
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (0, 1)):
        s = m.launch("k", 1, 32, [x, stride])
        assert s["global_load"] == {
            "requests": 1,
            "sectors": sectors,
            "ideal_sectors": 4 if stride else 1,
            "bytes": 128,
        }
        assert s["global_load_footprint"] == 32 * sectors
        assert s["warp_instructions_by_class"]["ld_global"] == 1


@pytest.mark.parametrize(
    ("stride", "bytes_", "wavefronts", "ideal"),
    [
        (1, 4, 1, 1),
        (2, 4, 2, 1),
        (32, 4, 32, 1),
        (0, 4, 1, 1),
        (33, 4, 1, 1),
        (2, 8, 2, 2),
        (4, 16, 4, 4),
        (32, 16, 32, 4),
    ],
)
def test_bank_conflicts(sim, stride, bytes_, wavefronts, ideal):
    load = {4: "ld.shared.b32 %r1", 8: "ld.shared.v2.b32 {%r1, %r2}", 16: "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}"}[
        bytes_
    ]
    body = f" mov.u32 %t, %tid.x; mul.lo.s32 %t, %t, {4 * stride}; mov.u32 %b, s; add.s32 %t, %t, %b; {load}, [%t];"
    m = sim.load_ptx(kernel(body, ["u64"], ".reg .b32 %t, %b, %r<5>;", shared=".shared .align 128 .b8 s[8192];"))
    s = m.launch("k", 1, 32, [0])["shared_load"]
    assert (s["wavefronts"], s["wavefronts"] - s["excess_wavefronts"]) == (wavefronts, ideal)


ADDRESS = ".reg .b64 %a<8>; .reg .b32 %r<20>; .reg .pred %p<4>; .reg .b64 %st;"
WAIT = """W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], {parity}; @%p1 bra D{n}; bra W{n}; D{n}:"""


@pytest.mark.parametrize("mode", MODES)
def test_bulk_copy(sim, mode):
    body = f""" mov.u32 %r1, %tid.x; setp.ne.u32 %p2, %r1, 0; ld.param.u64 %a1, [p0]; ld.param.u64 %a2, [p1];
    @%p2 bra SKIP;
    mbarrier.init.shared::cta.b64 [bar], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%a1], 512, [bar];
SKIP: bar.sync 0;
    {WAIT.format(n=1, parity=0)}
    shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.s32 %r3, %r3, %r2; ld.shared.b32 %r4, [%r3];
    add.s32 %r4, %r4, 7; st.shared.b32 [%r3], %r4;
    fence.proxy.async.shared::cta; bar.sync 0;
    @%p2 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%a2], [s], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:"""
    m = sim.load_ptx(
        kernel(body, ["u64", "u64"], ADDRESS, shared=".shared .align 128 .b8 s[512]; .shared .align 8 .b64 bar;")
    )
    raw = np.zeros(1024, np.int32)
    x = raw[(-raw.ctypes.data // 4) % 32 :][:128]
    x[:] = np.arange(128)
    out = raw[(-raw.ctypes.data // 4) % 32 + 256 :][:128]
    m.launch("k", 1, 128, [x, out], **{"async": mode}, racecheck=1, initcheck=1, synccheck=1)
    assert (out == np.arange(128) + 7).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_copy(sim, mode, swizzle):
    """A 2D tile at a corner: out-of-bounds zero fill, swizzle, store with clipping."""
    rows, cols = 16, 64
    inner = {0: 16, 32: 8, 64: 16, 128: 32}[swizzle]
    raw = np.zeros(2 * rows * cols + 64, np.float32)
    base = (-raw.ctypes.data // 4) % 32
    x, out = (raw[base + i * rows * cols :][: rows * cols].reshape(rows, cols) for i in range(2))
    x[:] = RNG.standard_normal((rows, cols))
    body = f""" mov.u32 %r1, %tid.x; setp.ne.u32 %p2, %r1, 0;
    mov.b64 %a1, p0; mov.b64 %a2, p1; ld.param.u64 %a3, [p2];
    @%p2 bra SKIP;
    mbarrier.init.shared::cta.b64 [bar], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {8 * inner * 4};
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [s], [%a1, {{56, 12}}], [bar];
SKIP: bar.sync 0;
    {WAIT.format(n=1, parity=0)}
L: shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.s32 %r3, %r3, %r2; ld.shared.b32 %r4, [%r3];
    mul.wide.u32 %a4, %r2, 1; add.s64 %a4, %a4, %a3; st.global.b32 [%a4], %r4;
    add.s32 %r1, %r1, 32; setp.lt.u32 %p3, %r1, {8 * inner}; @%p3 bra L;
    bar.sync 0;
    @%p2 bra END;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%a2, {{-4, 2}}], [s];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:"""
    text = kernel(
        body, ["u64", "u64", "u64"], ADDRESS, shared=".shared .align 1024 .b8 s[1024]; .shared .align 8 .b64 bar;"
    )
    text = text.replace(".param .u64 p0", ".param .align 64 .b8 p0[128]").replace(
        ".param .u64 p1", ".param .align 64 .b8 p1[128]"
    )
    m = sim.load_ptx(text)
    maps = [sim.tensor_map(t.ctypes.data, "f32", [cols, rows], [cols * 4], [inner, 8], swizzle) for t in (x, out)]
    tile = np.zeros(8 * inner, np.float32)
    m.launch("k", 1, 32, [*maps, tile], **{"async": mode})
    want = np.zeros((8, inner), np.float32)
    part = x[12:20, 56 : 56 + inner]
    want[: part.shape[0], : part.shape[1]] = part
    address = np.arange(8 * inner) * 4
    bits = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[swizzle]
    np.testing.assert_array_equal(tile[(address ^ (address >> 3 & bits)) // 4].reshape(8, inner), want)
    clipped = np.zeros_like(x)
    clipped[2:10, : inner - 4] = want[:, 4:]
    np.testing.assert_array_equal(out, clipped)


@pytest.mark.parametrize("mode", MODES)
def test_cluster(sim, mode):
    """Distributed shared memory, barrier.cluster, st.async and a multicast bulk copy."""
    body = f""" mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1; setp.ne.u32 %p2, %r1, 0;
    ld.param.u64 %a1, [p0]; ld.param.u64 %a2, [p1];
    @%p2 bra A; mbarrier.init.shared::cta.b64 [bar], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
A:  barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u32 %r5, s; shl.b32 %r6, %r1, 2; add.s32 %r5, %r5, %r6;
    mapa.shared::cluster.u32 %r7, %r5, %r3; mov.u32 %r8, bar; mapa.shared::cluster.u32 %r9, %r8, %r3;
    mad.lo.s32 %r10, %r2, 1000, %r1;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r7], %r10, [%r9];
    setp.ne.u32 %p3, %r2, 0; or.pred %p2, %p2, %p3;
    mov.u16 %h, 3; mov.u32 %r11, m;
    @!%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r11], [%a1], 128, [%r8], %h;
    {WAIT.format(n=1, parity=0)}
    ld.shared.b32 %r12, [%r5]; add.s32 %r13, %r11, %r6; ld.shared.b32 %r14, [%r13]; add.s32 %r12, %r12, %r14;
    mov.u32 %r15, %ctaid.x; mad.lo.s32 %r15, %r15, 32, %r1; mul.wide.u32 %a3, %r15, 4;
    add.s64 %a3, %a3, %a2; st.global.b32 [%a3], %r12;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    m = sim.load_ptx(
        kernel(
            body,
            ["u64", "u64"],
            ADDRESS + " .reg .b16 %h;",
            shared=".shared .align 128 .b8 s[128]; .shared .align 128 .b8 m[128]; .shared .align 8 .b64 bar;",
        )
    )
    raw = np.zeros(256, np.int32)
    x = raw[(-raw.ctypes.data // 4) % 32 :][:32]
    x[:] = np.arange(32) * 100000
    out = np.zeros(128, np.int32)
    m.launch("k", 4, 32, [x, out], cluster=2, **{"async": mode})
    for cta in range(4):
        assert (out[32 * cta :][:32] == (cta % 2 ^ 1) * 1000 + np.arange(32) + x).all()


def test_unsupported_is_loud(sim):
    with pytest.raises(sim.Error, match=r"tcgen05.*\n.*kernel k, PTX line \d+"):
        sim.load_ptx(kernel(" tcgen05.fence::after_thread_sync;", ["u64"])).params("k")
    with pytest.raises(sim.Error, match="frobnicate"):
        sim.load_ptx(kernel(" add.frobnicate.f32 %f, %f, %f;", ["u64"], ".reg .f32 %f;")).params("k")


def test_memcheck_registered_tensor(sim):
    x = torch.ones(64)
    sim.register(x, "x")
    body = (
        " ld.param.u64 %a1, [p0]; ld.param.u32 %r1, [p1]; mov.u32 %r2, %tid.x; "
        "add.s32 %r1, %r1, %r2; mul.wide.s32 %a2, %r1, 4; add.s64 %a1, %a1, %a2; "
        "ld.global.b32 %r3, [%a1];"
    )
    m = sim.load_ptx(kernel(body, ["u64", "u32"], ADDRESS))
    m.launch("k", 1, 32, [x, 32], memcheck=1)
    with pytest.raises(
        sim.Error, match=r"memcheck: invalid global read of 4 bytes .*: 0 bytes behind the end of x of 256 bytes"
    ):
        m.launch("k", 1, 32, [x, 33], memcheck=1)
    sim.unregister(x)


def test_deadlock_is_reported(sim):
    body = f" mbarrier.init.shared::cta.b64 [bar], 2; {WAIT.format(n=1, parity=0)}"
    with pytest.raises(sim.Error, match="polls a barrier that never completes"):
        sim.load_ptx(kernel(body, ["u64"], ADDRESS, shared=".shared .align 8 .b64 bar;")).launch("k", 1, 1, [0])


def bulk_without_wait(wait):
    body = f""" mov.u32 %r1, %tid.x; setp.ne.u32 %p2, %r1, 0; ld.param.u64 %a1, [p0]; ld.param.u64 %a2, [p1];
    mov.u32 %r3, s; shl.b32 %r2, %r1, 2; add.s32 %r3, %r3, %r2;
    @%p2 bra SKIP;
    mbarrier.init.shared::cta.b64 [bar], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%a1], 256, [bar];
SKIP: bar.warp.sync 0xffffffff;
    setp.lt.u32 %p3, %r1, 32; @%p3 bar.arrive 1, 64; @!%p3 bar.sync 1, 64;
    {WAIT.format(n=1, parity=0) if wait else ""}
    ld.shared.b32 %r4, [%r3]; mul.wide.u32 %a3, %r2, 1; add.s64 %a2, %a2, %a3; st.global.b32 [%a2], %r4;"""
    return kernel(body, ["u64", "u64"], ADDRESS, shared=".shared .align 128 .b8 s[256]; .shared .align 8 .b64 bar;")


def test_late_exposes_missing_mbarrier_wait(sim):
    raw = np.zeros(256, np.int32)
    x = raw[(-raw.ctypes.data // 4) % 32 :][:64]
    x[:] = 5
    for wait in (True, False):
        m = sim.load_ptx(bulk_without_wait(wait))
        for mode in MODES:
            out = np.zeros(64, np.int32)
            m.launch("k", 1, 64, [x, out], **{"async": mode})
            assert (out == (5 if wait or mode == "early" else 0)).all()


def test_racecheck_and_initcheck_of_bulk_copies(sim):
    raw = np.ones(256, np.int32)
    x, out = raw[(-raw.ctypes.data // 4) % 32 :][:64], np.zeros(64, np.int32)
    sim.load_ptx(bulk_without_wait(True)).launch("k", 1, 64, [x, out], racecheck=1, initcheck=1)
