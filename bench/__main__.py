"""python -m bench COMMAND; the commands are described in bench/README.md."""

import importlib
import sys

COMMANDS = {
    "cpu": "CPU times beside peers (measured)",
    "mom": "Mixture-of-Memories beside torch operators (measured); --counters: its kernels (simulated)",
    "bags": "CPU times of weighted bags beside peers (measured); in the simulator: their counters",
    "gpu": "times on this machine's GPU beside peers (measured)",
    "counters": "work counters of CUDA kernels in the simulator, beside flash-linear-attention's (simulated)",
    "memory": "CPU times of a memory layer and its optimizer beside torch (measured)",
    "chunks": "CPU times of chunk selection and attention to chosen blocks beside torch (measured)",
    "segment": "CPU times of segment pooling and vector quantization beside torch and a memory copy (measured)",
    "resources": "registers, spills and shared memory of every CUDA kernel",
    "pkm": "CPU times of product-key selection beside peers (measured)",
    "scan": "selective scan on the CPU beside jax (measured); --counters: its kernels (simulated)",
    "prefix": "CPU times of prefix attention beside torch (measured); in the simulator: its kernels",
    "model": "modelled times of CUDA kernels, beside flash-linear-attention's (modelled)",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m bench COMMAND [--help]\n\n" + "\n".join(f"  {n:10s} {t}" for n, t in COMMANDS.items()))
        return 0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2
    module = importlib.import_module(f"bench.{sys.argv[1]}")
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
