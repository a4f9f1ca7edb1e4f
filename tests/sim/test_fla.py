"""Kernels of flash-linear-attention, compiled ahead of time for sm_80 and sm_90."""

import functools
import importlib
import math

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

B, T, H, D, CHUNK = 1, 128, 4, 128, 64

# Module, kernel, pointer arguments, scalar arguments, constants. Every other argument is None, as if not given.
SHAPE = {"H": H, "HV": H, "STATE_V_FIRST": False, "K": D, "V": D, "BT": CHUNK, "IS_VARLEN": False}
KERNELS = {
    "chunk_h": (
        "fla.ops.common.chunk_h",
        "chunk_fwd_kernel_h",
        {"k": "bf16", "v": "bf16", "h": "bf16", "g": "fp32", "h0": "fp32", "ht": "fp32"},
        {"T": "i32"},
        dict(SHAPE, BS=CHUNK, BK=64, BV=64, USE_G=True, USE_G_GAMMA=False, USE_GK=False, USE_GV=False)
        | {"USE_INITIAL_STATE": True, "STORE_FINAL_STATE": True},
    ),
    "chunk_o": (
        "fla.ops.common.chunk_o",
        "chunk_fwd_kernel_o",
        {"q": "bf16", "k": "bf16", "v": "bf16", "h": "bf16", "g": "fp32", "o": "bf16"},
        {"scale": "fp32", "T": "i32"},
        dict(SHAPE, BK=64, BV=128, USE_G=True, USE_G_GAMMA=False),
    ),
}


@functools.cache
def compiled(name, cc):
    module, attribute, pointers, scalars, constants = KERNELS[name]
    fn = getattr(importlib.import_module(module), attribute)
    while not isinstance(fn, JITFunction):  # heuristics and autotuners wrap it
        fn = fn.fn
    missing = (set(pointers) | set(scalars)) - set(fn.arg_names)
    assert not missing, missing
    signature, known, attributes = {}, {}, {}
    for i, argument in enumerate(fn.arg_names):
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif argument in scalars:
            signature[argument] = scalars[argument]
        else:
            signature[argument] = "constexpr"
            known[argument] = constants.get(argument)
    source = triton.compiler.ASTSource(fn=fn, signature=signature, constexprs=known, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": 4, "num_stages": 2})
    return kernel, [a for a in fn.arg_names if a in pointers or a in scalars]


def launch(sim, name, cc, grid, values, **options):
    kernel, order = compiled(name, cc)
    module = sim.load_ptx(kernel.asm["ptx"])
    entry = module.kernels()[0]
    args = [values[a] for a in order]
    args += [0] * (len(module.params(entry)) - len(args))  # scratch pointers Triton appends
    return module.launch(entry, grid, 128, args, smem_bytes=kernel.metadata.shared, **options)


@pytest.mark.parametrize("mode", ["early", "late"])
@pytest.mark.parametrize("cc", [80, 90])
def test_chunk_h_and_o(sim, cc, mode):
    """Gated linear attention in chunks (states, then outputs) against the recurrence."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D).bfloat16() * 0.2 for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H)) * 0.1
    chunks = T // CHUNK
    in_chunk = g.view(B, chunks, CHUNK, H).cumsum(2).view(B, T, H) / math.log(2)  # the kernels use exp2
    h = torch.empty(B, chunks, H, D, D, dtype=torch.bfloat16)
    h0, ht = torch.randn(B, H, D, D) * 0.1, torch.empty(B, H, D, D)
    o = torch.empty(B, T, H, D, dtype=torch.bfloat16)
    values = {
        "q": q,
        "k": k,
        "v": v,
        "g": in_chunk.contiguous(),
        "h": h,
        "h0": h0,
        "ht": ht,
        "o": o,
        "scale": D**-0.5,
        "T": T,
    }
    checks = {"async": mode, "racecheck": 1, "synccheck": 1, "initcheck": 1}
    launch(sim, "chunk_h", cc, (D // 64, D // 64, B * H), values, **checks)
    launch(sim, "chunk_o", cc, (1, chunks, B * H), values, **checks)

    state, want = h0.clone(), torch.empty(B, T, H, D)
    for t in range(T):
        decay = g[:, t].exp()[..., None, None]
        state = state * decay + k[:, t].float()[..., :, None] * v[:, t].float()[..., None, :]
        want[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t].float(), state) * D**-0.5
    assert (ht - state).abs().max() < 0.02 * state.abs().max()
    assert (o.float() - want).abs().max() < 0.02 * want.abs().max()
