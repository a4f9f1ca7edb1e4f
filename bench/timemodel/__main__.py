"""Modelled time of a kernel:

    python -m bench.timemodel KERNEL.cubin [--function NAME] --grid 128 --block 256 --smem 98304 --params
    p,p,0,i64:32768,f32:0.1

Compile with `nvcc -cubin -arch=sm_90a`.
"""

import argparse

from . import kernel
from .machine import H100, H200, H200_FITTED


def dims(text: str) -> tuple[int, int, int]:
    v = [int(x) for x in text.split(",")]
    return tuple(v + [1] * (3 - len(v)))  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        prog="python -m bench.timemodel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("cubin")
    ap.add_argument("--function", help="part of the mangled name")
    ap.add_argument("--grid", type=dims, required=True, help="x[,y[,z]]")
    ap.add_argument("--block", type=dims, required=True)
    ap.add_argument("--smem", type=int, default=0, help="dynamic shared memory, bytes")
    ap.add_argument(
        "--params",
        default="",
        help="p: a pointer, 0: null, type:value (i32 i64 u32 u64 f32 f64), value*count; naturally aligned",
    )
    ap.add_argument("--params-hex", help="the parameters as a hexadecimal string instead")
    ap.add_argument(
        "--bytes",
        type=float,
        nargs=2,
        metavar=("LOAD", "STORE"),
        help="bytes of the whole launch beyond L1 (default: what the instructions name)",
    )
    ap.add_argument(
        "--footprint", type=float, nargs=2, metavar=("LOAD", "STORE"), help="distinct bytes of the whole launch"
    )
    ap.add_argument("--conflict", type=float, default=1.0, help="shared-memory wavefronts over the least possible")
    ap.add_argument(
        "--branch",
        action="append",
        default=[],
        metavar="ADDRESS=0|1",
        help="decide a branch whose condition is not known",
    )
    ap.add_argument(
        "--per", type=float, default=1.0, help="divide cycles and counts by this, for example the chunks of a CTA"
    )
    ap.add_argument("--machine", choices=["h200", "h100", "h200-fitted"], default="h200")
    o = ap.parse_args(argv)
    m = {"h200": H200, "h100": H100, "h200-fitted": H200_FITTED}[o.machine]
    k = kernel.load(o.cubin, o.function)
    decisions = {int(a, 0): b == "1" for a, _, b in (x.partition("=") for x in o.branch)}
    params = bytes.fromhex(o.params_hex) if o.params_hex else kernel.pack(o.params)
    launch = kernel.Launch(
        o.grid,
        o.block,
        params,
        o.smem,
        tuple(o.bytes) if o.bytes else None,
        tuple(o.footprint) if o.footprint else None,
        o.conflict,
        decisions,
    )
    print(kernel.report(m, k, launch, kernel.model(m, k, launch), o.per))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
