"""Instruction families against numpy oracles, on random and edge values."""

import numpy as np
import oracles as small
import pytest
from simtest import kernel

# The oracles compute with NaN and out-of-range values on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RNG = np.random.default_rng(7)
NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
}
REG = {1: "b16", 2: "b16", 4: "b32", 8: "b64", 16: "b128"}


def values(t, n=512):
    dt = NP[t]
    if t in ("f32", "f64", "f16"):
        bits = {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16}[t]
        any_bits = RNG.integers(0, np.iinfo(bits).max, n // 4, dtype=bits, endpoint=True).view(dt)
        normal = (RNG.standard_normal(n // 2) * 10.0 ** RNG.integers(-3, 4, n // 2)).astype(dt)
        tiny = np.finfo(dt).tiny
        edge = np.array(
            [
                0.0,
                -0.0,
                1,
                -1,
                0.5,
                1.5,
                2.5,
                -2.5,
                np.inf,
                -np.inf,
                np.nan,
                tiny,
                -tiny,
                tiny / 2,
                np.finfo(dt).max,
                -np.finfo(dt).max,
                2.0**31,
                -(2.0**31),
                2.0**63,
                65504,
                65520,
                448,
                464,
                57344,
            ],
            dtype=np.float64,
        )
        with np.errstate(all="ignore"):
            return RNG.permutation(np.resize(np.concatenate([any_bits, normal, edge.astype(dt)]), n))
    info = np.iinfo(dt)
    edge = np.array([0, 1, 2, 31, 32, 33, 63, 64, info.max, info.max - 1, info.min, info.min + 1], dtype=dt)
    random = RNG.integers(info.min, info.max, n // 2, dtype=dt, endpoint=True)
    few = RNG.integers(0, 100, n // 4).astype(dt)
    return RNG.permutation(np.resize(np.concatenate([random, few, edge]), n))


def evaluate(sim, instruction, out_type, inputs, types, arch="sm_90"):
    """Runs `instruction` (with {d}, {a}, {b}, {c}, {e}) on every element."""
    n = len(inputs[0])
    decl, body = (
        " .reg .b64 %ra<16>; .reg .b32 %t<8>; .reg .pred %q<4>;\n",
        " mov.u32 %t1, %tid.x; mov.u32 %t2, %ctaid.x; mad.lo.s32 %t1, %t2, 64, %t1;\n",
    )
    names = {}
    for i, (t, letter) in enumerate(zip(types, "abce")):
        size = np.dtype(NP[t]).itemsize
        decl += f" .reg .{REG[size]} %{letter};\n"
        body += (
            f" ld.param.u64 %ra1, [p{i + 1}]; mad.wide.u32 %ra2, %t1, {size}, %ra1; "
            f"ld.global.{t if size == 1 else f'b{8 * size}'} %{letter}, [%ra2];\n"
        )
        names[letter] = f"%{letter}"
    size = np.dtype(NP[out_type]).itemsize
    decl += f" .reg .{REG[size]} %d;\n"
    body += " " + instruction.format(d="%d", **names) + "\n"
    body += f" ld.param.u64 %ra1, [p0]; mad.wide.u32 %ra2, %t1, {size}, %ra1; st.global.b{8 * size} [%ra2], %d;\n"
    out = np.zeros(n, NP[out_type])
    m = sim.load_ptx(kernel(body, ["u64"] * (len(inputs) + 1), decl, arch))
    m.launch("k", n // 64, 64, [out, *inputs])
    return out


def same(got, want):
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype.kind == "f":
        both_nan = np.isnan(got) & np.isnan(want)
        bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[got.dtype.itemsize]
        equal = (got.view(bits) == want.astype(got.dtype).view(bits)) | both_nan
    else:
        equal = got == want
    bad = np.nonzero(~equal)[0]
    assert bad.size == 0, f"{bad.size} differ, e.g. got {got[bad[:4]]} want {want[bad[:4]]}"


def wide(t, x):
    return x.astype(object)


def wrap(t, x):
    bits = 8 * np.dtype(NP[t]).itemsize
    x = np.array([int(v) & (2**bits - 1) for v in x], dtype=object)
    return np.array([v - 2**bits if t[0] == "s" and v >= 2 ** (bits - 1) else v for v in x], dtype=object).astype(NP[t])


INTS = ["u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("t", INTS)
@pytest.mark.parametrize("op", ["add", "sub", "mul.lo", "mul.hi", "min", "max", "div", "rem", "mad.lo", "sad"])
def test_integer(sim, op, t):
    bits = 8 * np.dtype(NP[t]).itemsize
    a, b, c = values(t), values(t), values(t)
    if op in ("div", "rem"):
        b[b == 0] = 3
    A, B, C = wide(t, a), wide(t, b), wide(t, c)

    def trunc(x, y):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    f = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul.lo": lambda x, y, z: x * y,
        "mul.hi": lambda x, y, z: x * y >> bits,
        "min": lambda x, y, z: min(x, y),
        "max": lambda x, y, z: max(x, y),
        "div": lambda x, y, z: trunc(x, y),
        "rem": lambda x, y, z: x - y * trunc(x, y),
        "mad.lo": lambda x, y, z: x * y + z,
        "sad": lambda x, y, z: z + abs(x - y),
    }[op]
    want = wrap(t, [f(int(x), int(y), int(z)) for x, y, z in zip(A, B, C)])
    operands = "{d}, {a}, {b}, {c}" if op in ("mad.lo", "sad") else "{d}, {a}, {b}"
    got = evaluate(sim, f"{op}.{t} {operands};", t, [a, b, c], [t] * 3)
    same(got, want)


@pytest.mark.parametrize(("t", "w"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide(sim, t, w):
    a, b, c = values(t), values(t), values(w)
    want = wrap(w, [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c)])
    same(evaluate(sim, f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}};", w, [a, b, c], [t, t, w]), want)


def test_carry_chain(sim):
    lo, hi = values("u32"), values("u32")
    text = "{{ .reg .b32 %l, %h; add.cc.u32 %l, {a}, {b}; addc.u32 %h, {a}, {b}; mov.b64 {d}, {{%l, %h}}; }}"
    want = wrap(
        "u64",
        [
            ((int(x) + int(y)) & 0xFFFFFFFF) | ((int(x) + int(y) + (int(x) + int(y) >> 32)) & 0xFFFFFFFF) << 32
            for x, y in zip(lo, hi)
        ],
    )
    same(evaluate(sim, text, "u64", [lo, hi], ["u32", "u32"]), want)
    text = "{{ .reg .b32 %l, %h; sub.cc.u32 %l, {a}, {b}; subc.u32 %h, {a}, {b}; mov.b64 {d}, {{%l, %h}}; }}"
    want = wrap(
        "u64",
        [((int(x) - int(y)) & 0xFFFFFFFF) | ((int(x) - int(y) - (x < y)) & 0xFFFFFFFF) << 32 for x, y in zip(lo, hi)],
    )
    same(evaluate(sim, text, "u64", [lo, hi], ["u32", "u32"]), want)


@pytest.mark.parametrize("lut", [0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFE])
def test_lop3(sim, lut):
    a, b, c = values("b32"), values("b32"), values("b32")
    want = np.zeros_like(a)
    for m in range(8):
        if lut >> m & 1:
            want |= (a if m & 4 else ~a) & (b if m & 2 else ~b) & (c if m & 1 else ~c)
    same(evaluate(sim, f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut};", "b32", [a, b, c], ["b32"] * 3), want)


@pytest.mark.parametrize("t", ["b16", "b32", "b64", "s16", "s32", "s64"])
def test_shifts(sim, t):
    bits = 8 * np.dtype(NP[t]).itemsize
    a, n = values(t), values("u32")
    right = [int(x) >> min(int(k), bits - 1 if t[0] == "s" else bits) for x, k in zip(a, n)]
    same(evaluate(sim, f"shr.{t} {{d}}, {{a}}, {{b}};", t, [a, n], [t, "u32"]), wrap(t, right))
    left = [int(x) << int(k) if k < bits else 0 for x, k in zip(a, n)]
    same(evaluate(sim, f"shl.b{bits} {{d}}, {{a}}, {{b}};", t, [a, n], [t, "u32"]), wrap(t, left))


@pytest.mark.parametrize("mode", ["l.wrap", "l.clamp", "r.wrap", "r.clamp"])
def test_funnel(sim, mode):
    a, b, c = values("b32"), values("b32"), values("u32")
    n = [int(x) & 31 if "wrap" in mode else min(int(x), 32) for x in c]
    pair = [int(y) << 32 | int(x) for x, y in zip(a, b)]
    want = [(p << k >> 32) & 0xFFFFFFFF if mode[0] == "l" else (p >> k) & 0xFFFFFFFF for p, k in zip(pair, n)]
    same(
        evaluate(sim, f"shf.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "b32", [a, b, c], ["b32", "b32", "u32"]),
        np.array(want, np.uint32),
    )


def test_prmt(sim):
    a, b, c = values("b32"), values("b32"), values("b32")

    def one(x, y, s):
        pool = [(int(y) << 32 | int(x)) >> 8 * i & 255 for i in range(8)]
        r = 0
        for i in range(4):
            k = int(s) >> 4 * i & 15
            v = pool[k & 7]
            r |= ((255 if v & 128 else 0) if k & 8 else v) << 8 * i
        return r

    want = np.array([one(*v) for v in zip(a, b, c)], np.uint32)
    same(evaluate(sim, "prmt.b32 {d}, {a}, {b}, {c};", "b32", [a, b, c], ["b32"] * 3), want)


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bitfields(sim, t):
    bits = 8 * np.dtype(NP[t]).itemsize
    a, b = values(t), values(t)
    pos, length = RNG.integers(0, bits, len(a)).astype(np.uint32), RNG.integers(0, bits + 1, len(a)).astype(np.uint32)

    def bfe(x, p, n):
        p, n, x = int(p), int(n), int(x)
        if n == 0:
            return 0
        u = x & (2**bits - 1)
        sign = (u >> min(p + n - 1, bits - 1)) & 1 if t[0] == "s" else 0
        return sum(((u >> (p + i)) & 1 if i < n and p + i < bits else sign) << i for i in range(bits))

    same(
        evaluate(sim, f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [a, pos, length], [t, "u32", "u32"]),
        wrap(t, [bfe(*v) for v in zip(a, pos, length)]),
    )
    if t[0] == "u":

        def bfi(x, y, p, n):
            mask = ((1 << int(n)) - 1 << int(p)) & (2**bits - 1)
            return (int(y) & ~mask) | (int(x) << int(p) & mask)

        got = evaluate(
            sim, f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", t, [a, b, pos, length], [t, t, "u32", "u32"]
        )
        same(got, wrap(t, [bfi(*v) for v in zip(a, b, pos, length)]))


@pytest.mark.parametrize("t", ["b32", "b64"])
def test_bit_counts(sim, t):
    bits = int(t[1:])
    a = values(t)
    same(evaluate(sim, f"popc.{t} {{d}}, {{a}};", "u32", [a], [t]), np.array([bin(x).count("1") for x in a], np.uint32))
    same(
        evaluate(sim, f"clz.{t} {{d}}, {{a}};", "u32", [a], [t]),
        np.array([bits - int(x).bit_length() for x in a], np.uint32),
    )
    same(
        evaluate(sim, f"brev.{t} {{d}}, {{a}};", t, [a], [t]),
        np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], NP[t]),
    )
    same(
        evaluate(sim, f"bfind.u{bits} {{d}}, {{a}};", "u32", [a], [t]),
        np.array([(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a], np.uint32),
    )


# ---- floating point ------------------------------------------------------------------------
FLOAT_OPS = ["add", "sub", "mul", "min", "max", "abs", "neg"]


# PTX has no division of f16.
@pytest.mark.parametrize(
    ("op", "t"), [(o, t) for t in ("f32", "f64", "f16") for o in FLOAT_OPS + ["div"] * (t != "f16")]
)
def test_float(sim, op, t):
    a, b = values(t), values(t)
    with np.errstate(all="ignore"):
        want = {
            "add": a + b,
            "sub": a - b,
            "mul": a * b,
            "abs": np.abs(a),
            "neg": -a,
            "div": a / b,
            "min": np.where((a == b) & (a == 0), np.where(np.signbit(a), a, b), np.fmin(a, b)),
            "max": np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), np.fmax(a, b)),
        }[op]
    rounding = ".rn" if op in ("add", "sub", "mul", "div") else ""
    operands = "{d}, {a}" if op in ("abs", "neg") else "{d}, {a}, {b}"
    same(evaluate(sim, f"{op}{rounding}.{t} {operands};", t, [a, b], [t, t]), want)


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
def test_fma(sim, t):
    """Against exact rational arithmetic."""
    a, b, c = (values("f32").astype(np.float64) if t == "bf16" else values(t).astype(np.float64) for _ in range(3))
    if t == "bf16":
        bits = [small.to_bf16(x) for x in (a, b, c)]
        a, b, c = (small.from_bf16(x) for x in bits)
    else:
        bits = [x.astype(NP[t]) for x in (a, b, c)]
    got = evaluate(sim, f"fma.rn.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, bits, [t] * 3)
    want = small.fma(a, b, c, t)
    if t == "bf16":
        nan = (got & 0x7FFF) > 0x7F80
        same(np.where(nan, 0x7FFF, got).astype(np.uint16), want)
    else:
        same(got, want)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "mul", "fma", "div", "sqrt", "rcp"])
def test_directed_rounding(sim, op, mode):
    a, b, c = (
        RNG.standard_normal(512).astype(np.float32) * np.float32(10) ** RNG.integers(-5, 5, 512) for _ in range(3)
    )
    if op == "sqrt":
        a = np.abs(a)
    operands = {
        "add": "{d}, {a}, {b}",
        "mul": "{d}, {a}, {b}",
        "div": "{d}, {a}, {b}",
        "fma": "{d}, {a}, {b}, {c}",
        "sqrt": "{d}, {a}",
        "rcp": "{d}, {a}",
    }[op]
    got = evaluate(
        sim,
        f"{op}.{mode}.f32 {operands};",
        "f32",
        [a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)],
        ["f32"] * 3,
    )
    same(got, small.directed(op, mode, a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)))


@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("ex2", np.exp2),
        ("lg2", np.log2),
        ("sin", np.sin),
        ("cos", np.cos),
        ("tanh", np.tanh),
        ("rsqrt", lambda x: 1 / np.sqrt(x)),
        ("rcp", lambda x: 1 / x),
        ("sqrt", np.sqrt),
    ],
)
def test_approx(sim, op, f):
    a = RNG.uniform(0.01, 6, 512).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(sim, f"{op}.approx.f32 {{d}}, {{a}};", "f32", [a], ["f32"]),
        f(a.astype(np.float64)),
        rtol=3e-7,
        atol=1e-7,
    )


def test_saturate_and_ftz(sim):
    a, b = values("f32"), values("f32")
    with np.errstate(all="ignore"):
        s = a + b
        same(
            evaluate(sim, "add.sat.f32 {d}, {a}, {b};", "f32", [a, b], ["f32"] * 2),
            np.where(np.isnan(s), np.float32(0), np.clip(s, 0, 1)) + np.float32(0),
        )

        def flush(x):
            return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(np.float32)

        same(evaluate(sim, "mul.ftz.f32 {d}, {a}, {b};", "f32", [a, b], ["f32"] * 2), flush(flush(a) * flush(b)))


# ---- conversions -------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("frm", ["f32", "f64", "f16"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_int(sim, mode, frm, to):
    a = values(frm)
    f = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    info, bits = np.iinfo(NP[to]), 8 * np.dtype(NP[to]).itemsize

    def one(x):
        if np.isnan(x):
            return (1 << bits - 1 if to[0] == "u" else info.min) if frm == "f64" or bits == 64 else 0
        if np.isinf(x):
            return info.max if x > 0 else info.min
        return min(max(int(f(np.float64(x))), info.min), info.max)

    out = {1: "s16" if to[0] == "s" else "u16"}.get(bits // 8, to)
    want = np.array([one(x) for x in a], dtype=object).astype(NP[out])
    same(evaluate(sim, f"cvt.{mode}.{to}.{frm} {{d}}, {{a}};", out, [a], [frm]), want)


@pytest.mark.parametrize("to", ["f32", "f64", "f16"])
@pytest.mark.parametrize("frm", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_int_to_float(sim, frm, to):
    a = values(frm)
    with np.errstate(all="ignore"):
        want = a.astype(NP[to])
    same(evaluate(sim, f"cvt.rn.{to}.{frm} {{d}}, {{a}};", to, [a], [frm]), want)


@pytest.mark.parametrize("to", INTS)
@pytest.mark.parametrize("frm", INTS)
@pytest.mark.parametrize("sat", ["", ".sat"])
def test_int_to_int(sim, frm, to, sat):
    a = values(frm)
    info = np.iinfo(NP[to])
    want = np.clip(a.astype(object), info.min, info.max).astype(NP[to]) if sat else wrap(to, a)
    same(evaluate(sim, f"cvt{sat}.{to}.{frm} {{d}}, {{a}};", to, [a], [frm]), want)


@pytest.mark.parametrize(
    ("to", "fmt"), [("e4m3x2", small.E4M3), ("e5m2x2", small.E5M2), ("f16x2", small.F16), ("bf16x2", small.BF16)]
)
@pytest.mark.parametrize("relu", ["", ".relu"])
def test_pack(sim, to, fmt, relu):
    a, b = values("f32"), values("f32")
    narrow = to[0] == "e"
    got = evaluate(
        sim,
        f"cvt.rn{'.satfinite' if narrow else ''}{relu}.{to}.f32 {{d}}, {{a}}, {{b}};",
        "b16" if narrow else "b32",
        [a, b],
        ["f32", "f32"],
    )

    def fix(x):
        return np.where(~np.isnan(x) & (x <= 0), 0.0, x) if relu else x

    hi, lo = small.encode(fix(a.astype(np.float64)), fmt, narrow), small.encode(fix(b.astype(np.float64)), fmt, narrow)
    same(got, (hi << (8 if narrow else 16) | lo).astype(got.dtype))
    if narrow:
        back = evaluate(sim, f"cvt.rn.f16x2.{to} {{d}}, {{a}};", "b32", [got], ["b16"])
        same((back & 0xFFFF).astype(np.uint16).view(np.float16), small.decode(lo, fmt).astype(np.float16))


def test_tf32(sim):
    a = values("f32")
    a = a[~np.isnan(a)]
    a = np.resize(a, 448)
    bits = a.view(np.uint32).astype(np.uint64)
    want = np.where(np.isinf(a), bits, (bits + 0x1000) & 0xFFFFE000).astype(np.uint32)
    same(evaluate(sim, "cvt.rna.tf32.f32 {d}, {a};", "b32", [a], ["f32"]), want)


ORDERED = ["eq", "ne", "lt", "le", "gt", "ge"]
UNORDERED = ["equ", "neu", "ltu", "geu", "num", "nan"]


@pytest.mark.parametrize(
    ("cmp", "t"), [(c, t) for t in ("f32", "f16", "s32", "u64") for c in ORDERED + UNORDERED * (t[0] == "f")]
)
def test_setp(sim, cmp, t):
    a, b = values(t), values(t)
    b[::3] = a[::3]
    with np.errstate(all="ignore"):
        ordered = ~(np.isnan(a) | np.isnan(b)) if t[0] == "f" else np.ones(len(a), bool)
        want = {
            "eq": a == b,
            "ne": ordered & (a != b),
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
            "equ": ~ordered | (a == b),
            "neu": ~ordered | (a != b),
            "ltu": ~ordered | (a < b),
            "geu": ~ordered | (a >= b),
            "num": ordered,
            "nan": ~ordered,
        }[cmp]
    got = evaluate(
        sim,
        f"setp.{cmp}.{t} %q1|%q2, {{a}}, {{b}}; selp.u32 {{d}}, 3, 0, %q1; @%q2 add.u32 {{d}}, {{d}}, 8;",
        "u32",
        [a, b],
        [t, t],
    )
    same(got, np.where(want, 3, 8).astype(np.uint32))
