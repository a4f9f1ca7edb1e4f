"""flash-linear-attention's gated delta rule in the simulator: its own host code and Triton kernels, with no GPU.

FLA's Python code runs unchanged on CPU tensors. Triton believes that it drives an A100 or an H100: every kernel that
FLA
launches is compiled to PTX for that target and run by the simulator, which counts. Torch operators between its
kernels are
listed as aten::*, with the sizes of their operands as bytes.

Autotuned kernels are not timed, so the configuration is chosen by a rule: the largest BK*BV (or BS), then num_warps
nearest to
--warps, then num_stages 3, 2, 4, 1; the first that fits the shared memory.
"""

import json
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"  # the Triton kernels, not TileLang or FlashQLA
os.environ["FLA_CACHE_RESULTS"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

from remora.testing import _ptxsim as ptxsim

from . import counters

#                name, shared memory per block (opt-in), multiprocessors
DEVICES = {80: ("NVIDIA A100-SXM4-80GB", 166912, 108), 90: ("NVIDIA H100 80GB HBM3", 232448, 132)}


class SimUtils:
    def __init__(self, arch: int):
        _, self.shared, self.multiprocessors = DEVICES[arch]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": self.multiprocessors, "warpSize": 32}


class SimDriver(DriverBase):
    """What Triton and FLA ask of a CUDA device."""

    def __init__(self, arch: int):
        self.target, self.utils = GPUTarget("cuda", arch, 32), SimUtils(arch)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError("nothing is timed")


class Launcher:
    """Runs a compiled kernel in the simulator; called as Triton calls its launcher."""

    rows: ClassVar[dict[str, counters.Counters]] = {}

    def __init__(self, kernel: Any, arch: int):
        self.kernel, self.arch = kernel, arch
        self.module = ptxsim.load_ptx(kernel.asm["ptx"])
        (self.entry,) = self.module.kernels()
        if kernel.metadata.global_scratch_size:
            raise NotImplementedError(f"{kernel.metadata.name} wants global scratch memory")
        self.runtime = [i for i, type_name in enumerate(kernel.src.signature.values()) if type_name != "constexpr"]

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: Any,
        function: Any,
        packed: Any,
        metadata: Any,
        enter: Any,
        leave: Any,
        *bound: Any,
    ) -> None:
        args = [bound[i] for i in self.runtime]
        args += [None] * (len(self.module.params(self.entry)) - len(args))  # Triton's scratch pointers
        m = self.kernel.metadata
        stats = self.module.launch(self.entry, (x, y, z), 32 * m.num_warps, args, smem_bytes=m.shared, arch=self.arch)
        self.rows[self.entry] = counters.add(self.rows.get(self.entry, {}), counters.flatten(stats))


def preference(config: Any, warps: int) -> tuple[float, int, int]:
    """Sort key of an autotuner configuration: see the module's text."""
    tile = math.prod(config.kwargs.get(n, 1) for n in ("BK", "BV", "BS"))
    stages = [3, 2, 4, 1]
    return -tile, abs(config.num_warps - warps), stages.index(config.num_stages) if config.num_stages in stages else 9


def install(arch: int, warps: int) -> None:
    """Makes Triton and FLA see one device of this architecture, run by the simulator."""
    name, shared, _ = DEVICES[arch]
    triton.runtime.driver.set_active(SimDriver(arch))
    torch.cuda.get_device_name = lambda device=None: name
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    torch.cuda.device_count = lambda: 1

    def init_handles(kernel: Any) -> None:
        if kernel.metadata.shared > shared:
            raise OutOfResources(kernel.metadata.shared, shared, "shared memory")
        kernel._run = Launcher(kernel, arch)

    def choose(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:
        for config in sorted(tuner.configs, key=lambda c: preference(c, warps)):
            compiled = tuner.fn.run(*tuner.nargs.values(), **{**kwargs, "warmup": True}, **config.all_kwargs())
            if compiled.metadata.shared <= shared:
                return [config]
        raise RuntimeError("no configuration fits the shared memory")

    CompiledKernel._init_handles = init_handles
    Autotuner.prune_configs = choose  # one configuration left: Triton then does not time any

    # FLA's operators without its layers and models, which need transformers.
    for part in ("fla.layers", "fla.models"):
        sys.modules.setdefault(part, None)  # type: ignore[arg-type]
    import fla.utils

    asked: Callable[..., bool] = fla.utils.check_shared_mem
    # FLA passes the tensor's device index, which is None on the CPU.
    fla.utils.check_shared_mem = lambda arch="none", index=0: asked(arch, index or 0)


def run(B: int, T: int, H: int, HV: int, D: int, arch: int, seed: int) -> dict[str, Any]:
    from fla import __version__
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    inputs, do = counters.make_inputs(B, T, H, HV, D, seed)
    rows: dict[str, dict[str, counters.Counters]] = {}

    def collect(phase: str, torch_rows: dict[str, counters.Counters]) -> None:
        rows[phase] = {**Launcher.rows, **torch_rows}
        Launcher.rows.clear()

    with counters.TorchOperators() as t:
        o: Tensor = chunk_gated_delta_rule(*inputs.values())[0]
    collect("forward", t.rows)
    with counters.TorchOperators() as t:
        grads = torch.autograd.grad(o, list(inputs.values()), do)
    collect("backward", t.rows)
    return counters.document(f"fla {__version__}", rows, counters.phases(inputs, do, o, grads), arch)


def main() -> int:
    ap = counters.arguments()
    ap.add_argument("--warps", type=int, default=4, help="preferred num_warps of autotuned kernels")
    o = ap.parse_args()
    warnings.filterwarnings("ignore")
    install(o.arch, o.warps)
    result = run(o.B, o.T, o.H, o.HV or o.H, o.D, o.arch, o.seed)
    if o.json:
        pathlib.Path(o.json).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
