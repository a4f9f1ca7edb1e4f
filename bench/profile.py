"""For a machine with a GPU: commands for ncu and nsys, and the run that they look at.

python -m bench.profile [--mode fwd|bwd] [--T 32768] [--H 8]     runs the operator once inside the NVTX range
`profile_target`
"""

import argparse
import contextlib
from collections.abc import Iterator

import torch

COMMANDS = """\
On a machine with a GPU; the range `profile_target` is around the last run only, kernels are compiled with -lineinfo:

  ncu --nvtx --nvtx-include "profile_target/" --set full --import-source yes \\
      -o gated_delta_rule python -m bench.profile --mode fwd
  ncu --nvtx --nvtx-include "profile_target/" --set full --import-source yes \\
      -o gated_delta_rule_bwd python -m bench.profile --mode bwd
  nsys profile --trace cuda,nvtx --capture-range nvtx --nvtx-capture profile_target \\
      -o gated_delta_rule python -m bench.profile --mode bwd
"""


@contextlib.contextmanager
def profile_target() -> Iterator[None]:
    """The NVTX range of the profiled run; nothing but a name where there is no GPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range("profile_target"):
        yield
        torch.cuda.synchronize()


def main() -> int:
    ap = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ap.add_argument("--mode", choices=("fwd", "bwd"), default="fwd")
    ap.add_argument("--T", type=int, default=32768)
    ap.add_argument("--H", type=int, default=8)
    ap.add_argument("--D", type=int, default=128)
    ap.add_argument("--warmup", type=int, default=3)
    o = ap.parse_args()
    import remora.ops as ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (1, o.T, o.H, o.D)
    q, k = (
        torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(device, torch.bfloat16).requires_grad_()
        for _ in range(2)
    )
    v = torch.randn(shape).to(device, torch.bfloat16).requires_grad_()
    g = (-torch.rand(shape[:3])).to(device).requires_grad_()
    beta = torch.rand(shape[:3]).to(device).requires_grad_()
    for n in range(o.warmup + 1):
        last = n == o.warmup
        with profile_target() if last and o.mode == "fwd" else contextlib.nullcontext():
            out, _ = ops.chunk_gated_delta_rule(q, k, v, g, beta)
        if o.mode == "bwd":
            with profile_target() if last else contextlib.nullcontext():
                torch.autograd.grad(out, (q, k, v, g, beta), torch.ones_like(out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
