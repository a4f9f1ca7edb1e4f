"""What an installed remora holds: libraries that need only what they may, and an import that never fails for a GPU."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import remora
from remora import _C, _ext, ops

PACKAGE = Path(remora.__file__).parent
SOURCES = Path(__file__).resolve().parent.parent / "python" / "remora"
LIBRARIES = {path.name: path for path in sorted(PACKAGE.glob("libremora_*.so"))}
libraries = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES.keys())
SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2",
          "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
NEEDED = {
    "libremora_cpu.so": {"libtorch_cpu.so"},
    "libremora_sim.so": {"libtorch_cpu.so"},
    "libremora_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.13"},
}


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(path):
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", path)))


def symbols(path, *options):
    return [line.split()[-1].split("@")[0] for line in output("nm", "-D", *options, path).splitlines() if line.strip()]


def test_the_libraries_are_there():
    build = _C.build_info()
    expected = {"libremora_cpu.so"}
    if not build["cuda_off_reason"]:
        expected.add("libremora_cuda.so")
    if build["simulator"]:
        expected.add("libremora_sim.so")
    assert set(LIBRARIES) == expected


@libraries
def test_a_library_needs_only_torch_and_the_system(library):
    assert needed(library) - SYSTEM == NEEDED[library.name]


@libraries
def test_no_python_symbol(library):
    assert [s for s in symbols(library, "--undefined-only") if s.startswith(("Py", "_Py", "THP"))] == []


@libraries
def test_torch_only_through_its_stable_abi(library):
    """Mangled names of at::, c10:: and torch:: are not stable; the C functions of the stable ABI are not mangled."""
    unstable = re.compile(r"^_Z\w*?(?:N2at|N3c10|N5torch|2at\d|3c10\d|5torch\d)")
    undefined = symbols(library, "--undefined-only")
    assert [s for s in undefined if unstable.match(s)] == []
    from_torch = [s for s in undefined if s.startswith(("aoti_torch_", "torch_"))]
    assert from_torch, "the library registers operators, so it must use some function of torch"


@libraries
def test_nothing_is_exported_by_accident(library):
    """The simulator's copy of the CUDA runtime must not answer for another library."""
    exported = symbols(library, "--defined-only")
    allowed = re.compile(r"^remora_sim_\w+$") if library.name == "libremora_sim.so" else re.compile(r"^$")
    # Statics of the C++ library and of torch's headers are weak templates that every user of them exports.
    own = [s for s in exported if not allowed.match(s) and not re.match(r"^_ZN?K?(S|V|T|9__gnu|St)|^_ZGV|^_ZT", s)]
    assert [s for s in own if re.search(r"cuda|ptxsim|remora", s)] == []


def test_no_path_of_the_build_machine():
    """In error messages. Line tables of device code do keep the path that nvcc was given."""
    assert str(SOURCES.parent.parent).encode() not in LIBRARIES["libremora_cpu.so"].read_bytes()


def test_the_runtime_path_is_relative():
    for library in LIBRARIES.values():
        paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", output("readelf", "-dW", library))
        assert paths == ["$ORIGIN/../torch/lib"]


def test_the_python_module_holds_no_operator():
    (module,) = PACKAGE.glob("_C.*.so")
    assert needed(module) <= SYSTEM
    assert not [s for s in symbols(module, "--undefined-only") if "torch" in s]


def test_every_source_file_is_installed():
    want = {path.relative_to(SOURCES) for path in SOURCES.rglob("*.py")}
    have = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert want == have
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_C.pyi").exists()


def test_nothing_but_the_package_is_installed():
    files = importlib.metadata.files("remora")
    tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
    assert {top for top in tops if not top.endswith(".dist-info") and not top.startswith("_")} == {"remora"}
    names = {file.name for file in files}
    if _C.build_info()["simulator"]:
        names.discard("libptxsim.a")  # the simulator's own tests link programs to it
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".h", ".o", ".a"))]


def test_metadata():
    meta = importlib.metadata.metadata("remora")
    assert meta["Version"] == remora.__version__ == _C.build_info()["version"]
    assert meta["License-Expression"] == "Apache-2.0"
    assert {"test", "dev"} <= set(meta.get_all("Provides-Extra"))
    assert any(re.match(r"torch\s*>=\s*2\.11", requirement) for requirement in meta.get_all("Requires-Dist"))


def test_info_says_what_is_loaded_and_why_not():
    info = remora.info()
    assert info.libraries[f"remora_{_ext.HOST_BACKEND}"].startswith(f"loaded from {PACKAGE}")
    for name, state in info.libraries.items():
        loaded = f"{name.removeprefix('remora_')}" in [k for k, library in _ext.LIBRARIES.items() if library.loaded]
        assert re.match("loaded from /" if loaded else r"not loaded: \S+", state)
    text = str(info)
    for value in (info.remora, info.torch, info.built_with_torch, info.cpu_capability, *info.libraries):
        assert value in text


def python(code, **environment):
    """A fresh interpreter that runs the installed package with NaN poisoning off."""
    environment = {**os.environ, **environment}
    environment.pop("REMORA_POISON", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_command_line():
    done = subprocess.run([sys.executable, "-m", "remora", "info"], check=True, capture_output=True, text=True)
    assert remora.__version__ in done.stdout
    assert "libremora_cpu" in done.stdout


@pytest.mark.cpu_only
@pytest.mark.parametrize("why", ["torch without CUDA", "a library that cannot be loaded", "another CUDA version"])
def test_import_without_working_cuda_kernels(why):
    code = {
        "torch without CUDA": "import torch; torch.version.cuda = None; expected = 'built without CUDA'",
        "another CUDA version": "import torch; torch.version.cuda = '12.8'; expected = 'has CUDA 12.8'",
        "a library that cannot be loaded": (
            "import torch; load = torch.ops.load_library\n"
            "def broken(path):\n"
            "    if 'cuda' in str(path): raise OSError('libcudart.so.13: cannot open shared object file')\n"
            "    load(path)\n"
            "torch.ops.load_library = broken; expected = 'cannot open shared object file'"
        ),
    }[why]
    off = _C.build_info()["cuda_off_reason"]
    done = python(
        f"{code}\n"
        "import remora, remora.ops\n"
        "reason = remora.info().libraries['remora_cuda']\n"
        f"assert reason.startswith('not loaded: ') and ({off!r} or expected) in reason, reason\n"
        "o, _ = remora.ops.chunk_delta_rule(*[torch.ones(1, 3, 1, 4)] * 3, torch.ones(1, 3, 1))\n"
        "assert o.shape == (1, 3, 1, 4)\n",
        REMORA_BACKEND="",
    )
    assert done.returncode == 0, done.stderr


def test_a_tensor_on_a_device_without_kernels_is_named(monkeypatch):
    missing = _ext.Library("remora_cuda", None, "torch is built without CUDA")
    monkeypatch.setitem(_ext.LIBRARIES, "cuda", missing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, beta = torch.empty(1, 3, 1, 4), torch.empty(1, 3, 1)
        x.fake_device = torch.device("cuda:0")
        with pytest.raises(ValueError, match=r"q is on device cuda:0, but .*not loaded: torch is built without CUDA"):
            ops.chunk_delta_rule(x, x, x, beta)
        x.fake_device = torch.device("xpu:0")
        with pytest.raises(ValueError, match="q is on device xpu:0; remora has kernels for cpu and cuda tensors"):
            ops.chunk_delta_rule(x, x, x, beta)


def test_an_unknown_backend_is_an_error():
    done = python("import remora", REMORA_BACKEND="tpu")
    assert done.returncode != 0
    assert "REMORA_BACKEND must be 'cpu', 'sim' or 'cuda', got 'tpu'" in done.stderr


@pytest.mark.cpu_only
def test_a_build_without_simulator_says_how_to_get_one():
    if _C.build_info()["simulator"]:
        done = python("import remora; print(remora.info().libraries['remora_sim'])", REMORA_BACKEND="sim")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("loaded from ")
    else:
        done = python("import remora", REMORA_BACKEND="sim")
        assert "REMORA_SIM=ON" in done.stderr


# Spilling 4 and 8 bytes for want of a leaner layout: that of unaligned tensors, and that of routed rows.
KNOWN_SPILLS = {
    "gated_delta_rule_fwd_kernel<__half, 128, false, false, false>",
    "gated_delta_rule_fwd_kernel<__half, 128, false, true, true>",
}


def test_no_other_kernel_spills():
    """Of the architectures that were compiled to machine code."""
    rows = _C.kernel_table()
    if any(arch.endswith("-real") for arch in _C.build_info()["cuda_architectures"]):
        assert rows
    spilling = {row["kernel"] for row in rows if row["spill_stores"] or row["spill_loads"]}
    assert [kernel for kernel in spilling if not any(known in kernel for known in KNOWN_SPILLS)] == []


@pytest.fixture
def build_backend(monkeypatch, tmp_path):
    """On a machine without a CUDA compiler, whose torch brought the runtime of CUDA 13.0."""
    monkeypatch.syspath_prepend(str(SOURCES.parent.parent / "cmake"))
    module = importlib.import_module("build_backend")
    monkeypatch.setattr(module, "DEFAULT_NVCC", str(tmp_path / "nowhere" / "nvcc"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(module.importlib.metadata, "version", {"nvidia-cuda-runtime": "13.0.96"}.__getitem__)
    return module


def cuda_requirements(module, **options):
    settings = {f"cmake.define.{name}": value for name, value in options.items()}
    hooks = (module.get_requires_for_build_wheel, module.get_requires_for_build_editable)
    wheel, editable = ([r for r in hook(settings) if r.startswith("nvidia-")] for hook in hooks)
    assert wheel == editable
    return wheel


def test_a_source_build_brings_the_compiler_that_is_missing(build_backend):
    found = cuda_requirements(build_backend)
    assert {r.split("==")[0] for r in found} == {
        f"nvidia-{name}" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl")
    }
    assert {r.split("==")[1] for r in found} == {"13.0.*"}


def test_the_compiler_is_of_the_release_of_the_runtime_that_torch_brought(build_backend, monkeypatch):
    monkeypatch.setattr(build_backend.importlib.metadata, "version", lambda name: "13.2.7")
    assert {r.split("==")[1] for r in cuda_requirements(build_backend)} == {"13.2.*"}

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build_backend.importlib.metadata, "version", missing)
    assert {r.split("==")[1] for r in cuda_requirements(build_backend)} == {"13.0.*"}


@pytest.mark.parametrize("where", ["PATH", "CUDACXX", "CUDA_HOME", "default"])
def test_a_compiler_of_the_machine_is_taken(build_backend, monkeypatch, tmp_path, where):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    if where == "default":
        monkeypatch.setattr(build_backend, "DEFAULT_NVCC", str(nvcc))
    else:
        monkeypatch.setenv(where, str({"PATH": nvcc.parent, "CUDACXX": nvcc, "CUDA_HOME": tmp_path}[where]))
    assert cuda_requirements(build_backend) == []


def test_a_build_without_kernels_needs_no_compiler(build_backend):
    assert cuda_requirements(build_backend, REMORA_CUDA="OFF") == []
    assert len(cuda_requirements(build_backend, REMORA_CUDA="OFF", REMORA_SIM="ON")) == 5


SMOKE = """
import torch, remora, remora.ops as ops
torch.manual_seed(0)
q, k, v = (torch.nn.functional.normalize(torch.randn(1, 70, 2, 32), dim=-1).requires_grad_() for _ in range(3))
g, beta = -torch.rand(1, 70, 2), torch.rand(1, 70, 2)
o, state = ops.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
grads = torch.autograd.grad(o.square().sum() + state.square().sum(), (q, k, v))
assert all(x.isfinite().all() for x in (o, state, *grads))
print(torch.__version__, " ".join(f"{x.double().norm():.6f}" for x in (o, state, *grads)))
print(remora.info().libraries["remora_cuda"])
"""


@pytest.mark.cpu_only
@pytest.mark.slow
def test_the_same_libraries_on_another_torch(tmp_path):
    """The installed package as it is, in a fresh environment with an older torch: the same numbers."""
    version = "2.13.0"
    assert not torch.__version__.startswith(version)
    here = python(SMOKE, REMORA_BACKEND="")
    assert here.returncode == 0, here.stderr
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    other = tmp_path / "venv" / "bin" / "python"
    subprocess.run([other, "-m", "pip", "install", "--quiet", "numpy", f"torch=={version}"], check=True)
    site = Path(output(other, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "remora").symlink_to(PACKAGE)
    (metadata,) = PACKAGE.parent.glob("remora-*.dist-info")
    (site / metadata.name).symlink_to(metadata)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "REMORA_POISON")}
    environment["REMORA_BACKEND"] = ""
    done = subprocess.run([other, "-c", SMOKE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(version)
    assert done.stdout.split()[1:6] == here.stdout.split()[1:6]
