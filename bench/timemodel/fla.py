"""Modelled time of flash-linear-attention's gated delta rule, forward and backward: K = V = 128, chunk 64, bf16, g
and beta fp32.

Needs the cubins of fla_cubins.py. Loop trip counts, grids and bytes are written down here, since these kernels come
from Triton
and read their chunk indices from memory.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence

from . import kernel, sass, sm_sim
from .machine import Machine

CUBINS = pathlib.Path(os.environ.get("REMORA_FLA_CUBINS", pathlib.Path.home() / ".cache/remora/fla_cubins"))
FORWARD = ("cumsum", "kkt", "wu", "h", "o")
BACKWARD = ("wu", "h", "dvl", "dhu", "dqkwg", "wyb", "cumsum")
CHAINS = ("h", "dhu")


def available() -> bool:
    return all(tags(name) for name in (*FORWARD, *BACKWARD))


@functools.cache
def load(tag: str) -> tuple[dict, list[sass.Inst]]:
    return json.loads((CUBINS / f"{tag}.json").read_text()), sass.disassemble(CUBINS / f"{tag}.cubin")


def tags(name: str) -> list[str]:
    return sorted(p.stem for p in CUBINS.glob(f"{name}.*.json"))


def trips(tag: str, chunks: int | None) -> list[int]:
    meta, code = load(tag)
    cfg = meta["cfg"]
    want = {
        "h": [chunks],
        "dhu": [chunks],
        "kkt": [128 // cfg.get("BK", 64), 14, 14, 14, 14],
        "wu": [2, 2],
        "o": [128 // cfg.get("BK", 64)],
        "wyb": [2, 2, 2],
    }.get(meta["kernel"], [])
    found = sass.loops(code)
    if not found:
        return []
    if len(found) != len(want):
        raise ValueError(f"{tag}: {len(found)} loops, expected {len(want)}")
    return want


@functools.cache
def trace(tag: str, chunks: int | None = None) -> list[int]:
    """Instruction indices of one warp: every warp takes every loop `trips` times and no conditional forward branch."""
    _, code = load(tag)
    count = trips(tag, chunks)
    tails = {t: k for k, (_, t) in enumerate(sass.loops(code))}
    left: dict[int, int] = {}
    pc, out = 0, []
    while pc < len(code):
        i = code[pc]
        out.append(pc)
        if i.base == "EXIT" and not i.pred:
            break
        if i.base == "BRA":
            if pc in tails:
                k = tails[pc]
                left[k] = left.get(k, count[k]) - 1
                if left[k] > 0:
                    pc = i.target
                    continue
                del left[k]
            elif not i.pred:
                pc = i.target
                continue
        pc += 1
    return out


def grid(meta: dict, HV: int, chunks: int, sequences: int) -> int:
    bv = meta["cfg"].get("BV", 128)
    if meta["kernel"] in CHAINS:
        return 128 // bv * sequences * HV
    return (128 // bv if meta["kernel"] == "o" else 1) * chunks * HV


def footprint(name: str, H: int, HV: int, T: int, sequences: int) -> tuple[float, float]:
    """(bytes read, bytes written) once per launch, as seen by an ideal cache."""
    n, nk = T * HV, T * H
    state = sequences * HV * 128 * 128 * 4
    return {
        "cumsum": (4 * n, 4 * n),
        "zeros": (0, 128 * n),
        "kkt": (256 * nk + 8 * n, 80 * n),
        "wu": (256 * nk + 392 * n, 512 * n),
        "h": (256 * nk + 516 * n + state, 768 * n + state),
        "o": (512 * nk + 772 * n, 256 * n),
        "dvl": (512 * nk + 260 * n, 256 * n),
        "dhu": (512 * nk + 772 * n + state, 768 * n + state),
        "dqkwg": (512 * nk + 1796 * n, 772 * n),
        "wyb": (256 * nk + 904 * n, 520 * n),
        "add": (512 * n, 256 * n),
        "sum": (768 * n, 768 * nk),
    }[name]


def unique(meta: dict, chunks: int | None = None) -> tuple[float, float]:
    """(bytes read, bytes written) of one CTA, each byte once: what passes L1."""
    bv, n = meta["cfg"].get("BV", 128), chunks or 1
    g = 64 * 32  # a strided fp32 column of 64: one sector each
    return {
        "cumsum": (g, g),
        "kkt": (16384 + 2 * g, 5120),
        "wu": (40960 + 2 * g, 32768),
        "h": (n * (32768 + 128 * bv + g), n * (128 * bv + 256 * bv)),
        "o": (32768 + 256 * bv + 128 * bv + g, 128 * bv),
        "dvl": (49152 + g, 16384),
        "dhu": (n * (49152 + 256 * bv + g), n * (128 * bv + 256 * bv)),
        "dqkwg": (147456 + g, 49152 + g),
        "wyb": (73728 + 2 * g, 32768 + 2 * g),
    }[meta["kernel"]]


@functools.cache
def static(tag: str, m: Machine) -> list[sm_sim.Static]:
    return sm_sim.classify(load(tag)[1], m)


@functools.cache
def named(tag: str, m: Machine, chunks: int | None = None) -> tuple[float, float]:
    """Bytes that the loads and stores of a CTA name."""
    table, warps = static(tag, m), load(tag)[0]["warps"]
    work = [table[n] for n in trace(tag, chunks)]
    return (
        sum(s.bytes for s in work if s.kind in ("ldg", "ldgsts")) * warps,
        sum(s.bytes for s in work if s.kind == "stg") * warps,
    )


STEP = 0.05  # rates are rounded to 5 % so that simulations are shared


@functools.cache
def simulate(tag: str, m: Machine, chunks: int | None, resident: int, total: int, rate: int, latency: int) -> float:
    meta, _ = load(tag)
    (read, written), (ur, uw) = named(tag, m, chunks), unique(meta, chunks)
    scale = (min(1, ur / read), min(1, uw / max(1, written)))  # masked-off prefetches and repeats that hit L1
    code = trace(tag, chunks)
    bars = [(0, 0)] * sum(static(tag, m)[n].kind == "bar" for n in code)
    ends, _ = sm_sim.Sim(m, math.exp(rate * STEP), latency * 25, scale).run(
        static(tag, m), [(code, bars)] * meta["warps"], resident, total
    )
    return max(ends)


def run(tag: str, m: Machine, chunks: int | None, resident: int, total: int, rate: float, latency: float) -> float:
    return simulate(tag, m, chunks, resident, total, round(math.log(rate) / STEP), round(latency / 25))


def memory(
    m: Machine, tag: str, H: int, HV: int, T: int, sequences: int, ctas: int, chunks: int | None, active: int
) -> tuple[float, float]:
    meta, _ = load(tag)
    r, w = footprint(meta["kernel"], H, HV, T, sequences)
    ur, uw = unique(meta, chunks)
    return kernel.share(m, (max(r, ur * ctas), max(w, uw * ctas)), (r, w), active)[:2]


def bulk(m: Machine, tag: str, H: int, HV: int, lens: Sequence[int]) -> float:
    """Seconds of a kernel of many equal CTAs."""
    meta, _ = load(tag)
    chunks = sum(math.ceil(n / 64) for n in lens)
    ctas = grid(meta, HV, chunks, len(lens))
    occ = kernel.occupancy(m, meta["regs"], meta["smem"], meta["warps"])
    per_sm = ctas / m.sms
    rate, latency = memory(m, tag, H, HV, sum(lens), len(lens), ctas, None, min(ctas, m.sms))
    if per_sm <= 2 * occ:
        n = math.ceil(per_sm)
        cycles = run(tag, m, None, min(occ, n), n, rate, latency)
    else:
        a, b = (run(tag, m, None, occ, k * occ, rate, latency) for k in (2, 4))
        cycles = a + (per_sm - 2 * occ) * (b - a) / (2 * occ)
    return m.launch + cycles / m.clock


def chain(m: Machine, tag: str, H: int, HV: int, lens: Sequence[int]) -> float:
    """Seconds of a state kernel: one CTA per (sequence, head, value tile), serial over chunks."""
    meta, _ = load(tag)
    occ = kernel.occupancy(m, meta["regs"], meta["smem"], meta["warps"])
    work = [math.ceil(n / 64) for n in lens for _ in range(HV * 128 // meta["cfg"]["BV"])]
    average = max(1, round(sum(work) / len(work)))
    rate, latency = memory(m, tag, H, HV, sum(lens), len(lens), len(work), average, min(len(work), m.sms))

    @functools.cache
    def per_chunk(r: int) -> tuple[float, float]:
        a, b = run(tag, m, 6, r, r, rate, latency), run(tag, m, 14, r, r, rate, latency)
        return (b - a) / 8, a - 6 * (b - a) / 8

    # list scheduling: CTAs in order to the emptiest multiprocessor, at most occ on each; progress depends on the
    # residents
    sms: list[list[float]] = [[] for _ in range(m.sms)]
    now, pos = 0.0, 0
    each, fixed = per_chunk(1)
    while True:
        while pos < len(work):
            k = min(range(m.sms), key=lambda i: len(sms[i]))
            if len(sms[k]) >= occ:
                break
            sms[k].append(work[pos] + fixed / each)
            pos += 1
        busy = [s for s in sms if s]
        if not busy:
            return m.launch + now / m.clock
        dt = max(min(min(s) * per_chunk(len(s))[0] for s in busy), 1e-9)
        for s in busy:
            step = dt / per_chunk(len(s))[0]
            s[:] = [x - step for x in s if x - step > 1e-6]
        now += dt


def streaming(m: Machine, name: str, H: int, HV: int, T: int) -> float:
    """Seconds of a torch operator that only moves bytes."""
    r, w = footprint(name, H, HV, T, 1)
    miss = min(1.0, max(0.0, (r + w - m.l2_bytes) / m.l2_bytes))
    return m.launch + max((r + w) * miss / m.dram, (r + w) / m.l2_bw)


def seconds(m: Machine, tag: str, H: int, HV: int, lens: Sequence[int]) -> float:
    return (chain if load(tag)[0]["kernel"] in CHAINS else bulk)(m, tag, H, HV, lens)


@functools.cache
def best(m: Machine, name: str, H: int, HV: int) -> str:
    """The autotuner: the fastest configuration at 1 x 32768, as in the published benchmark."""
    fitting = [t for t in tags(name) if load(t)[0]["smem"] + m.smem_reserved <= m.smem_sm]
    return min(fitting, key=lambda t: seconds(m, t, H, HV, [32768]))


def parts(m: Machine, direction: str, H: int, HV: int, lens: Sequence[int]) -> dict[str, float]:
    """Seconds of every kernel of one direction, without the gaps between them."""
    T = sum(lens)
    if direction == "forward":
        out = {"zeros": streaming(m, "zeros", H, HV, T)}
        out |= {name: seconds(m, best(m, name, H, HV), H, HV, lens) for name in FORWARD}
        return out
    out = {name: seconds(m, best(m, name, H, HV), H, HV, lens) for name in BACKWARD}
    out["add"] = streaming(m, "add", H, HV, T)
    if HV > H:
        out["sum"] = streaming(m, "sum", H, HV, T)
    return out


def total(m: Machine, direction: str, H: int, HV: int, lens: Sequence[int]) -> float:
    p = parts(m, direction, H, HV, lens)
    return sum(p.values()) + m.graph_gap * len(p)
