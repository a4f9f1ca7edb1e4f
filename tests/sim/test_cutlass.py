"""CUTLASS's CuTe tutorials: code nobody here wrote."""

import pytest
from simtest import HERE, build_cuda, cutlass_root, run

pytestmark = pytest.mark.slow

TUTORIALS = [
    ("sgemm_1.cu", "compute_80", "float", (128, 128, 32), "NT"),
    ("sgemm_2.cu", "compute_80", "float", (128, 128, 32), "TN"),
    ("sgemm_sm80.cu", "compute_80", "float", (128, 128, 64), "NT"),
    ("sgemm_sm80.cu", "compute_80", "cute::half_t", (128, 128, 128), "TN"),
    ("hopper/wgmma_sm90.cu", "compute_90a", "cute::half_t", (128, 128, 128), "NT"),
    ("hopper/wgmma_sm90.cu", "compute_90a", "cute::half_t", (256, 128, 192), "TN"),
    ("hopper/wgmma_tma_sm90.cu", "compute_90a", "cute::half_t", (256, 128, 128), "NT"),
    ("hopper/wgmma_tma_sm90.cu", "compute_90a", "cute::half_t", (256, 128, 256), "TN"),
]


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize(("name", "arch", "element", "size", "trans"), TUTORIALS)
def test_tutorial(name, arch, element, size, trans, mode):
    root = cutlass_root()
    source = root / "examples/cute/tutorial" / name
    flags = [
        f"-I{root}/include",
        f"-I{root}/tools/util/include",
        f"-I{root}/examples/common",
        "--expt-relaxed-constexpr",
        f'-DTUTORIAL="{source}"',
        f"-DELEMENT={element}",
    ]
    exe = build_cuda(HERE / "cuda/cute_tutorial.cu", arch, flags)
    done = run(exe, *size, *trans, **{"async": mode}, memcheck=1, synccheck=1, racecheck=1, initcheck=1)
    assert done.returncode == 0, done.stdout + done.stderr
