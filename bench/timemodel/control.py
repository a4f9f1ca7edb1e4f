"""Which instructions a warp executes: its control flow, from the kernel's SASS, launch shape and parameters.

Interprets only what decides control: the backward slice of branch conditions and barrier operands (integer and
predicate instructions, launch constants, special registers, words that the CTA keeps in shared memory), for all 32
lanes. Values that come from global memory or from floating-point arithmetic are unknown; a forward branch on an unknown
value is taken to fall through unless the caller decides, and is listed; a backward one is an error.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .sass import Inst

M32, M64, SIGN = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x80000000
PARAM_BASE = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
LANES = np.arange(32, dtype=np.uint64)
# First bit of the uniform registers, predicates, uniform predicates and words of the stack in a register set; the bit
# that stands for shared memory as a whole
UR, P, UP, STACK = 256, 320, 328, 512
SHARED = STACK + 4096

# A value is an int (all lanes alike), an array of 32 lanes, or None (unknown).
Value = int | np.ndarray | None


class Unknown(Exception):  # noqa: N818
    """Control flow depends on a value that is not known."""


@dataclass
class Trace:
    """One warp's execution: instruction indices in order and (barrier, threads or 0 for all) of each BAR among them."""

    code: list[int] = field(default_factory=list)
    barriers: list[tuple[int, int]] = field(default_factory=list)
    assumed: set[int] = field(default_factory=set)  # addresses of branches decided without knowing


@dataclass(frozen=True)
class LaunchShape:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: bytes
    arch: int = 90
    smem: int = 0


def split_operands(args: str) -> list[str]:
    out, depth, word = [], 0, ""
    for c in args:
        depth += (c in "[(" and 1) or (c in "])" and -1) or 0
        if c == "," and not depth:
            out.append(word.strip())
            word = ""
        else:
            word += c
    if word.strip():
        out.append(word.strip())
    return [w.replace(".reuse", "").replace(".64_TO_32", "") for w in out]


def predicate(word: str) -> bool:
    return bool(re.fullmatch(r"!?U?P(\d|T)", word))


def width_of(i: Inst) -> int:
    """Registers of a result."""
    if i.base in ("HMMA", "IMMA"):
        return 4
    if i.base == "LDSM":
        return int(i.op[-1]) if i.op[-1] in "24" else 1
    if ".128" in i.op:
        return 4
    wide = (".64" in i.op and i.base not in ("SHF", "USHF")) or ".WIDE" in i.op or i.base[0] == "D" or i.op == "CS2R"
    return 2 if wide or ".F64" in i.op else 1


NO_RESULT = {
    "ST",
    "STG",
    "STS",
    "STL",
    "STSM",
    "RED",
    "BAR",
    "BRA",
    "BSSY",
    "BSYNC",
    "EXIT",
    "NOP",
    "WARPSYNC",
    "MEMBAR",
    "DEPBAR",
    "LDGDEPBAR",
    "LDGSTS",
    "FENCE",
    "ERRBAR",
    "CCTL",
    "RET",
    "YIELD",
    "NANOSLEEP",
    "BREAK",
    "WARPGROUP",
    "BPT",
    "KILL",
    "CALL",
}


def set_bit(word: str) -> int:
    """The register-set bit of a register or predicate operand, or -1."""
    m = re.fullmatch(r"[-~!|]*(U?[RP])(\d+)\|?(?:\.\w+)*", word)
    return {"R": 0, "UR": UR, "P": P, "UP": UP}[m[1]] + int(m[2]) if m else -1


@dataclass
class Parsed:
    """Operands of one instruction, sorted into results and sources."""

    results: list[str]  # registers
    carries: list[str]  # predicates written
    sources: list[str]
    defs: int = 0  # register sets as bit masks
    uses: int = 0
    kills: int = 0


def parse(i: Inst) -> Parsed:
    words = split_operands(i.args)
    results: list[str] = []
    carries: list[str] = []
    if i.base not in NO_RESULT:
        if "SETP" in i.base or i.base in ("PLOP3", "UPLOP3"):
            carries, words = words[:2], words[2:]
        else:
            votes = i.base in ("VOTE", "VOTEU")  # the last predicate is what the lanes vote on
            while len(words) > votes and predicate(words[0]) and not words[0].startswith("!"):
                carries.append(words.pop(0))
            if words and not (i.base == "FCHK" or (carries and votes and predicate(words[0]))):
                results.append(words.pop(0))
            if i.base in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD") and ".MOV" not in i.op:
                while words and predicate(words[0]) and not words[0].startswith("!"):
                    carries.append(words.pop(0))
    p = Parsed(results, carries, words)
    for w in results:
        if (b := set_bit(w)) >= 0:
            for k in range(width_of(i)):
                p.defs |= 1 << (b + k)
    for w in carries:
        if (b := set_bit(w)) >= 0:
            p.defs |= 1 << b
    if i.base in ("LDL", "STL") and (slot := stack_slot(i)) >= 0:
        mask = ((1 << max(1, width_of(i))) - 1) << slot
        if i.base == "LDL":
            p.uses |= mask
        else:
            p.defs |= mask
    if i.base == "R2P":
        p.defs |= 0x7F << P
    if i.base == "LDS":
        p.uses |= 1 << SHARED
    elif i.base == "STS":
        p.defs |= 1 << SHARED
        if (b := set_bit(words[-1])) >= 0:
            p.uses |= ((1 << width_of(i)) - 1) << b
    for w in words:
        for m in re.finditer(r"(?<![\w.])(U?[RP])(\d+)\b", w):
            b = {"R": 0, "UR": UR, "P": P, "UP": UP}[m[1]] + int(m[2])
            p.uses |= 1 << b
            if m[1][-1] == "R" and (
                ".64" in i.op or ".WIDE" in i.op or i.op.startswith("IMAD.HI") or i.base in ("RET", "DADD", "DFMA")
            ):
                p.uses |= 1 << (b + 1)
    if i.base == "P2R":
        p.uses |= 0x7F << P
    if i.pred and (b := set_bit(i.pred)) >= 0:
        p.uses |= 1 << b
    p.kills = 0 if i.pred else p.defs & ~(1 << SHARED)
    return p


def stack_slot(i: Inst) -> int:
    """The register-set bit of a word of the stack, of a load or store at a fixed offset from R1; -1 for others."""
    m = re.search(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", i.args)
    offset = int(m[1] or "0", 0) if m else -1
    return STACK + offset // 4 if offset >= 0 and offset % 4 == 0 else -1


def successors(code: list[Inst], n: int) -> list[int]:
    i = code[n]
    if i.base == "EXIT" and not i.pred:
        return []
    nxt = [n + 1] if n + 1 < len(code) else []
    if i.base == "BRA":
        conditional = i.pred or re.match(r"!?U?P\d", i.args)
        return (nxt if conditional else []) + ([i.target] if i.target >= 0 else [])
    if i.base == "CALL":
        return nxt + ([i.target] if i.target >= 0 else [])
    return nxt


CONTROL = {"BRA", "EXIT", "BAR", "BSSY", "BSYNC", "CALL", "RET", "BRX", "BREAK", "JMP", "KILL"}


class Program:
    """A kernel's code with its control slice."""

    def __init__(self, code: list[Inst]):
        self.code = code
        self.parsed = [parse(i) for i in code]
        for i, p in zip(code, self.parsed):
            if i.base not in CONTROL and semantics(short_base(i), i.op.split(".")[1:], i, p) is nothing:
                # nothing is gained by knowing the sources, only whether it happens at all
                p.uses = 1 << set_bit(i.pred) if set_bit(i.pred) >= 0 else 0
        self.needed = self._slice()
        self.stop = [0] * len(code)  # next instruction that must be interpreted
        nxt = len(code)
        for n in range(len(code) - 1, -1, -1):
            if self.needed[n]:
                nxt = n
            self.stop[n] = nxt
        self.index = {i.addr: n for n, i in enumerate(code)}
        self.evaluators = [
            evaluator(i, p) if f and i.base not in CONTROL else None for i, p, f in zip(code, self.parsed, self.needed)
        ]

    def _slice(self) -> list[bool]:
        code = self.code
        live = [0] * (len(code) + 1)
        needed = [i.base in CONTROL for i in code]
        returns = [n + 1 for n, i in enumerate(code) if i.base == "CALL"]
        before: list[list[int]] = [[] for _ in code]
        follow = [returns if i.base == "RET" else successors(code, n) for n, i in enumerate(code)]
        for n, nxt in enumerate(follow):
            for k in nxt:
                before[k].append(n)
        work = list(range(len(code)))
        queued = [True] * len(code)
        while work:
            n = work.pop()
            queued[n] = False
            out = 0
            for k in follow[n]:
                out |= live[k]
            p = self.parsed[n]
            if p.defs & out:
                needed[n] = True
            value = (out & ~p.kills) | (p.uses if needed[n] else 0)
            if value != live[n]:
                live[n] = value
                for k in before[n]:
                    if not queued[k]:
                        queued[k] = True
                        work.append(k)
        return needed


# ------------------------------------------------------------------------------------------------- evaluation


class SharedMemory:
    """Bytes of a CTA's shared memory whose value is known, with who wrote them and when.

    Warps are interpreted one after another. A byte counts for its writer at once, for other warps after a barrier of
    the whole CTA: the order that a kernel without races relies on.
    """

    def __init__(self) -> None:
        self.bytes: dict[int, list[tuple[int, int, Value]]] = {}

    def store(self, address: int, size: int, epoch: int, warp: int, value: Value) -> None:
        for k in range(size):
            byte = None if value is None else value >> 8 * k & 255
            if byte is not None or address + k in self.bytes:
                self.bytes.setdefault(address + k, []).append((epoch, warp, byte))

    def load(self, address: int, size: int, epoch: int, warp: int) -> Value:
        values = [self.newest(address + k, epoch, warp) for k in range(size)]
        return None if None in values else sum(byte << 8 * k for k, byte in enumerate(values))

    def newest(self, address: int, epoch: int, warp: int) -> Value:
        seen = [x for x in self.bytes.get(address, []) if x[0] < epoch or (x[0] == epoch and x[1] == warp)]
        newest = max((x[0] for x in seen), default=-1)
        last = [x for x in seen if x[0] == newest]
        return last[-1][2] if len({writer for _, writer, _ in last}) == 1 else None


class State:
    def __init__(self, shape: LaunchShape, block: tuple[int, int, int], warp: int, memory: SharedMemory):
        self.r: list[Value] = [None] * (STACK + 4096)
        self.shape, self.memory, self.warp = shape, memory, warp
        self.partial: dict[int, np.ndarray] = {}  # lanes in which a register is known, where not in all
        self.epoch = 0  # barriers of the whole CTA passed
        threads = warp * 32 + LANES
        x, y, _ = shape.block
        self.special: dict[str, Value] = {
            "SR_TID.X": threads % x,
            "SR_TID.Y": threads // x % y,
            "SR_TID.Z": threads // (x * y),
            "SR_LANEID": LANES,
            "SR_CTAID.X": block[0],
            "SR_CTAID.Y": block[1],
            "SR_CTAID.Z": block[2],
            "SRZ": 0,
            "SR_CgaCtaId": 0,
            "SR_SWINHI": 0,
        }
        if y == 1 and shape.block[2] == 1:
            self.special["SR_TID.Y"] = self.special["SR_TID.Z"] = 0
        self.lanes = np.ones(32, bool)
        self.index = 0  # of the next instruction
        header = bytearray(PARAM_BASE[shape.arch])
        for k, v in enumerate((*shape.block, *shape.grid)):
            at = 0 if shape.arch < 100 else 0x360
            header[at + 4 * k : at + 4 * k + 4] = v.to_bytes(4, "little")
        self.bank = bytes(header) + shape.params + bytes(64)

    def get(self, n: int) -> Value:
        """Register n as the active lanes see it."""
        known = self.partial.get(n)
        return None if known is not None and (self.lanes & ~known).any() else self.r[n]

    def put(self, n: int, value: Value, when: Value) -> None:
        """Writes register n in the lanes `when`."""
        if when is True or value is None or when is None:
            self.r[n] = simplify(value) if when is True else None
            self.partial.pop(n, None)
        elif self.r[n] is None:
            self.r[n] = value
            self.partial[n] = np.array(when)
        else:
            self.r[n] = simplify(sel(when, value, self.r[n]))
            if n in self.partial:
                self.partial[n] = self.partial[n] | when

    def constant(self, offset: int, size: int) -> Value:
        if offset < 0 or offset + size > len(self.bank):
            return None
        return int.from_bytes(self.bank[offset : offset + size], "little")


def wide(low: Value, high: Value) -> Value:
    if low is None or high is None:
        return None
    return (
        low | (high << 32)
        if isinstance(low, int) and isinstance(high, int)
        else u64(low) | (u64(high) << np.uint64(32))
    )


def u64(v: Value) -> np.ndarray:
    return v if isinstance(v, np.ndarray) else np.full(32, v & M64, np.uint64)


def simplify(v: Value) -> Value:
    if isinstance(v, np.ndarray) and v.dtype != bool and (v == v[0]).all():
        return int(v[0])
    return v


Getter = Callable[[State], Value]


def source(word: str, size: int = 1) -> Getter:
    """Reads an operand of `size` registers as an unsigned integer."""
    neg, inv, absolute = word.startswith("-"), word.startswith("~"), "|" in word
    word = word.lstrip("-~").strip("|")
    bits = 32 * size
    mask = (1 << bits) - 1
    if word in ("RZ", "URZ", "SRZ"):

        def get(s):
            return 0
    elif m := re.fullmatch(r"(U?R)(\d+)(?:\.(?:64|U32|H0_H0))*", word):
        n = int(m[2]) + (UR if m[1] == "UR" else 0)
        get = (lambda s: s.get(n)) if size == 1 else (lambda s: wide(s.get(n), s.get(n + 1)))
    elif m := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\](?:\.\w+)?", word):
        at = int(m[1], 16)

        def get(s):
            return s.constant(at, 4 * size)
    elif re.fullmatch(r"(0x[0-9a-f]+|\d+)", word):
        number = int(word, 0) & mask

        def get(s):
            return number
    else:

        def get(s):
            return None

    if absolute:
        plain = get

        def get(s: State) -> Value:
            v = plain(s)
            return (
                None
                if v is None
                else (-v & M32 if v & SIGN else v)
                if isinstance(v, int)
                else np.where(v & SIGN, (M32 + 1 - v) & M32, v)
            )

    if neg:
        positive = get

        def get(s):
            return (
                None
                if (v := positive(s)) is None
                else (mask + 1 - v) & mask
                if bits == 32 or isinstance(v, int)
                else ~v + np.uint64(1)
            )
    elif inv:
        straight = get

        def get(s):
            return None if (v := straight(s)) is None else v ^ mask

    return get


def truth(word: str) -> Getter:
    """Reads a predicate: a bool, an array of bools, or None."""
    negated = word.startswith("!")
    word = word.lstrip("!")
    if word in ("PT", "UPT"):
        return lambda s: not negated
    n = set_bit(word)
    if not negated:
        return lambda s: s.get(n)
    return lambda s: None if (v := s.get(n)) is None else ~v if isinstance(v, np.ndarray) else not v


def both(a: Value, b: Value, f: Callable) -> Value:
    return None if a is None or b is None else f(a, b)


def sel(p: Value, a: Value, b: Value) -> Value:
    if isinstance(p, np.ndarray):
        if a is None or b is None:
            return None
        return np.where(
            p,
            a if isinstance(a, bool) else u64(a) if not (isinstance(a, np.ndarray) and a.dtype == bool) else a,
            b if isinstance(b, bool) else u64(b) if not (isinstance(b, np.ndarray) and b.dtype == bool) else b,
        )
    return None if p is None else a if p else b


def land(a: Value, b: Value) -> Value:
    for x, y in ((a, b), (b, a)):
        if isinstance(x, bool | np.bool_):
            return y if x else False
    return None if a is None or b is None else a & b


def lnot(a: Value) -> Value:
    return None if a is None else ~a if isinstance(a, np.ndarray) else not a


def lor(a: Value, b: Value) -> Value:
    return lnot(land(lnot(a), lnot(b)))


def signed(v: int | np.ndarray) -> int | np.ndarray:
    """Order-preserving map of signed to unsigned numbers."""
    return v ^ SIGN


def sext(v: Value, bits: int = 32) -> Value:
    """Sign extension to 64 bits, as an unsigned number."""
    if v is None:
        return None
    s = 1 << (bits - 1)
    if isinstance(v, int):
        return ((v & ((1 << bits) - 1)) ^ s) - s & M64
    return (((v & np.uint64((1 << bits) - 1)) ^ np.uint64(s)) - np.uint64(s)) & np.uint64(M64)


def multiply(a: Value, b: Value, is_signed: bool) -> Value:
    """64-bit product of two 32-bit numbers."""
    if a is None or b is None:
        return 0 if (isinstance(a, int) and a == 0) or (isinstance(b, int) and b == 0) else None
    if is_signed:
        a, b = sext(a), sext(b)
    if isinstance(a, int) and isinstance(b, int):
        return a * b & M64
    return u64(a) * u64(b)


def add(*terms: Value) -> Value:
    """Sum modulo 2^64."""
    total: Value = 0
    for t in terms:
        if t is None or total is None:
            return None
        total = (total + t) & M64 if isinstance(total, int) and isinstance(t, int) else u64(total) + u64(t)
    return total


def as_int(p: Value) -> Value:
    return None if p is None else p.astype(np.uint64) if isinstance(p, np.ndarray) else int(p)


COMPARE: dict[str, Callable] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def shift_amount(v: Value, wrap: bool) -> int | None:
    v = simplify(v)
    return None if not isinstance(v, int) else v % 32 if wrap else v


def lut(a: Value, b: Value, c: Value, table: int, mask: int) -> Value:
    used = [bool((table >> 4 ^ table) & 0x0F), bool((table >> 2 ^ table) & 0x33), bool((table >> 1 ^ table) & 0x55)]
    values = [0 if not u else v for u, v in zip(used, (a, b, c))]
    if any(v is None for v in values):
        return None
    out: Value = 0
    for k in range(8):
        if table >> k & 1:
            term: Value = mask
            for bit, v in zip((4, 2, 1), values):
                term = term & (v if k & bit else v ^ mask)
            out = out | term
    return out


def float_bits(v: Value, f: Callable[[np.ndarray], np.ndarray]) -> Value:
    return None if v is None else simplify(f(u64(v)))


def int_to_float_up(v: np.ndarray) -> np.ndarray:
    f = v.astype(np.float32)
    f = np.where(f.astype(np.float64) < v.astype(np.float64), np.nextafter(f, np.float32(np.inf)), f)
    return f.astype(np.float32).view(np.uint32).astype(np.uint64)


def reciprocal(v: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.float32(1) / v.astype(np.uint32).view(np.float32)).view(np.uint32).astype(np.uint64)


def float_to_uint(v: np.ndarray) -> np.ndarray:
    return np.clip(np.nan_to_num(v.astype(np.uint32).view(np.float32).astype(np.float64)), 0, 2.0**63).astype(np.uint64)


def short_base(i: Inst) -> str:
    """The opcode without the mark of the uniform datapath."""
    return i.base[1:] if i.base[0] == "U" else i.base


def shared_address(word: str) -> Getter:
    """Of [R2.X4+UR4+0x10] and the like."""
    terms = []
    for term in word.strip("[]").split("+"):
        register, _, factor = term.partition(".X")
        terms.append((source(register), int(factor or 1)))

    def address(s: State) -> Value:
        values = [get(s) for get, _ in terms]
        total = add(*(None if v is None else v * factor for v, (_, factor) in zip(values, terms, strict=True)))
        return None if total is None else simplify(total & M32)

    return address


def shared_access(i: Inst, p: Parsed) -> Callable[[State], None]:
    """A load or store of shared memory. What asynchronous copies bring is unknown."""
    guard = truth(i.pred) if i.pred else None
    address = shared_address(p.sources[0])
    size, is_load, narrow = width_of(i), i.base == "LDS", re.search(r"\.([US])(8|16)", i.op)
    num_bytes = int(narrow[2]) // 8 if narrow else 4
    first = set_bit(p.results[0] if is_load else p.sources[1])

    def step(s: State) -> None:
        when = True if guard is None else guard(s)
        lanes = s.lanes & (when if isinstance(when, np.ndarray) else np.full(32, when is not False))
        if not lanes.any():
            return
        at = address(s)
        for k in range(size):
            if is_load:
                value: Value = None
                if at is not None:
                    found = [s.memory.load(a + 4 * k, num_bytes, s.epoch, s.warp) for a in places(at, lanes)]
                    if isinstance(at, int):
                        value = found[0]
                    elif all(isinstance(v, int) for v in found):
                        value = np.zeros(32, np.uint64)
                        value[lanes] = found
                if narrow and narrow[1] == "S" and value is not None:
                    value = sext(value, 8 * num_bytes) & M32
                if first >= 0:
                    s.put(first + k, value, True if lanes.all() else lanes)
            elif at is not None:
                value = 0 if first < 0 else None if when is None else s.get(first + k)
                if value is None and not s.memory.bytes:
                    continue
                for lane, a in zip(np.flatnonzero(lanes), places(at, lanes)):
                    word = int(value[lane]) if isinstance(value, np.ndarray) else value
                    s.memory.store(a + 4 * k, num_bytes, s.epoch, s.warp, word)

    def places(at: int | np.ndarray, lanes: np.ndarray) -> list[int]:
        return [at] if isinstance(at, int) else [int(a) for a in at[lanes]]

    return step


def evaluator(i: Inst, p: Parsed) -> Callable[[State], None]:
    """A function that performs an instruction of the slice on the known values."""
    if i.base in ("LDS", "STS"):
        return shared_access(i, p)
    base = short_base(i)
    mods = i.op.split(".")[1:]
    compute = semantics(base, mods, i, p)
    guard = truth(i.pred) if i.pred else None
    registers = [(set_bit(w), width_of(i)) for w in p.results]
    if i.base == "STL":
        registers = [(stack_slot(i), width_of(i))]
    preds = [set_bit(w) for w in p.carries]

    def put(s: State, n: int, value: Value, when: Value) -> None:
        if n >= 0:
            s.put(n, value, when)

    def step(s: State) -> None:
        when: Value = True
        if guard is not None:
            when = guard(s)
            if when is False:
                return
        if not s.lanes.all() and base not in ("R2UR",):
            when = land(when, s.lanes.copy()) if (registers and registers[0][0] < UR) or not registers else when
        values, flags = compute(s)
        for n, size in registers:
            if size == 2 and n >= 0:
                v = values
                put(s, n, None if v is None else v & M32, when)
                put(s, n + 1, None if v is None else v >> 32 if isinstance(v, int) else v >> np.uint64(32), when)
            elif size == 1:
                put(s, n, None if values is None else values & M32, when)
            else:
                for k in range(size):
                    put(s, n + k, None, when)
        for k, n in enumerate(preds):
            put(s, n, flags[k] if k < len(flags) else None, when)
        if base == "R2P":
            for k in range(7):
                s.r[P + k] = None

    return step


Result = tuple[Value, Sequence[Value]]


def nothing(s: State) -> Result:
    """Of instructions whose result is never known."""
    return None, (None, None)


def semantics(base: str, mods: list[str], i: Inst, p: Parsed) -> Callable[[State], Result]:
    w = p.sources
    unsigned = "U32" in mods or "U64" in mods
    if base == "MOV":
        g = source(w[0])
        return lambda s: (g(s), ())
    if base in ("S2R", "CS2R", "S2UR") or i.base in ("S2UR",):
        return lambda s: (s.special.get(w[0]), ())
    if i.base == "R2UR":
        g = source(w[0])

        def first(s: State) -> Result:
            v = g(s)
            return (int(v[int(np.argmax(s.lanes))]) if isinstance(v, np.ndarray) else v), ()

        return first
    if base == "LDC" or i.base == "ULDC":
        size = 8 if "64" in mods else 1 if "U8" in mods or "S8" in mods else 2 if "U16" in mods or "S16" in mods else 4
        m = re.fullmatch(r"c\[0x0\]\[(?:(U?R\d+)\+?)?(-?0x[0-9a-f]+)?\]", w[0])
        if not m:
            return nothing
        offset = int(m[2], 0) if m[2] else 0
        index = source(m[1]) if m[1] else lambda s: 0

        def load(s: State) -> Result:
            at = simplify(index(s))
            if not isinstance(at, int):
                return None, ()
            v = s.constant(at + offset, size)
            if v is not None and ("S8" in mods or "S16" in mods):
                v = sext(v, 8 * size)
            return v, ()

        return load
    if base == "IADD3" or base == "VIADD" or base == "IADD":
        n = 3 if base == "IADD3" else 2
        terms, carry_in = w[:n], [truth(x) for x in w[n:] if predicate(x)]
        get = [source(x.lstrip("-")) for x in terms]
        minus = [x.startswith("-") for x in terms]

        def iadd(s: State) -> Result:
            parts: list[Value] = []
            for g, m in zip(get, minus):
                v = g(s)
                parts.append(None if v is None else (M32 + 1) - v if m else v)
            if "X" in mods:
                parts += [as_int(c(s)) for c in carry_in]
            total = add(*parts)
            if total is None:
                return None, (None, None)
            top = total >> 32 if isinstance(total, int) else total >> np.uint64(32)
            return total, (top >= 1, top >= 2)

        return iadd
    if base == "IMAD":
        carry_in = [truth(x) for x in w if predicate(x)]
        w = [x for x in w if not predicate(x)]
        if len(w) < 3:
            return nothing
        long = "WIDE" in mods or "HI" in mods
        a, b, c = source(w[0].lstrip("-")), source(w[1]), source(w[2], 2 if long else 1)
        negate = w[0].startswith("-")

        def imad(s: State) -> Result:
            x, y = a(s), b(s)
            prod = multiply(x, y, long and not unsigned)
            if prod is not None and negate:
                prod = (M64 + 1 - prod) & M64 if isinstance(prod, int) else ~prod + np.uint64(1)
            addend = c(s)
            total = add(prod, addend, *[as_int(t(s)) for t in carry_in if "X" in mods])
            if total is None:
                return None, (None, None)
            # of a 64-bit sum the carry shows as wrapping around (a carry in that wraps exactly is not produced by
            # division code)
            carry: Value = (
                total < prod if long else (total >> 32 if isinstance(total, int) else total >> np.uint64(32)) >= 1
            )
            if "HI" in mods:
                total = total >> 32 if isinstance(total, int) else total >> np.uint64(32)
            return total, (carry, None)

        return imad
    if base == "LEA":
        words = [x for x in w if not predicate(x)]
        carry_in = [truth(x) for x in w if predicate(x)]
        sh = int(words[-1], 0) if words[-1].startswith("0x") else None
        if sh is None:
            return nothing
        a, b = source(words[0]), source(words[1])
        c = source(words[2]) if len(words) == 4 else (lambda s: 0)

        def lea(s: State) -> Result:
            x, y, z = a(s), b(s), c(s)
            if x is None or y is None or z is None:
                return None, (None,)
            if "HI" in mods:
                full = sext(x) if "SX32" in mods else wide(x, z)
                part = (
                    (full >> (32 - sh)) & M32
                    if isinstance(full, int)
                    else (full >> np.uint64(32 - sh)) & np.uint64(M32)
                )
            else:
                part = (x << sh) & M32 if isinstance(x, int) else (x << np.uint64(sh)) & np.uint64(M32)
            total = add(part, y, *[as_int(t(s)) for t in carry_in if "X" in mods])
            if total is None:
                return None, (None,)
            return total, ((total >> 32 if isinstance(total, int) else total >> np.uint64(32)) >= 1,)

        return lea
    if base == "LOP3":
        numbers = [x for x in w if not predicate(x)]
        a, b, c, table = source(numbers[0]), source(numbers[1]), source(numbers[2]), int(numbers[3], 0)

        def lop(s: State) -> Result:
            v = lut(a(s), b(s), c(s), table, M32)
            return v, (None if v is None else v != 0,)

        return lop
    if base == "PLOP3":
        a, b, c = (truth(x) for x in w[:3])
        tables = [int(x, 0) for x in w[3:5]]

        def plop(s: State) -> Result:
            v = [as_int(x(s)) for x in (a, b, c)]
            out = [lut(*v, t, 1) for t in tables]
            return None, tuple(None if o is None else o != 0 for o in out)

        return plop
    if base == "SHF":
        low, amount, high = source(w[0]), source(w[1]), source(w[2])
        wrap = "W" in mods

        def shf(s: State) -> Result:
            n = shift_amount(amount(s), wrap)
            lo, hi = low(s), high(s)
            if n is None:
                return None, ()
            kind = next(x for x in ("U32", "S32", "U64", "S64") if x in mods)
            if "R" in mods:
                if kind in ("U64", "S64"):
                    full = wide(lo, hi)
                    if full is None:
                        return None, ()
                    n = min(n, 63)
                    if "HI" in mods:
                        v = full >> n if isinstance(full, int) else full >> np.uint64(n)
                        return (v >> 32 if isinstance(v, int) else v >> np.uint64(32)), ()
                    return (full >> n if isinstance(full, int) else full >> np.uint64(n)), ()
                value = hi if "HI" in mods else lo
                if value is None:
                    return None, ()
                if kind == "S32":
                    value, n = sext(value), min(n, 63)
                    if isinstance(value, int):
                        return (sext(value) if False else ((value ^ (1 << 63)) - (1 << 63)) >> n) & M32, ()
                    return (value.astype(np.int64) >> n).astype(np.uint64), ()
                return (value >> n if isinstance(value, int) else value >> np.uint64(min(n, 63))) if n < 32 else 0, ()
            if "HI" in mods:
                full = wide(lo, hi)
                if full is None:
                    return None, ()
                v = (full << n) & M64 if isinstance(full, int) else full << np.uint64(n)
                return (v >> 32 if isinstance(v, int) else v >> np.uint64(32)), ()
            if lo is None:
                return None, ()
            return ((lo << n) & M32 if isinstance(lo, int) else lo << np.uint64(n)) if n < 32 else 0, ()

        return shf
    if base == "ISETP":
        op = next((m for m in mods if m in COMPARE), None)
        if op is None:
            return nothing
        a, b, c = source(w[0]), source(w[1]), truth(w[2])
        extended = truth(w[3]) if "EX" in mods else None
        logic = lor if "OR" in mods else land
        xor = "XOR" in mods

        def isetp(s: State) -> Result:
            x, y = a(s), b(s)
            if x is None or y is None:
                v: Value = None
            else:
                if not unsigned:
                    x, y = signed(x), signed(y)
                v = COMPARE[op](x, y)
                if extended is not None:
                    e = extended(s)
                    if op == "NE":
                        v = lor(v, e)
                    else:
                        v = lor(
                            v if op in ("LT", "GT") else False if op == "EQ" else (x > y if op == "GE" else x < y),
                            land(x == y, e),
                        )
            third = c(s)
            if xor:
                both_known = v is not None and third is not None
                return None, (
                    (v ^ third, ~(v ^ third) if isinstance(v ^ third, np.ndarray) else not (v ^ third))
                    if both_known
                    else (None, None)
                )
            return None, (logic(v, third), logic(lnot(v), third))

        return isetp
    if base in ("SEL", "IMNMX", "VIMNMX"):
        a, b, c = source(w[0]), source(w[1]), truth(w[2])

        def choose(s: State) -> Result:
            x, y, q = a(s), b(s), c(s)
            if base == "SEL":
                return sel(q, x, y), ()
            if x is None or y is None:
                return None, ()
            less = x < y if unsigned else signed(x) < signed(y)
            less = less if isinstance(less, np.ndarray) else bool(less)
            return sel(q, sel(less, x, y), sel(less, y, x)), ()

        return choose
    if base == "VIADDMNMX":
        a, b, c, q = source(w[0]), source(w[1]), source(w[2]), truth(w[3])

        def bounded(s: State) -> Result:
            x, y, minimum = add(a(s), b(s)), c(s), q(s)
            if x is None or y is None:
                return None, ()
            x = x & M32
            less = x < y if unsigned else signed(x) < signed(y)
            less = less if isinstance(less, np.ndarray) else bool(less)
            return sel(minimum, sel(less, x, y), sel(less, y, x)), ()

        return bounded
    if i.base in ("LDL", "STL"):
        size = width_of(i)
        slot = stack_slot(i)
        if slot < 0 or size > 2:
            return nothing
        get_word = (
            source(w[-1], size)
            if i.base == "STL"
            else (lambda s: s.get(slot) if size == 1 else wide(s.get(slot), s.get(slot + 1)))
        )
        return lambda s: (get_word(s), ())
    if i.base in ("LDS", "STS"):
        return lambda s: (None, ())  # shared_access has its own
    if base == "P2R" and len(w) == 3:
        keep, chosen = source(w[1]), int(w[2], 0)

        def pack_predicates(s: State) -> Result:
            out = keep(s)
            for k in range(7):
                if chosen >> k & 1:
                    bit = as_int(s.get(P + k))
                    out = (
                        None
                        if out is None or bit is None
                        else (out & ~(1 << k) & M32) | (bit << k if isinstance(bit, int) else bit << np.uint64(k))
                    )
            return out, ()

        return pack_predicates
    if i.op == "HFMA2.MMA" and len(w) == 4 and {w[0].lstrip("-"), w[1]} == {"RZ"}:
        halves = [int(np.float16(float(x)).view(np.uint16)) for x in w[2:]]
        return lambda s: (halves[0] << 16 | halves[1], ())
    if base == "FSETP" and "+INF" in w and ("GEU" in mods or "GTU" in mods or "GE" in mods):
        return lambda s: (None, (False, None))  # data is taken to be finite
    if base == "IABS":
        g = source(f"|{w[0]}|")
        return lambda s: (g(s), ())
    if base == "SGXT":
        a, n = source(w[0]), int(w[1], 0)

        def extend(s: State) -> Result:
            v = a(s)
            if v is None:
                return None, ()
            v = v & ((1 << n) - 1)
            return (v if unsigned else sext(v, n)), ()

        return extend
    if base == "PRMT":
        a, b, c = source(w[0]), source(w[1]), source(w[2])

        def permute(s: State) -> Result:
            x, pick, y = a(s), simplify(b(s)), c(s)
            full = wide(x, y) if isinstance(pick, int) and any((pick >> 4 * k & 7) > 3 for k in range(4)) else x
            if full is None or not isinstance(pick, int):
                return None, ()
            out: Value = 0
            for k in range(4):
                q = pick >> 4 * k & 15
                byte = (
                    full >> 8 * (q & 7) & 255
                    if isinstance(full, int)
                    else full >> np.uint64(8 * (q & 7)) & np.uint64(255)
                )
                if q & 8:
                    byte = (byte >> 7) * 255 if isinstance(byte, int) else (byte >> np.uint64(7)) * np.uint64(255)
                out = out | (byte << 8 * k if isinstance(byte, int) else byte << np.uint64(8 * k))
            return out, ()

        return permute
    if base == "SHFL" and "IDX" in mods:
        a, lane = source(w[0]), source(w[1])

        def shuffle(s: State) -> Result:
            v, k = a(s), simplify(lane(s))
            if isinstance(v, np.ndarray):
                v = int(v[k & 31]) if isinstance(k, int) else None
            return v, (True,)

        return shuffle
    if base in ("VOTE", "OTE") and i.base in ("VOTE", "VOTEU"):
        g = truth(w[0]) if w and predicate(w[0]) else (lambda s: None)
        every = "ALL" in mods

        def vote(s: State) -> Result:
            v = g(s)
            if v is None and "ANY" in mods:
                return 0, (False,)  # warps vote on exceptions, and data is taken to be none
            if v is None:
                return None, (None,)
            bits = (v if isinstance(v, np.ndarray) else np.full(32, v)) & s.lanes
            mask = int(sum(1 << k for k in range(32) if bits[k]))
            return mask, (bool((bits == s.lanes).all()) if every else bool(bits.any()),)

        return vote
    if base == "ELECT":
        return lambda s: (0, (int(np.argmax(s.lanes)) == LANES,))
    if base == "POPC":
        g = source(w[0])
        return lambda s: (v.bit_count() if isinstance(v := g(s), int) else None, ())
    if base == "FLO":
        g = source(w[0])
        return lambda s: ((v.bit_length() - 1) & M32 if isinstance(v := g(s), int) else None, ())
    if base == "I2F" and "U64" in mods and "RP" in mods:
        g = source(w[0], 2)
        return lambda s: (float_bits(g(s), int_to_float_up), ())
    if base == "F2I" and "U64" in mods and "TRUNC" in mods:
        g = source(w[0])
        return lambda s: (float_bits(g(s), float_to_uint), ())
    if base == "I2F" and "RP" in mods:
        g = source(w[0])
        return lambda s: (float_bits(g(s), int_to_float_up), ())
    if base == "MUFU" and "RCP" in mods:
        g = source(w[0])
        return lambda s: (float_bits(g(s), reciprocal), ())
    if base == "F2I" and "TRUNC" in mods and "U32" in mods:
        g = source(w[0])
        return lambda s: (float_bits(g(s), float_to_uint), ())
    return nothing


# ------------------------------------------------------------------------------------------------- execution


def run_warp(
    program: Program,
    shape: LaunchShape,
    block: tuple[int, int, int],
    warp: int,
    decisions: Mapping[int, bool] | None = None,
    memory: SharedMemory | None = None,
    limit: int = 40_000_000,
) -> Trace:
    """Executes one warp. decisions: address of a branch with an unknown condition -> taken or not."""
    code, stop, evaluate = program.code, program.stop, program.evaluators
    s, t = State(shape, block, warp, memory or SharedMemory()), Trace()
    trace = t.code
    decisions = decisions or {}
    threads = shape.block[0] * shape.block[1] * shape.block[2]
    s.lanes = warp * 32 + np.arange(32) < threads
    pending: list[tuple[int, np.ndarray]] = []  # (pc, lanes) of the other sides of divergent branches
    held: dict[int, np.ndarray] = {}  # lanes that wait at a barrier for the others of the warp
    regions: list[tuple[int, np.ndarray, int]] = []  # (reconvergence pc, lanes waiting there, pending below it)
    pc = 0
    while True:
        if pc >= len(code):
            raise Unknown(f"ran past the end of {len(code)} instructions")
        at = stop[pc]
        trace.extend(range(pc, min(at + 1, len(code))))
        if len(trace) > limit:
            raise Unknown(f"more than {limit} instructions in warp {warp}")
        if at >= len(code):
            raise Unknown("no EXIT")
        i = code[at]
        pc = s.index = at + 1
        if (f := evaluate[at]) is not None:
            f(s)
            continue
        guard = truth(i.pred)(s) if i.pred else True
        base = i.base
        if base == "BAR":
            if len(pending) > (regions[-1][2] if regions else 0):  # the other sides of a branch come first
                held[at] = held.get(at, False) | s.lanes
                trace.pop()
                pc, s.lanes = pending.pop()
                continue
            s.lanes = s.lanes | held.pop(at, False)
            off = guard is False or (isinstance(guard, np.ndarray) and not (guard & s.lanes).any())
            t.barriers.append((-1, 0) if off else barrier_operands(i, program.parsed[at], s))
            s.epoch += t.barriers[-1] == (0, 0)
        elif base == "BSSY":
            regions.append((i.target, np.zeros(32, bool), len(pending)))
        elif base == "BSYNC":
            if guard is False or not regions:
                continue
            where, waiting, depth = regions[-1]
            if guard is not True:
                guard = np.asarray(guard) if guard is not None else s.lanes
                if not (guard & s.lanes).any():
                    continue
            waiting |= s.lanes
            if len(pending) > depth:
                pc, s.lanes = pending.pop()
            else:
                regions.pop()
                s.lanes, pc = waiting, where
        elif base == "EXIT":
            words = split_operands(i.args)
            if words and predicate(words[0]):
                guard = land(guard, truth(words[0])(s))
            go = resolve(guard, i, decisions, t, s)
            s.lanes = s.lanes & ~go
            if not s.lanes.any():
                if pending:
                    pc, s.lanes = pending.pop()
                    continue
                while regions and not regions[-1][1].any():
                    regions.pop()
                if not regions:
                    return t
                pc, s.lanes, _ = regions.pop()
        elif base == "BRA":
            words = split_operands(i.args)
            if ".DIV" in i.op or ".CONV" in i.op:
                continue
            if len(words) > 1 and predicate(words[0]):
                guard = land(guard, truth(words[0])(s))
            go = resolve(guard, i, decisions, t, s)
            taken = s.lanes & go
            if not taken.any():
                continue
            rest = s.lanes & ~go
            if rest.any():
                pending.append((pc, rest))
                s.lanes = taken
            pc = i.target
        elif base == "CALL":
            if resolve(guard, i, decisions, t, s).any():
                if i.target < 0:
                    raise Unknown(f"call at {i.addr:#x} to an unknown place")
                pc = i.target
        elif base == "RET":
            v = simplify(source(split_operands(i.args)[0])(s))
            if not isinstance(v, int) or v not in program.index:
                raise Unknown(f"return at {i.addr:#x} to an unknown place")
            pc = program.index[v]
        else:
            raise Unknown(f"{i.op} at {i.addr:#x} is not supported")


def resolve(guard: Value, i: Inst, decisions: Mapping[int, bool], t: Trace, s: State) -> np.ndarray:
    if i.addr in decisions:
        t.assumed.add(i.addr)
        return np.full(32, decisions[i.addr])
    if guard is None:
        if i.base == "BRA" and 0 <= i.target < s.index:
            raise Unknown(
                f"the condition of the loop {i.op} at {i.addr:#x} is unknown: decide it with --branch {i.addr:#x}=0 or 1"  # noqa: E501
            )
        t.assumed.add(i.addr)
        return np.zeros(32, bool)
    return guard if isinstance(guard, np.ndarray) else np.full(32, bool(guard))


def barrier_operands(i: Inst, p: Parsed, s: State) -> tuple[int, int]:
    words = [x for x in p.sources if not predicate(x)]
    values = [simplify(source(x)(s)) for x in words[:2]]
    if not values or not all(isinstance(v, int) for v in values):
        raise Unknown(f"the operands of {i.op} {i.args} at {i.addr:#x} are unknown")
    return values[0], values[1] if len(values) > 1 else 0


def run_cta(
    program: Program, shape: LaunchShape, block: tuple[int, int, int], decisions: Mapping[int, bool] | None = None
) -> list[Trace]:
    """The traces of a CTA's warps; equal ones are one object."""
    threads = shape.block[0] * shape.block[1] * shape.block[2]
    out: list[Trace] = []
    memory = SharedMemory()
    for w in range((threads + 31) // 32):
        t = run_warp(program, shape, block, w, decisions, memory)
        out.append(next((o for o in out if o.code == t.code and o.barriers == t.barriers), t))
    return out
