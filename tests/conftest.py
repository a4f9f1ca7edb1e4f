"""Settings that must precede `import remora`, and what every test file may use.

REMORA_BACKEND=sim runs the same tests through the CUDA path: its kernels, built to PTX, on the simulated device.
REMORA_BACKEND=cuda runs them on the GPU of this machine.
"""

import os

os.environ["REMORA_POISON"] = "1"  # fresh outputs and workspaces hold NaN
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # workers of pytest -n share the cores

import pytest
import torch

import remora
from remora import _ext

SIM = _ext.HOST_BACKEND == "sim"
MMA = {"early": "fma", "late": "hardware"}
CHECKERS = {"memcheck": True, "racecheck": "on", "initcheck": True, "synccheck": True}


def pytest_report_header():
    return f"remora {remora.__version__}: CPU tensors run by the {_ext.HOST_BACKEND} backend, torch {torch.__version__}"


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only: about CPU kernels; not collected under another REMORA_BACKEND")
    config.addinivalue_line("markers", "sim_only: about the simulated device; collected under REMORA_BACKEND=sim only")


def pytest_collection_modifyitems(config, items):
    wrong = {"cpu": ["sim_only"], "sim": ["cpu_only"], "cuda": ["cpu_only", "sim_only"]}[_ext.HOST_BACKEND]
    dropped = [item for item in items if any(item.get_closest_marker(marker) for marker in wrong)]
    if dropped:
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def backend():
    """'cpu', 'sim' or 'cuda'."""
    return _ext.HOST_BACKEND


@pytest.fixture(params=["early", "late"] if SIM else ["native"])
def kernels(request):
    """Runs the test once on the CPU or the GPU. In the simulator, with every checker on: once with asynchronous copies
    done as early as the programming model allows and exact sums of tensor-core products, once as late and truncated.
    """
    if not SIM:
        yield request.param
        return
    from remora.testing import sim

    with sim.options(async_=request.param, mma=MMA[request.param], **CHECKERS):
        yield request.param
