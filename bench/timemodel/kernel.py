"""Modelled time of one kernel launch from its cubin, launch shape and parameters."""

import functools
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import control, sass, sm_sim
from .machine import Machine

TYPES = {"i8": "b", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "f32": "f", "f64": "d"}
FAKE_POINTER = 0x7F0000000000


def pack(text: str) -> bytes:
    """Kernel parameters from text: comma-separated p (some pointer), 0 (null pointer) or type:value, naturally aligned.

    A repeated value is written value*count, for example i64:128*3.
    """
    out = b""
    for n, item in enumerate(x.strip() for x in text.split(",") if x.strip()):
        word, _, count = item.partition("*")
        kind, _, value = word.partition(":")
        for k in range(int(count or 1)):
            if kind in ("p", "0"):
                data = struct.pack("<Q", FAKE_POINTER + (((n + 1) << 32) + (k << 28) if kind == "p" else -FAKE_POINTER))
            elif kind in TYPES:
                data = struct.pack("<" + TYPES[kind], float(value) if kind[0] == "f" else int(value, 0))
            else:
                raise ValueError(f"parameter {item!r}: p, 0 or one of {', '.join(TYPES)} followed by :value")
            out += bytes(-len(out) % len(data)) + data
    return out


@dataclass(frozen=True, eq=False)
class Kernel:
    cubin: str
    function: str
    code: list[sass.Inst]
    program: control.Program
    regs: int
    stack: int
    static_smem: int


@functools.cache
def load(cubin: str, function: str | None = None) -> Kernel:
    names = [n for n in sass.functions(cubin) if (function or "") in n]
    if len(names) != 1:
        raise ValueError(f"{cubin}: {function or 'no name given'} matches {names or 'nothing'}, name one kernel")
    r = sass.resources(cubin, names[0])
    code = sass.disassemble(cubin, names[0])
    return Kernel(cubin, names[0], code, control.Program(code), r["regs"], r["stack"], r["smem"])


@dataclass(frozen=True)
class Launch:
    """What the model needs of a launch. Bytes are of the whole launch; None takes what the instructions name.

    requested: bytes of the 32-byte sectors that cross L1 (load, store); footprint: the distinct ones.
    conflict: shared-memory wavefronts over the least possible ones.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    smem: int = 0
    requested: tuple[float, float] | None = None
    footprint: tuple[float, float] | None = None
    conflict: float = 1.0
    decisions: Mapping[int, bool] = field(default_factory=dict)


@dataclass
class Modelled:
    seconds: float
    cycles: float  # of the simulated CTAs
    per_iteration: float  # cycles of one iteration of the main loop, where most of its iterations were not simulated
    ctas: int  # simulated on one multiprocessor
    resident: int
    stats: dict
    traces: list[control.Trace]
    memory: dict[str, float]
    counts: Counter  # dynamic instructions of one CTA by opcode


def occupancy(m: Machine, regs: int, smem: int, warps: int) -> int:
    registers = math.ceil(regs * 32 / 256) * 256 * warps
    if smem + m.smem_reserved > m.smem_sm or registers > m.regs_sm:
        raise ValueError(f"{smem} bytes of shared memory and {registers} registers do not fit a multiprocessor")
    return max(1, min(m.regs_sm // registers, m.smem_sm // (smem + m.smem_reserved), m.warps_sm // warps, m.ctas_sm))


def longest_cta(kernel: Kernel, launch: Launch) -> list[control.Trace]:
    """Traces of the CTA with most work of the first and the middle one."""
    gx, gy, gz = launch.grid
    shape = control.LaunchShape(launch.grid, launch.block, launch.params, 90, launch.smem)
    total = gx * gy * gz
    ctas = []
    for n in {0, total // 2}:
        at = (n % gx, n // gx % gy, n // (gx * gy))
        ctas.append(control.run_cta(kernel.program, shape, at, launch.decisions))
    return max(ctas, key=lambda traces: sum(len(t.code) for t in traces))


def share(
    m: Machine, requested: tuple[float, float], footprint: tuple[float, float], active: int
) -> tuple[float, float, float]:
    """Bytes per cycle that one multiprocessor gets from beyond L1, latency there, and the share of DRAM in the
    loads.
    """
    (r2, w2), (r, w) = requested, footprint
    miss = min(1.0, max(0.0, (r + w - m.l2_bytes) / m.l2_bytes))
    dram_read, dram_write = r * miss, w * miss
    per_l2 = active * m.clock / m.l2_bw
    per_dram = (dram_read + dram_write) / max(1.0, r2 + w2) * active * m.clock / m.dram
    missing = dram_read / r2 if r2 else 0.0
    return 1 / max(1 / m.l2_per_sm, per_l2, per_dram), m.lat_l2 * (1 - missing) + m.lat_dram * missing, missing


def main_loop(code: list[sass.Inst], trace: list[int]) -> tuple[list[int], int, int]:
    """Where the iterations of the loop with most of a trace end (positions after its backward branch), and head and
    tail.
    """
    executed = Counter(trace)
    best, found = 0, (0, -1)
    for head, tail in sass.loops(code):
        inside = sum(executed[n] for n in range(head, tail + 1))
        if executed[tail] > 1 and inside > best:
            best, found = inside, (head, tail)
    head, tail = found
    return [k + 1 for k, n in enumerate(trace[:-1]) if n == tail and trace[k + 1] == head], head, tail


def shorten(kernel: Kernel, traces: list[control.Trace], keep: int) -> tuple[list[control.Trace], int]:
    """Traces without the middle iterations of their main loop, about `keep` of them left, and how many are gone.

    All warps lose the same share, so that what they pass through barriers still matches; warps of one CTA whose loops
    cannot be cut alike are left as they are.
    """
    ends = {id(t): main_loop(kernel.code, t.code)[0] for t in traces}
    counts = {n for e in ends.values() if (n := len(e)) >= keep}
    if not counts:
        return traces, 0
    most = max(counts)
    ratio = {k: max(1, round(most / max(1, len(e)))) for k, e in ends.items()}
    step = math.lcm(12, *(r for k, r in ratio.items() if len(ends[k]) >= 4))  # rings of 2, 3 and 4 stages stay in phase
    gone = (most - keep) // step * step
    if gone <= 0 or any(len(e) >= 4 and len(e) - gone // ratio[k] < 4 for k, e in ends.items()):
        return traces, 0
    out: dict[int, control.Trace] = {}
    for t in traces:
        e = ends[id(t)]
        if id(t) in out:
            continue
        if len(e) < 4:
            out[id(t)] = t
            continue
        first = len(e) // 2 - gone // ratio[id(t)] // 2
        a, b = e[first], e[first + gone // ratio[id(t)]]
        bars = [kernel.code[n].base == "BAR" for n in t.code]
        low, high = sum(bars[:a]), sum(bars[:b])
        out[id(t)] = control.Trace(t.code[:a] + t.code[b:], t.barriers[:low] + t.barriers[high:], t.assumed)
    return [out[id(t)] for t in traces], gone


ITERATIONS = (16, 32)  # of the main loop that are simulated when it has many more


def model(m: Machine, kernel: Kernel, launch: Launch) -> Modelled:
    traces = longest_cta(kernel, launch)
    static = sm_sim.classify(kernel.code, m, launch.conflict)
    ctas = math.prod(launch.grid)
    loads = stores = 0.0
    counts: Counter = Counter()
    for t in traces:
        for n, k in Counter(t.code).items():
            s = static[n]
            counts[kernel.code[n].base] += k
            if s.kind in ("ldg", "ldgsts"):
                loads += s.bytes * k
            elif s.kind == "stg":
                stores += s.bytes * k
    named = (loads * ctas, stores * ctas)
    requested = launch.requested or named
    footprint = launch.footprint or requested
    scale = tuple(min(1.0, a / b) if b else 1.0 for a, b in zip(requested, named, strict=True))
    occ = occupancy(m, kernel.regs, launch.smem + kernel.static_smem, len(traces))
    rate, latency, missing = share(m, requested, footprint, min(ctas, m.sms))

    def run(work: list[control.Trace], resident: int, total: int) -> tuple[float, dict]:
        ends, stats = sm_sim.Sim(m, rate, latency, scale).run(
            static, [(t.code, t.barriers) for t in work], resident, total
        )
        return max(ends), stats

    per_sm = ctas / m.sms
    total = math.ceil(per_sm) if per_sm <= 2 * occ else 2 * occ
    resident = min(occ, total)
    work, gone = shorten(kernel, traces, ITERATIONS[1])
    cycles, stats = run(work, resident, total)
    if gone:
        fewer, more_gone = shorten(kernel, traces, ITERATIONS[0])
        first, _ = run(fewer, resident, total)
        per_iteration = (cycles - first) / (more_gone - gone)
        longer = cycles + gone * per_iteration
    else:
        longer, per_iteration = cycles, 0.0
    seconds = longer / m.clock
    if per_sm > 2 * occ:
        one, _ = run(work, occ, occ)
        seconds *= 1 + (per_sm - total) * (cycles - one) / occ / cycles
    memory = {
        "rate": rate,
        "latency": latency,
        "dram_share": missing,
        "requested": sum(requested),
        "footprint": sum(footprint),
    }
    return Modelled(m.launch + seconds, cycles, per_iteration, total, resident, stats, work, memory, counts)


def report(m: Machine, kernel: Kernel, launch: Launch, r: Modelled, per: float = 1.0) -> str:
    """Text: modelled time and what the cycles of the simulated multiprocessor went to, per `per` (for example
    chunks).
    """
    warps = len(r.traces)
    lines = [
        f"{kernel.function}",
        f"  modelled {r.seconds * 1e6:.1f} us on {m.name} (measured time is expected at +0..+40 %); grid {math.prod(launch.grid)} x {warps} warps, "  # noqa: E501
        f"{kernel.regs} registers, {kernel.stack} bytes of stack, {launch.smem + kernel.static_smem} bytes of shared memory",  # noqa: E501
        f"  simulated {r.ctas} CTAs, {r.resident} at a time: {r.cycles:.0f} cycles"
        + (f" = {r.cycles / per:.0f} per unit" if per != 1 else "")
        + (
            f"; about {ITERATIONS[1]} iterations of the main loop, {r.per_iteration:.0f} cycles each, stand for all"
            if r.per_iteration
            else ""
        ),
        f"  memory: {r.memory['rate']:.0f} B/cycle for one multiprocessor, latency {r.memory['latency']:.0f}, "
        f"{r.memory['requested'] / 1e6:.1f} MB beyond L1, {r.memory['footprint'] / 1e6:.1f} MB distinct",
    ]
    s = r.stats
    busy = {"issue": s["issued"] / 4, "tensor": s["tensor_busy"], "shared": s["lsu_busy"], "memory": s["mem_busy"]}
    lines.append("  busy: " + ", ".join(f"{k} {v / per:.0f} ({100 * v / r.cycles:.0f} %)" for k, v in busy.items()))
    lines.append("  one warp's cycles" + (" per unit" if per != 1 else "") + ", by role:")
    roles: dict[int, list[int]] = {}
    for k, t in enumerate(r.traces):
        roles.setdefault(id(t), []).append(k)
    rounds = r.ctas / r.resident
    for members in roles.values():
        t = r.traces[members[0]]
        end = sum(s["ended"][k] for k in members) / len(members) / rounds
        waits: Counter = Counter()
        for k in members:
            waits.update(s["why_of"][k])
        each = {k: v / len(members) / r.ctas for k, v in waits.items()}
        fixed = end - sum(each.values())
        top = ", ".join(f"{k} {v / per:.0f}" for k, v in sorted(each.items(), key=lambda x: -x[1]) if v >= 0.01 * end)
        tensor = sum(kernel.code[n].base in ("HMMA", "HGMMA") for n in t.code)
        lines.append(
            f"    warps {members[0]}-{members[-1]}: {len(t.code) / per:.0f} instructions ({tensor / per:.0f} tensor); "
            f"ends at {end / per:.0f}; own issue and stall counts {fixed / per:.0f}, {top}"
        )
    mix = ", ".join(f"{k} {v / per:.0f}" for k, v in r.counts.most_common(16))
    lines.append(f"  instructions of a CTA: {mix}")
    assumed = sorted({hex(a) for t in r.traces for a in t.assumed})
    if assumed:
        lines.append(
            f"  branches whose condition is not known (taken to fall through unless decided): {', '.join(assumed)}"
        )
    return "\n".join(lines)
