"""Oracles for small float formats and exactly rounded operations, in plain Python."""

import math
from collections import namedtuple
from fractions import Fraction

import numpy as np

Format = namedtuple("Format", "exponent mantissa bias inf max_finite nan")
F16 = Format(5, 10, 15, True, 0x7BFF, 0x7FFF)
BF16 = Format(8, 7, 127, True, 0x7F7F, 0x7FFF)
F32 = Format(8, 23, 127, True, 0x7F7FFFFF, 0x7FFFFFFF)
F64 = Format(11, 52, 1023, True, 0x7FEFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
E4M3 = Format(4, 3, 7, False, 0x7E, 0x7F)
E5M2 = Format(5, 2, 15, True, 0x7B, 0x7F)


def round_fraction(x, f, mode="rn", saturate=False, negative_zero=False):
    """Bits of the rational x rounded to format f."""
    sign = 1 << (f.exponent + f.mantissa) if x < 0 or (x == 0 and negative_zero) else 0
    a = abs(x)
    if a == 0:
        return sign
    e = max(a.numerator.bit_length() - a.denominator.bit_length(), 1 - f.bias)
    while Fraction(2) ** e > a and e > 1 - f.bias:
        e -= 1
    while Fraction(2) ** (e + 1) <= a:
        e += 1
    q = a / Fraction(2) ** (e - f.mantissa)
    n = q.numerator // q.denominator
    rest = q - n
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n & 1),
        "rz": False,
        "rm": bool(sign) and rest > 0,
        "rp": not sign and rest > 0,
    }[mode]
    n += up
    if n == 2 << f.mantissa:
        n, e = n // 2, e + 1
    bits = ((e + f.bias) << f.mantissa) + (n - (1 << f.mantissa)) if n >= 1 << f.mantissa else n
    if bits > f.max_finite:
        to_max = saturate or mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and sign)
        bits = f.max_finite if to_max else (((1 << f.exponent) - 1) << f.mantissa if f.inf else f.nan)
    return sign | bits


def encode_one(x, f, saturate):
    if math.isnan(x):
        return f.nan
    if math.isinf(x):
        sign = 1 << (f.exponent + f.mantissa) if x < 0 else 0
        return sign | (f.max_finite if saturate else ((1 << f.exponent) - 1) << f.mantissa)
    return round_fraction(Fraction(x), f, "rn", saturate, math.copysign(1, x) < 0)


def encode(x, f, saturate=False):
    return np.array([encode_one(float(v), f, saturate) for v in x], dtype=np.uint32)


def decode(bits, f):
    out = []
    for b in bits:
        b = int(b)
        m, e, s = b & ((1 << f.mantissa) - 1), b >> f.mantissa & ((1 << f.exponent) - 1), b >> (f.exponent + f.mantissa)
        if f.inf and e == (1 << f.exponent) - 1:
            v = math.nan if m else math.inf
        elif not f.inf and b & ((1 << f.exponent + f.mantissa) - 1) == f.nan:
            v = math.nan
        else:
            v = math.ldexp(m + (1 << f.mantissa if e else 0), max(e, 1) - f.bias - f.mantissa)
        out.append(-v if s else v)
    return np.array(out)


def to_bf16(x):
    return encode(x, BF16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def fma(a, b, c, t):
    f = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}[t]
    out = []
    for x, y, z in zip(map(float, a), map(float, b), map(float, c)):
        if not all(map(math.isfinite, (x, y, z))):
            with np.errstate(all="ignore"):
                p = (
                    np.float64(x) * np.float64(y)
                    if not (math.isfinite(x) and math.isfinite(y))
                    else np.float64(math.copysign(1, x) * math.copysign(1, y))
                )
                v = float(p + np.float64(z))
            out.append(encode_one(v, f, False))
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        product_negative = (math.copysign(1, x) < 0) != (math.copysign(1, y) < 0)
        zero = Fraction(x) * Fraction(y) == 0 and z == 0 and product_negative and math.copysign(1, z) < 0
        out.append(round_fraction(exact, f, negative_zero=zero))
    dt = {
        "f16": (np.uint16, np.float16),
        "bf16": (np.uint16, np.uint16),
        "f32": (np.uint32, np.float32),
        "f64": (np.uint64, np.float64),
    }[t]
    return np.array(out, dtype=object).astype(dt[0]).view(dt[1])


def sqrt_fraction(x):
    """A rational between sqrt(x) and its neighbours, precise beyond double, with correct stickiness."""
    scale = 1 << 200
    n = math.isqrt(x.numerator * scale * scale // x.denominator)
    exact = Fraction(n, scale)
    return exact if exact * exact == x else exact + Fraction(1, 2 * scale)


def directed(op, mode, a, b, c):
    out = []
    for x, y, z in zip(*((Fraction(float(v)) for v in w) for w in (a, b, c))):
        exact = {
            "add": lambda x, y, z: x + y,
            "mul": lambda x, y, z: x * y,
            "fma": lambda x, y, z: x * y + z,
            "div": lambda x, y, z: x / y,
            "sqrt": lambda x, y, z: sqrt_fraction(x),
            "rcp": lambda x, y, z: 1 / x,
        }[op](x, y, z)
        out.append(round_fraction(exact, F32, mode))
    return np.array(out, dtype=np.uint32).view(np.float32)
