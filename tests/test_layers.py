"""The layers hold, and the check that says so sees each way of breaking them."""

from pathlib import Path

import check_layers
import pytest

ROOT = Path(__file__).resolve().parent.parent
OPERATOR = "csrc/recurrence/some_rule"


def test_the_tree_is_in_order():
    assert check_layers.check(ROOT) == []


def test_the_script_prints_and_fails(tmp_path, capsys):
    assert check_layers.main([str(tmp_path)]) == 0
    file = tmp_path / "csrc" / "common" / "a.h"
    file.parent.mkdir(parents=True)
    file.write_text("\n#include <torch/all.h>\n")
    assert check_layers.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("csrc/common/a.h:2: includes torch/all.h: ")


WRONG = {
    "torch in a kernel": (
        f"{OPERATOR}/fwd_kernel.cuh",
        "#include <torch/csrc/stable/tensor.h>",
        "torch headers belong",
    ),
    "torch in launch.cu": (f"{OPERATOR}/launch.cu", '#include "torch/stable.h"', "torch headers belong"),
    "ATen in cpu.cpp": (f"{OPERATOR}/cpu.cpp", "#include <ATen/ATen.h>", "torch headers belong"),
    "c10 in common": ("csrc/common/dtype.h", "  #  include <c10/util/Half.h>", "torch headers belong"),
    "torch in python": ("csrc/python/module.cpp", "#include <torch/all.h>", "torch headers belong"),
    "CuTe in params.h": (f"{OPERATOR}/params.h", "#include <cute/tensor.hpp>", "belong to kernels"),
    "CUTLASS in bind.cpp": (f"{OPERATOR}/bind.cpp", "#include <cutlass/cutlass.h>", "belong to kernels"),
    "CuTe in the CPU kernel": (f"{OPERATOR}/cpu_fwd.h", "#include <cute/layout.hpp>", "belong to kernels"),
    "CUDA in params.h": (f"{OPERATOR}/params.h", "#include <cuda_runtime.h>", "CUDA headers belong"),
    "a kernel header in heuristics.h": (f"{OPERATOR}/heuristics.h", '#include "common/mma.cuh"', "CUDA headers belong"),
    "CUDA in the CPU kernel": ("csrc/common/cpu/simd.h", "#include <cuda_bf16.h>", "CUDA headers belong"),
    "CUDA in bind.cpp": (f"{OPERATOR}/bind.cpp", "#include <cuda_runtime_api.h>", "CUDA headers belong"),
    "pybind11 in bind.cpp": (f"{OPERATOR}/bind.cpp", "#include <pybind11/pybind11.h>", "Python headers belong"),
    "an operator in common": ("csrc/common/mma.cuh", '#include "recurrence/some_rule/traits.h"', "only csrc/common"),
    "an operator in stable.h": ("csrc/torch/stable.h", '#include "recurrence/some_rule/params.h"', "no operator"),
    "another operator": (f"{OPERATOR}/launch.cu", '#include "recurrence/other_rule/params.h"', "its own folder"),
    "params.h in python": ("csrc/python/module.cpp", '#include "recurrence/some_rule/params.h"', "only heuristics.h"),
    "asm in a kernel": (f"{OPERATOR}/fwd_kernel.cuh", '\nasm volatile("bar.sync 0;");', "inline asm"),
    "asm in the CPU kernel": (f"{OPERATOR}/cpu_fwd.h", '__asm__("nop");', "inline asm"),
    "csrc in sim": ("sim/src/a.cpp", '#include "recurrence/some_rule/params.h"', "sim/ knows neither"),
    "torch in sim": ("sim/src/a.h", "#include <torch/all.h>", "sim/ knows neither"),
    "modules in ops": ("python/remora/ops/a.py", "from remora.modules import GatedDeltaNet", "lies below"),
    "models in modules": ("python/remora/modules/a.py", "import remora.models.language_model", "lies below"),
    "models in ops": ("python/remora/ops/b/a.py", "from remora import models", "lies below"),
    "train in models": ("python/remora/models/a.py", "def f():\n    from remora.train import Trainer", "lies below"),
    "relative": ("python/remora/ops/b/a.py", "from ...modules import GatedDeltaNet", "lies below"),
    "ops in the foundation": ("python/remora/_ext.py", "from remora.ops import chunk_delta_rule", "foundation"),
    "testing in modules": ("python/remora/modules/a.py", "from remora.testing import numeric", "tests and benchmarks"),
}


@pytest.mark.parametrize(("path", "text", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_breaks_them_is_refused(tmp_path, path, text, message):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text + "\n")
    (violation,) = check_layers.check(tmp_path)
    assert violation.path == path
    assert message in violation.message


RIGHT = {
    "torch in bind.cpp": (f"{OPERATOR}/bind.cpp", '#include "torch/stable.h"\n#include "common/dtype.h"'),
    "its own folder": (f"{OPERATOR}/bind.cpp", '#include "recurrence/some_rule/launch.h"'),
    "CuTe in a kernel": (f"{OPERATOR}/fwd_kernel.cuh", "#include <cute/tensor.hpp>"),
    "asm in common": ("csrc/common/mma.cuh", 'asm volatile("mma");'),
    "asm in a comment": (f"{OPERATOR}/fwd_kernel.cuh", "// asm (inline) lives in common\n/* asm(\n */"),
    "asm in a text": (f"{OPERATOR}/fwd_kernel.cuh", 'const char* text = "asm(";'),
    "heuristics in python": ("csrc/python/module.cpp", '#include "recurrence/some_rule/heuristics.h"'),
    "standard headers": ("csrc/common/cpu/simd.h", "#include <immintrin.h>\n#include <sys/mman.h>"),
    "ops in modules": ("python/remora/modules/a.py", "from remora.ops import chunk_gated_delta_rule"),
    "foundation": ("python/remora/ops/a.py", "from remora import _ext"),
    "testing of itself": ("python/remora/testing/a.py", "from remora.testing import sim\nfrom remora import ops"),
}


@pytest.mark.parametrize(("path", "text"), RIGHT.values(), ids=RIGHT.keys())
def test_what_respects_them_passes(tmp_path, path, text):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text + "\n")
    assert check_layers.check(tmp_path) == []
