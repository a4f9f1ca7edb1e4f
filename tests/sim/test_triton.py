"""Triton kernels, compiled to PTX for sm_80 and sm_90 and run on CPU tensors."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def softmax_kernel(out, x, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + cols, mask=cols < n, other=-float("inf"))
    v = v - tl.max(v, axis=0)
    e = tl.exp(v)
    tl.store(out + row * stride + cols, e / tl.sum(e, axis=0), mask=cols < n)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, sam, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    rm, rn, rk = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    pa = a + rm[:, None] * sam + rk[None, :]
    pb = b + rk[:, None] * sbk + rn[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _k in range(0, K, BK):
        acc = tl.dot(tl.load(pa), tl.load(pb), acc)
        pa += BK
        pb += BK * sbk
    tl.store(c + rm[:, None] * scm + rn[None, :], acc)


@triton.jit
def cumsum_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.cumsum(tl.load(x + i), axis=0))


def compile_kernel(fn, signature, constexprs, cc, num_warps=4, num_stages=3):
    src = triton.compiler.ASTSource(
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        attrs={
            (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*") or t == "i32"
        },
    )
    return triton.compile(
        src, target=GPUTarget("cuda", cc, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )


def launch(sim, kernel, grid, args, **options):
    module = sim.load_ptx(kernel.asm["ptx"])
    name = module.kernels()[0]
    args = list(args) + [0] * (len(module.params(name)) - len(args))  # scratch pointers Triton appends
    return module.launch(name, grid, 32 * kernel.metadata.num_warps, args, smem_bytes=kernel.metadata.shared, **options)


@pytest.mark.parametrize("cc", [80, 90])
def test_softmax(sim, cc):
    x = torch.randn(7, 200)
    out = torch.empty_like(x)
    k = compile_kernel(
        softmax_kernel,
        {"out": "*fp32", "x": "*fp32", "stride": "i32", "n": "i32", "BLOCK": "constexpr"},
        {"BLOCK": 256},
        cc,
    )
    launch(sim, k, 7, [out, x, 200, 200])
    torch.testing.assert_close(out, torch.softmax(x, 1))


@pytest.mark.parametrize("cc", [80, 90])
def test_cumsum(sim, cc):
    x = torch.randn(512)
    out = torch.empty_like(x)
    k = compile_kernel(cumsum_kernel, {"x": "*fp32", "out": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 512}, cc)
    launch(sim, k, 1, [x, out])
    torch.testing.assert_close(out, torch.cumsum(x, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("cc", [80, 90])
def test_matmul(sim, cc, dtype, mode):
    torch_type = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    M, N, K = 128, 128, 128
    a, b = torch.randn(M, K).to(torch_type), torch.randn(K, N).to(torch_type)
    c = torch.zeros(M, N)
    sig = {
        "a": f"*{dtype}",
        "b": f"*{dtype}",
        "c": "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "sam": "i32",
        "sbk": "i32",
        "scm": "i32",
        "BM": "constexpr",
        "BN": "constexpr",
        "BK": "constexpr",
    }
    k = compile_kernel(matmul_kernel, sig, {"BM": 64, "BN": 64, "BK": 32}, cc)
    assert re.search("wgmma" if cc == 90 else "mma.sync", k.asm["ptx"])
    launch(sim, k, (2, 2), [a, b, c, M, N, K, K, N, N], **{"async": mode}, racecheck=1, synccheck=1)
    tolerance = 2e-2 if dtype == "fp32" else 1e-3
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=tolerance, atol=tolerance)
