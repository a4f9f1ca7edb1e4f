"""mma.sync of every supported shape and type against numpy, and ldmatrix/stmatrix/movmatrix."""

import numpy as np
import oracles
import pytest
from simtest import kernel

RNG = np.random.default_rng(5)
SHAPES = [
    ("f16", "f32", 16, 8, 8),
    ("f16", "f32", 16, 8, 16),
    ("f16", "f16", 16, 8, 16),
    ("bf16", "f32", 16, 8, 8),
    ("bf16", "f32", 16, 8, 16),
    ("tf32", "f32", 16, 8, 4),
    ("tf32", "f32", 16, 8, 8),
    ("f64", "f64", 8, 8, 4),
    ("f64", "f64", 16, 8, 4),
    ("f64", "f64", 16, 8, 8),
    ("f64", "f64", 16, 8, 16),
    ("s8", "s32", 16, 8, 16),
    ("s8", "s32", 16, 8, 32),
    ("u8", "s32", 16, 8, 32),
    ("s8", "s32", 8, 8, 16),
    ("e4m3", "f32", 16, 8, 32),
    ("e5m2", "f32", 16, 8, 32),
]
BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "f64": 8, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


def random_matrix(t, shape):
    """(storage, value) of small exact numbers."""
    x = RNG.integers(-8, 8, shape).astype(np.float64)
    if t == "u8":
        x = np.abs(x)
    if t in ("s8", "u8"):
        return x.astype(np.int8 if t == "s8" else np.uint8), x
    if t in ("e4m3", "e5m2"):
        f = oracles.E4M3 if t == "e4m3" else oracles.E5M2
        bits = oracles.encode(x.ravel(), f, True)
        return bits.astype(np.uint8).reshape(shape), oracles.decode(bits, f).reshape(shape)
    if t == "bf16":
        return oracles.to_bf16(x.ravel()).reshape(shape), x
    return x.astype({"f16": np.float16, "tf32": np.float32, "f64": np.float64}[t]), x


@pytest.mark.parametrize(("t", "acc", "m", "n", "k"), SHAPES)
def test_mma(sim, t, acc, m, n, k):
    (a, av), (b, bv) = random_matrix(t, (m, k)), random_matrix(t, (n, k))
    size = BYTES[t]
    word = max(4, size)
    per = word // size
    regs_a, regs_b = m * k // (32 * per), n * k // (32 * per)
    w = "f64" if size == 8 else "b32"
    cw = "f64" if acc == "f64" else "b32"
    half = acc == "f16"
    regs_c = m * n // 32 // (2 if half else 1)
    # Fragment layouts as the PTX manual gives them: row g = lane / 4, column 'per' elements of t = lane % 4.
    body = (
        " mov.u32 %l, %tid.x; shr.u32 %g, %l, 2; and.b32 %t, %l, 3; ld.param.u64 %pa, [p0]; "
        "ld.param.u64 %pb, [p1]; ld.param.u64 %pc, [p2];\n"
    )

    def address(reg, row, col, ld, pointer, bytes_):
        return f" {row} mad.lo.s32 %o, %x, {ld}, {col}; mul.wide.u32 %q, %o, {bytes_}; add.s64 %q, %q, {pointer};\n"

    for i in range(regs_a):
        body += f" add.s32 %x, %g, {8 * (i % (m // 8))}; mad.lo.s32 %y, %t, {per}, {4 * per * (i // (m // 8))};\n"
        body += (
            f" mad.lo.s32 %o, %x, {k}, %y; mul.wide.u32 %q, %o, {size}; add.s64 %q, %q, %pa; "
            f"ld.global.{w} %a{i}, [%q];\n"
        )
    for i in range(regs_b):
        body += (
            f" mad.lo.s32 %y, %t, {per}, {4 * per * i}; mad.lo.s32 %o, %g, {k}, %y; "
            f"mul.wide.u32 %q, %o, {size}; add.s64 %q, %q, %pb; ld.global.{w} %b{i}, [%q];\n"
        )
    for i in range(regs_c):
        body += f" mov.{cw} %c{i}, {'0d0000000000000000' if acc == 'f64' else 0};\n"

    def vec(p, c):
        return "{" + ", ".join(f"%{p}{i}" for i in range(c)) + "}"

    fragments = ", ".join((vec("c", regs_c), vec("a", regs_a), vec("b", regs_b), vec("c", regs_c)))
    body += f" mma.sync.aligned.m{m}n{n}k{k}.row.col.{acc}.{t}.{t}.{acc} {fragments};\n"
    for i in range(regs_c):
        row, _col = (8 * i, "2") if half else (8 * (i // 2), "2")
        body += f" add.s32 %x, %g, {row}; mad.lo.s32 %y, %t, 2, {0 if half else i % 2}; mad.lo.s32 %o, %x, {n}, %y;\n"
        body += (
            f" mul.wide.u32 %q, %o, {2 if half else 8 if acc == 'f64' else 4}; add.s64 %q, %q, %pc; "
            f"st.global.{cw} [%q], %c{i};\n"
        )
    decl = f".reg .b32 %l, %g, %t, %x, %y, %o; .reg .b64 %q, %pa, %pb, %pc; .reg .{w} %a<8>, %b<4>; .reg .{cw} %c<4>;"
    out = np.zeros((m, n), {"f32": np.float32, "f16": np.float16, "s32": np.int32, "f64": np.float64}[acc])
    s = sim.load_ptx(kernel(body, ["u64"] * 3, decl)).launch("k", 1, 32, [a, b, out])
    np.testing.assert_array_equal(out.astype(np.float64), av @ bv.T)
    assert s["mma_flops"] == {t: 2 * m * n * k}


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrix_moves(sim, trans):
    x = np.arange(256, dtype=np.uint16)
    body = f""" mov.u32 %l, %tid.x; ld.param.u64 %p, [p0]; ld.param.u64 %o, [p1];
    mul.wide.u32 %q, %l, 16; add.s64 %p, %p, %q;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%p];
    shl.b32 %a, %l, 4; mov.u32 %b, s; add.s32 %a, %a, %b;
    st.shared.v4.b32 [%a], {{%r0, %r1, %r2, %r3}}; bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%a];
    movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r1;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%a+512], {{%r0, %r1, %r2, %r3}}; bar.warp.sync 0xffffffff;
    ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%a+512];
    add.s64 %o, %o, %q; st.global.v4.b32 [%o], {{%r0, %r1, %r2, %r3}};"""
    out = np.zeros_like(x)
    m = sim.load_ptx(
        kernel(
            body,
            ["u64", "u64"],
            ".reg .b32 %l, %a, %b, %r<4>; .reg .b64 %p, %o, %q;",
            shared=".shared .align 16 .b8 s[1024];",
        )
    )
    stats = m.launch("k", 1, 32, [x, out])
    want = x.reshape(4, 8, 8).copy()
    want[1] = want[1].T
    assert (out.reshape(4, 8, 8) == want).all()
    assert stats["shared_load"]["excess_wavefronts"] == 0
