"""FlashAttention-2's forward kernels, whose times are published for an H100: another author's kernels on mma.sync, held
out of everything else here. The cubins are those inside of torch's CUDA library.

    python -m bench.timemodel.flash        extracts them, once, and prints modelled beside published
"""

import dataclasses
import importlib.util
import subprocess
import tempfile
from pathlib import Path

from . import kernel, sass
from .machine import H100, Machine

CUBINS = Path(__file__).resolve().parents[2] / "build" / "fa2"
SEQLEN, MODEL_DIM = 16384, 2048  # one sequence; heads of dimension D: MODEL_DIM / D
CLOCK = 1.755e9  # of the published runs, taken to be the boost clock

# FlashAttention-3 (arXiv 2407.08608), figure 5: fp16, forward, not causal, 16k tokens, H100 SXM5; bars read by others.
PUBLISHED_TFLOPS = {64: 324, 128: 370, 256: 326}
TILES = {64: (128, 128), 128: (128, 64), 256: (64, 64)}  # tokens of Q and of K, by head dimension; four warps each


def symbol(dim: int) -> str:
    """No dropout, mask, window or bias; whole tiles (those of sequences are told from partial ones up to D = 128)."""
    rows, columns = TILES[dim]
    flags = "".join(f"Lb{b:d}E" for b in (0, 0, 0, 0, dim <= 128, 1, 0, 0))
    tile = f"ILi{dim}ELi{rows}ELi{columns}ELi4E"
    traits = f"23Flash_fwd_kernel_traits{tile}Lb0ELb0EN7cutlass6half_tE19Flash_kernel_traits{tile}S3_EE"
    return f"flash_fwd_kernelI{traits}{flags}"


def available() -> bool:
    return all((CUBINS / f"{dim}.cubin").exists() for dim in TILES)


def extract() -> None:
    """From the torch that is installed; takes a minute or two, and 1 GB for that time."""
    spec = importlib.util.find_spec("torch")
    library = Path(spec.origin).parent / "lib" / "libtorch_cuda.so" if spec and spec.origin else None
    if library is None or not library.exists():
        raise FileNotFoundError("FlashAttention-2 comes from a torch with CUDA; this one has no libtorch_cuda.so")
    CUBINS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sass.TOOLS / "cuobjdump", "-xelf", "sm_90", library], cwd=folder, check=True, capture_output=True
        )
        for path in Path(folder).glob("*.sm_90.cubin"):
            data = path.read_bytes()
            for dim in TILES:
                if symbol(dim).encode() in data:
                    (CUBINS / f"{dim}.cubin").write_bytes(data)
    if not available():
        raise LookupError(f"{library} has no such kernels for sm_90: {[symbol(dim) for dim in TILES]}")


def launch(dim: int) -> kernel.Launch:
    """Flash_fwd_params as far as the kernel reads it; what follows is optional, and null."""
    rows, columns = TILES[dim]
    heads = MODEL_DIM // dim
    batch, row, head = SEQLEN * MODEL_DIM, MODEL_DIM, dim
    qkv = f"p*3,i64:{batch}*3,i64:{row}*3,i64:{head}*3,i32:{heads}*2,i32:1,i32:0"
    out = f"p,0,i64:{batch},i64:{row},i64:{head},0,p,0"
    sizes = ",".join(f"i32:{n}" for n in (1, SEQLEN, SEQLEN, 0, dim, SEQLEN, SEQLEN, dim, 0, SEQLEN))
    rest = f"f32:{dim**-0.5},f32:{dim**-0.5 * 1.4427},0*32"
    shared = 2 * dim * (rows + 2 * columns)
    tensor = 2.0 * SEQLEN * MODEL_DIM
    return kernel.Launch(
        (SEQLEN // rows, 1, heads), (128, 1, 1), kernel.pack(f"{qkv},{out},{sizes},{rest}"), shared,
        footprint=(3 * tensor, tensor),
    )  # fmt: skip


def fast_paths(code: list[sass.Inst]) -> dict[int, bool]:
    """The branches that jump over a call are taken: the calls are reciprocals of subnormal numbers."""
    calls = [n for n, i in enumerate(code) if i.base == "CALL"]
    over = [max(k for k, i in enumerate(code[:n]) if i.base == "BRA" and i.pred and i.target > n) for n in calls]
    return {code[k].addr: True for k in over}


def tflops(dim: int, machine: Machine = H100) -> float:
    flash = kernel.load(str(CUBINS / f"{dim}.cubin"), symbol(dim))
    decided = dataclasses.replace(launch(dim), decisions=fast_paths(flash.code))
    modelled = kernel.model(dataclasses.replace(machine, clock=CLOCK), flash, decided)
    return 4 * SEQLEN**2 * MODEL_DIM / modelled.seconds / 1e12


def main() -> None:
    if not available():
        extract()
    for dim, published in PUBLISHED_TFLOPS.items():
        ours = tflops(dim)
        error = published / ours - 1
        print(f"D = {dim}: published {published} TFLOP/s, modelled {ours:.0f}, error of the time {error:+.1%}")


if __name__ == "__main__":
    main()
