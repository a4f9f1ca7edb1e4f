"""One multiprocessor, event by event: the warps of the resident CTAs issue their SASS in order.

An instruction issues when its warp's stall count has run out, the scoreboards in its wait mask are released,
tensor-core
results it names are written, its pipe is free, and its sub-partition's issue slot is free (oldest ready first).
Variable latencies come from `machine`; global memory is a server with a rate (this SM's share) and a latency.
"""

import heapq
import re

FMA = {"FFMA", "FADD", "FMUL", "FMNMX"}
IMAD = {"IMAD", "VIADD"}
HALF = {"HFMA2", "HADD2", "HMUL2"}
UNI = {"UIADD3", "ULOP3", "UMOV", "USHF", "UIMAD", "ULEA", "USEL", "UISETP", "USGXT", "UPLOP3", "ULDC", "UFLO", "UP2UR"}
UNSUPPORTED = {
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "UBLKCP",
    "SYNCS",
    "UTCHMMA",
    "LDTM",
    "STTM",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
}
MIO_LD = {"LDS", "LDSM", "LD"}  # generic loads are taken for shared ones: nvcc knows the global ones
MIO_ST = {"STS", "STSM", "ST"}


def width(op):
    return 16 if ".128" in op else 8 if ".64" in op else 2 if ".U16" in op or ".S16" in op else 1 if ".U8" in op else 4


class Static:
    """What the simulator needs of one instruction, computed once."""

    __slots__ = (
        "branch",
        "bytes",
        "dst",
        "ii",
        "kind",
        "last",
        "lat",
        "n",
        "op",
        "pipe",
        "pred",
        "rd",
        "src",
        "stall",
        "waitm",
        "waves",
        "wr",
        "yld",
    )


def classify(code, m, conflict=1.0):
    out = []
    for i in code:
        s = Static()
        b = i.base
        s.op, s.stall, s.wr, s.rd, s.yld = b, max(i.stall, 1), i.wr, i.rd, i.yld
        s.waitm = tuple(k for k in range(6) if i.wait >> k & 1)
        s.src, s.dst = i.src, i.dst
        s.kind, s.pipe, s.ii, s.lat, s.waves, s.bytes, s.n, s.last, s.branch, s.pred = (
            "alu",
            "alu",
            m.ii_alu,
            0,
            0,
            0,
            0,
            False,
            b == "BRA",
            i.pred,
        )
        if b in FMA:
            s.pipe, s.ii = "fma", m.ii_fma
        elif b in IMAD:
            s.pipe, s.ii = "fma", m.ii_imad
        elif b in HALF:
            s.pipe, s.ii = "fma", m.ii_half
        elif b in UNI:
            s.pipe, s.ii = "uni", m.ii_uniform
            s.lat = m.lat_ldc if b == "ULDC" else m.lat_r2ur
        elif b == "MUFU" or b in ("I2F", "F2I", "I2FP", "POPC", "FLO"):
            s.kind, s.pipe, s.ii, s.lat = "var", "xu", m.ii_mufu, m.lat_mufu
        elif b == "HMMA":
            s.kind, s.pipe, s.ii = "hmma", "tensor", m.ii_hmma
            s.lat = m.lat_hmma if "16816" in i.op else m.lat_hmma_k8
        elif b == "HGMMA":
            s.kind, s.pipe, s.ii = "hgmma", "none", 0
            g = re.search(r"\.(\d+)x(\d+)x(\d+)", i.op)
            s.n = int(g[2])
            operands = i.args.split(",")
            a_shared = operands[1].strip().startswith("gdesc")
            s.waves = max(s.n * m.hgmma_n_cycles, s.n / 4 + (16 if a_shared else 0))
            s.last = "gsb0" in i.args
        elif b == "WARPGROUP":
            s.kind, s.pipe, s.ii = ("wgwait" if "DEPBAR" in i.op else "wgarrive"), "none", 0
            g = re.search(r"gsb0, 0x([0-9a-f]+)", i.args)
            s.n = int(g[1], 16) if g else 0
        elif b in MIO_LD:
            s.kind, s.pipe, s.ii = "lds", "mio", m.ii_mio
            s.lat = m.lat_ldsm if b == "LDSM" else m.lat_lds + 10 * (b == "LD")
            s.waves = max(1, width(i.op) // 4)
            if b == "LDSM":
                g = re.search(r"M(?:T)?88\.(\d)", i.op)
                s.waves = int(g[1]) if g else 1
            s.waves *= conflict
        elif b in MIO_ST:
            s.kind, s.pipe, s.ii, s.lat = "sts", "mio", m.ii_mio, m.lat_sts_read
            g = re.search(r"M(?:T)?88\.(\d)", i.op)
            s.waves = (int(g[1]) if g else max(1, width(i.op) // 4)) * conflict
        elif b in ("SHFL", "VOTE", "MATCH", "REDUX"):
            s.kind, s.pipe, s.ii, s.lat, s.waves = "lds", "mio", m.ii_mio, m.lat_shfl, 1
        elif b in ("LDG", "LDGSTS", "LDL"):
            s.kind = {"LDGSTS": "ldgsts", "LDL": "ldl"}.get(b, "ldg")
            s.pipe, s.ii, s.bytes = "mio", m.ii_mio, 32 * width(i.op)
            s.waves = max(1, width(i.op) // 4)
            s.lat = m.lat_ldg_read
        elif b in ("STG", "RED", "ATOMG", "STL"):
            s.kind = "stl" if b == "STL" else "stg"
            s.pipe, s.ii, s.bytes = "mio", m.ii_mio, 32 * width(i.op)
            s.waves = max(1, width(i.op) // 4)
            s.lat = m.lat_ldg_read
        elif b in ("LDC", "S2R", "S2UR", "R2UR", "CS2R"):
            s.kind, s.pipe, s.ii = "var", "none", 0
            s.lat = {"LDC": m.lat_ldc, "R2UR": m.lat_r2ur, "CS2R": 8}.get(b, m.lat_s2r)
        elif b == "BAR":
            s.kind, s.pipe, s.ii = ("arrive" if "ARV" in i.op else "bar"), "none", 0
        elif b == "LDGDEPBAR":
            s.kind, s.pipe, s.ii = "commit", "none", 0
        elif b == "DEPBAR":
            s.kind, s.pipe, s.ii = "cpwait", "none", 0
            g = re.search(r"SB0, 0x([0-9a-f]+)", i.args)
            s.n = int(g[1], 16) if g else 0
        elif b in ("MEMBAR", "FENCE", "ERRBAR"):
            s.kind, s.pipe, s.ii, s.lat = "membar", "none", 0, m.lat_membar
        elif b == "EXIT":
            s.kind, s.pipe, s.ii = "nop", "none", 0
        elif b in UNSUPPORTED:
            raise NotImplementedError(f"{i.op}: TMA, mbarriers, clusters and tcgen05 are not modelled")
        elif b in ("NOP", "BRA", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "YIELD"):
            s.kind, s.pipe, s.ii = "nop", "none", 0
        out.append(s)
    return out


class Warp:
    __slots__ = (
        "bars",
        "cta",
        "groups",
        "id",
        "nbar",
        "nh",
        "open",
        "pc",
        "ready",
        "regs",
        "sb",
        "sp",
        "start",
        "stores",
        "tr",
        "wg",
        "wg_groups",
        "wg_last",
    )


class Sim:
    def __init__(self, m, rate, lat_mem, scale=(1.0, 1.0)):
        """rate: bytes per cycle that this SM gets from beyond L1; lat_mem: latency of a load beyond L1."""
        self.m, self.rate, self.lat_mem = m, rate, lat_mem
        self.load_rate, self.store_rate = rate / scale[0], rate / scale[1]

    def run(self, stat, traces, resident, total):
        """Runs `total` CTAs, `resident` at a time; traces: (instruction indices, [(barrier, threads)]) of each warp
        of a CTA.

        Returns the end time of each CTA and statistics. "why" has the cycles that warps waited beyond their stall
        counts,
        by cause; "why_of" the same for each warp of a CTA.
        """
        m = self.m
        warps = len(traces)
        named = any(b[0] for _, bars in traces for b in bars)
        pipe = [{"alu": 0, "fma": 0, "xu": 0, "tensor": 0, "mio": 0, "uni": 0} for _ in range(4)]
        slot = [0] * 4
        tensor_sm, lsu, mem = [0.0] * 4, 0.0, 0.0
        heap, seq, launched = [], 0, 0
        ends, barriers, alive, next_sp = [], {}, {}, 0
        why_of = [{} for _ in traces]
        ended = [0.0] * warps
        stats = {"issued": 0, "mem_busy": 0.0, "lsu_busy": 0.0, "tensor_busy": 0.0}
        why, sbk = {}, {}  # cycles each warp waited, by cause, summed over warps

        def start_cta(t):
            nonlocal launched, seq, next_sp
            c = launched
            launched += 1
            alive[c] = warps
            barriers[c] = {}
            ws = []
            for k in range(warps):
                w = Warp()
                w.id, w.cta, w.sp, w.pc, w.ready = (c, k), c, next_sp % 4, 0, t
                next_sp += 1
                w.sb = [0] * 6
                w.start = None
                w.regs, w.groups, w.open, w.wg_groups, w.wg_last, w.stores = {}, [], 0, [], 0, 0
                w.wg, w.nh, w.nbar = None, 0, 0
                w.tr, w.bars = traces[k]
                ws.append(w)
                seq += 1
                heapq.heappush(heap, (t, c * 64 + k, w))
            for g in range(0, warps, 4):  # warpgroups share one wgmma stream
                shared = {"done": 0.0, "count": 0, "sp": ws[g].sp, "ends": []}
                for w in ws[g : g + 4]:
                    w.wg = shared

        for _ in range(min(resident, total)):
            start_cta(0)
        while heap:
            t0, key, w = heapq.heappop(heap)
            tr = w.tr
            s = stat[tr[w.pc]]
            t = w.ready
            cause = "stall count"
            sb = w.sb
            for k in s.waitm:
                if sb[k] > t:
                    t = sb[k]
                    cause = sbk.get((w.id, k), "scoreboard")
            if w.regs:
                for r in s.src:
                    v = w.regs.get(r)
                    if v is not None and v > t:
                        t, cause = v, "hmma result"
            kind = s.kind
            if kind == "cpwait":
                if len(w.groups) > s.n:
                    t = max([t, *w.groups[: len(w.groups) - s.n]])
            elif kind == "wgwait":
                if len(w.wg_groups) > s.n:
                    need = w.wg_groups[len(w.wg_groups) - s.n - 1]
                    e = w.wg["ends"]
                    if len(e) < need:  # another warp of the group has not issued it yet
                        t = max(t, t0 + 4)
                    else:
                        t = max(t, e[need - 1] + m.lat_hgmma)
            elif kind == "membar":
                t = max(t, w.stores)
            if kind in ("cpwait", "wgwait", "membar") and t > w.ready:
                cause = kind
            p = pipe[w.sp]
            if s.ii and p[s.pipe] > t:
                t, cause = p[s.pipe], "pipe " + s.pipe
            if slot[w.sp] > t:
                t, cause = slot[w.sp], "issue slot"
            if t > t0:
                w.start = cause
                heapq.heappush(heap, (t, key, w))
                continue
            # issue at t
            stats["issued"] += 1
            if t > w.ready:
                c = w.start or cause
                why[c] = why.get(c, 0) + t - w.ready
                own = why_of[w.id[1]]
                own[c] = own.get(c, 0) + t - w.ready
            w.start = None
            if s.wr != 7:
                sbk[(w.id, s.wr)] = "wait " + kind + (" " + s.op if kind in ("var", "lds") else "")
            if s.rd != 7:
                sbk[(w.id, s.rd)] = "sources of " + kind
            slot[w.sp] = t + 1
            if s.ii:
                p[s.pipe] = t + s.ii
            w.ready = t + s.stall
            w.pc += 1
            if kind == "alu":
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], t + 10 + s.lat)
            elif kind == "var":
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], t + s.lat)
            elif kind == "lds":
                lsu = max(lsu, t) + s.waves * m.wavefront
                stats["lsu_busy"] += s.waves
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], lsu + s.lat)
                if s.rd != 7:
                    sb[s.rd] = max(sb[s.rd], lsu + 8)
            elif kind == "sts":
                lsu = max(lsu, t) + s.waves * m.wavefront
                stats["lsu_busy"] += s.waves
                w.stores = max(w.stores, lsu + 10)
                if s.rd != 7:
                    sb[s.rd] = max(sb[s.rd], lsu + s.lat)
            elif kind in ("ldg", "ldgsts"):
                lsu = max(lsu, t) + s.waves * 0.5
                mem = max(mem, t) + s.bytes / self.load_rate
                stats["mem_busy"] += s.bytes / self.load_rate
                done = mem + self.lat_mem
                if kind == "ldgsts":
                    w.open = max(w.open, done)
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], done)
                if s.rd != 7:
                    sb[s.rd] = max(sb[s.rd], lsu + s.lat)
            elif kind == "stg":
                lsu = max(lsu, t) + s.waves
                mem = max(mem, t) + s.bytes / self.store_rate
                stats["mem_busy"] += s.bytes / self.store_rate
                if s.rd != 7:
                    sb[s.rd] = max(sb[s.rd], lsu + s.lat)
            elif kind in ("ldl", "stl"):
                lsu = max(lsu, t) + s.waves
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], lsu + 35)
                if s.rd != 7:
                    sb[s.rd] = max(sb[s.rd], lsu + s.lat)
            elif kind == "hmma":
                for r in s.dst:
                    w.regs[r] = t + s.lat
                stats["tensor_busy"] += s.ii / 4
            elif kind == "hgmma":
                g = w.wg
                g["count"] += 1
                # the four warps of a group issue the same wgmma: it starts when the last has; booked by every fourth
                # issue
                w.wg_last = t
                g["t"] = max(g.get("t", 0), t)
                if g["count"] % min(4, warps) == 0:
                    start = max(g["t"], max(tensor_sm))
                    end = start + s.waves
                    for k in range(4):
                        tensor_sm[k] = end
                    stats["tensor_busy"] += s.waves
                    g["ends"].append(end)
                    g["t"] = 0
                w.nh += 1
                if s.last:
                    w.wg_groups.append(w.nh)
            elif kind == "wgwait":
                if len(w.wg_groups) > s.n:
                    w.wg_groups = w.wg_groups[len(w.wg_groups) - s.n :] if s.n else []
            elif kind == "wgarrive":
                w.ready = max(w.ready, t + m.lat_arrive)
            elif kind == "commit":
                w.groups.append(w.open)
                if s.wr != 7:
                    sb[s.wr] = max(sb[s.wr], t + 8)
            elif kind == "cpwait":
                if len(w.groups) > s.n:
                    w.groups = w.groups[len(w.groups) - s.n :] if s.n else []
            elif kind == "membar":
                w.ready = max(w.ready, t + s.lat)
            elif (kind == "bar" or kind == "arrive") and w.bars[w.nbar][0] < 0:
                w.nbar += 1  # predicated off
            elif kind == "bar" or kind == "arrive":
                name, threads = w.bars[w.nbar]
                w.nbar += 1
                here = barriers[w.cta].setdefault(name, [])
                here.append((w, t, kind == "bar"))
                need = threads // 32 if threads else alive[w.cta]
                if len(here) >= need:
                    release = max(x[1] for x in here) + m.lat_bar
                    barriers[w.cta][name] = []
                    for x, at, waits in here:
                        if not waits:
                            continue
                        c = f"barrier {name}" if named else "barrier"
                        why[c] = why.get(c, 0) + release - at
                        own = why_of[x.id[1]]
                        own[c] = own.get(c, 0) + release - at
                        x.ready = max(x.ready, release)
                        heapq.heappush(heap, (x.ready, x.cta * 64 + x.id[1], x))
                if kind == "bar":
                    continue
            if w.pc == len(tr):
                alive[w.cta] -= 1
                ended[w.id[1]] = max(ended[w.id[1]], t)
                if alive[w.cta] == 0:
                    ends.append(t)
                    if launched < total:
                        start_cta(t + 60)  # block scheduler
                continue
            if s.branch and w.pc < len(tr) and tr[w.pc] != tr[w.pc - 1] + 1:
                w.ready = max(w.ready, t + m.lat_branch)
            if w.regs and len(w.regs) > 64:
                w.regs = {r: v for r, v in w.regs.items() if v > t}
            heapq.heappush(heap, (w.ready, key, w))
        if len(ends) < total:
            stuck = {
                f"warp {w.id[1]} of CTA {c}: barrier {name}"
                for c, b in barriers.items()
                for name, here in b.items()
                for w, _, waits in here
                if waits
            }
            raise RuntimeError(f"deadlock: {sorted(stuck)}")
        stats["time"] = max(ends)
        stats["ended"] = ended
        stats["why_of"] = [dict(sorted(x.items(), key=lambda y: -y[1])) for x in why_of]
        stats["why"] = dict(sorted(why.items(), key=lambda x: -x[1]))
        return ends, stats
