"""The sums of mma=hardware (published in arXiv 2511.10909) against exact fractions, and of mma=fma beside them."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from simtest import kernel

M, N = 16, 8
TYPES = {"f16": (torch.float16, 16, -14), "bf16": (torch.bfloat16, 16, -126), "tf32": (torch.float32, 8, -126)}


def multiply(sim, t, a, b, c, **options):
    """One mma.sync: c + a @ b.T, a [16, k], b [8, k]."""
    k = a.shape[1]
    per = 1 if t == "tf32" else 2
    size = 4 // per
    body = [
        " mov.u32 %l, %tid.x; shr.u32 %g, %l, 2; and.b32 %t, %l, 3;",
        " ld.param.u64 %pa, [p0]; ld.param.u64 %pb, [p1]; ld.param.u64 %pc, [p2];",
    ]

    def load(register, row, column, ld, pointer, kind, bytes_):
        body.append(f" add.s32 %x, %g, {row}; mad.lo.s32 %o, %x, {ld}, {column}; mul.wide.u32 %q, %o, {bytes_};")
        body.append(f" add.s64 %q, %q, {pointer}; {kind.format(register)}")

    for i in range(4):
        body.append(f" mad.lo.s32 %y, %t, {per}, {4 * per * (i // 2)};")
        load(f"%a{i}", 8 * (i % 2), "%y", k, "%pa", "ld.global.b32 {}, [%q];", size)
    for i in range(2):
        body.append(f" mad.lo.s32 %y, %t, {per}, {4 * per * i};")
        load(f"%b{i}", 0, "%y", k, "%pb", "ld.global.b32 {}, [%q];", size)
    for i in range(4):
        body.append(f" mad.lo.s32 %y, %t, 2, {i % 2};")
        load(f"%c{i}", 8 * (i // 2), "%y", N, "%pc", "ld.global.b32 {}, [%q];", 4)
    body.append(
        f" mma.sync.aligned.m16n8k{k}.row.col.f32.{t}.{t}.f32 {{%c0,%c1,%c2,%c3}}, {{%a0,%a1,%a2,%a3}}, {{%b0,%b1}},"
        " {%c0,%c1,%c2,%c3};"
    )
    for i in range(4):
        body.append(f" mad.lo.s32 %y, %t, 2, {i % 2};")
        load(f"%c{i}", 8 * (i // 2), "%y", N, "%pc", "st.global.b32 [%q], {};", 4)
    registers = ".reg .b32 %l, %g, %t, %x, %y, %o, %a<4>, %b<4>, %c<4>; .reg .b64 %q, %pa, %pb, %pc;"
    module = sim.load_ptx(kernel("\n".join(body), ["u64"] * 3, registers))
    out = c.clone()
    module.launch("k", 1, 32, [a, b, out], **options)
    return out


def exponent(x, smallest):
    return max(int(np.frexp(x)[1]) - 1, smallest)


def truncated(x, bits_below):
    """Toward zero, to a multiple of 2**-bits_below."""
    unit = Fraction(2) ** -bits_below
    return int(x / unit) * unit  # int() truncates


def toward_zero(x):
    f = np.float32(float(x))
    return f if abs(Fraction(float(f))) <= abs(x) else np.nextafter(f, np.float32(0))


def oracle(t, a, b, c, arch):
    smallest = TYPES[t][2]
    k = a.shape[1]
    step, fraction = (k, 25) if arch >= 90 else (min(k, 4 if t == "tf32" else 8), 24)
    out = np.empty((M, N), np.float32)
    for i in range(M):
        for j in range(N):
            value = c[i, j].item()
            for first in range(0, k, step):
                terms, exponents = [Fraction(value)], []
                if value:
                    exponents.append(exponent(value, -126))
                for q in range(first, first + step):
                    x, y = a[i, q].item(), b[j, q].item()
                    terms.append(Fraction(x) * Fraction(y))
                    if x and y:
                        exponents.append(exponent(x, smallest) + exponent(y, smallest))
                if exponents:
                    value = float(toward_zero(sum(truncated(x, fraction - max(exponents)) for x in terms)))
            out[i, j] = value
    return torch.from_numpy(out)


def inputs(t, spread):
    dtype, k, _ = TYPES[t]
    generator = torch.Generator().manual_seed(len(t) + spread)
    a, b, c = (torch.randn(s, generator=generator) for s in ((M, k), (N, k), (M, N)))
    if spread:
        a = a * 2.0 ** torch.randint(-spread, spread, a.shape, generator=generator)
        a[torch.rand(a.shape, generator=generator) < 0.2] = 0
        c = c * 2.0 ** torch.randint(-spread, spread, c.shape, generator=generator)
    a, b = a.to(dtype), b.to(dtype)
    if t == "tf32":
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    return a, b, c


@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("t", TYPES)
def test_bits_of_hardware_sums(sim, t, arch, spread):
    a, b, c = inputs(t, spread)
    got = multiply(sim, t, a, b, c, mma="hardware", arch=arch)
    want = oracle(t, a, b, c, arch)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("t", TYPES)
def test_modes_differ_but_agree_to_rounding(sim, t):
    a, b, c = inputs(t, 0)
    exact = c.double() + a.double() @ b.double().T
    fma, hardware = (multiply(sim, t, a, b, c, mma=mode).double() for mode in ("fma", "hardware"))
    assert not torch.equal(fma, hardware)
    bound = 2.0**-20 * (c.double().abs() + a.double().abs() @ b.double().abs().T)
    assert ((fma - exact).abs() <= bound).all()
    assert ((hardware - exact).abs() <= bound).all()


def test_special_values(sim):
    a, b, c = inputs("bf16", 0)
    a[0, 0], a[1, 0], b[0, 0] = float("inf"), float("nan"), 1.0
    c[2, 2] = -float("inf")
    got = multiply(sim, "bf16", a, b, c, mma="hardware")
    assert got[0, 0] == float("inf")
    assert got[2, 2] == -float("inf")
    assert (got.view(torch.int32)[1] == 0x7FFFFFFF).all()
    assert torch.isfinite(got[3:]).all()


def test_unknown_rule_is_an_error(sim):
    with pytest.raises(sim.Error, match="sums of arch 75 are not known"):
        multiply(sim, "f16", *inputs("f16", 0), mma="hardware", arch=75)


def test_approximate_functions(sim):
    x = torch.linspace(-4, 4, 128)
    module = sim.load_ptx(
        kernel(
            " ld.param.u64 %p, [p0]; mov.u32 %r, %tid.x; mul.wide.u32 %q, %r, 4; add.s64 %p, %p, %q;"
            " ld.global.f32 %f, [%p]; ex2.approx.ftz.f32 %f, %f; st.global.f32 [%p], %f;",
            ["u64"],
            ".reg .b64 %p, %q; .reg .b32 %r; .reg .f32 %f;",
        )
    )
    results = {}
    for ulp in (0, 2):
        out = x.clone()
        module.launch("k", 1, 128, [out], approx_ulp=ulp)
        results[ulp] = out
    moved = (results[2].view(torch.int32) - results[0].view(torch.int32)).abs()
    assert moved.max() == 2
    assert (moved == 0).any()
    again = x.clone()
    module.launch("k", 1, 128, [again], approx_ulp=2)
    assert torch.equal(again, results[2])
