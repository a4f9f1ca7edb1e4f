"""Compiles flash-linear-attention's gated-delta-rule kernels, every autotuner configuration, to cubins for sm_90; no
GPU.

Wants the versions of the published benchmark, which may lie in a folder of their own:

    pip install --no-deps --target DIR triton==3.5.1 fla-core==0.5.1
    PYTHONPATH=DIR python -m bench.timemodel.fla_cubins

Writes <kernel>.<configuration>.{cubin,json} to $REMORA_FLA_CUBINS (default ~/.cache/remora/fla_cubins).
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

warnings.filterwarnings("ignore")
for part in ("fla.layers", "fla.models"):
    sys.modules[part] = None  # type: ignore[assignment]
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

NV = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OUT = pathlib.Path(os.environ.get("REMORA_FLA_CUBINS", pathlib.Path.home() / ".cache/remora/fla_cubins"))
bf, f32, i32, i64 = "*bf16", "*fp32", "i32", "*i32"
H, HV, K, V, BT = 16, 32, 128, 128, 64


def unwrap(k):
    while not isinstance(k, JITFunction):
        k = k.fn
    return k


def build(name, kernel, args, consts, cfg, warps, stages):
    tag = ".".join([name] + [f"{k}{v}" for k, v in cfg.items()] + [f"w{warps}", f"s{stages}"])
    if (OUT / f"{tag}.json").exists():
        return
    jit = unwrap(kernel)
    unknown = (set(args) | set(consts) | set(cfg)) - set(jit.arg_names)
    assert not unknown, (name, unknown)
    sig, cons, attrs = {}, {}, {}
    for i, n in enumerate(jit.arg_names):
        if n in args:
            sig[n] = args[n]
            if args[n].startswith("*"):
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            sig[n] = "constexpr"
            cons[n] = {**consts, **cfg}.get(n)
    source = ASTSource(fn=jit, signature=sig, constexprs=cons, attrs=attrs)
    ck = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    cubin = OUT / f"{tag}.cubin"
    cubin.write_bytes(ck.asm["cubin"])
    text = subprocess.run([NV / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    m = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    meta = {
        "kernel": name,
        "tag": tag,
        "cfg": cfg,
        "warps": warps,
        "stages": stages,
        "smem": ck.metadata.shared,
        "regs": int(m[1]),
        "stack": int(m[2]),
    }
    (OUT / f"{tag}.json").write_text(json.dumps(meta))
    print(
        f"{tag}: {meta['regs']} registers, {meta['stack']} bytes of stack, {meta['smem']} of shared memory", flush=True
    )


def forward():
    import fla.ops.gated_delta_rule.chunk_fwd as chunk_fwd
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_kernel_h_blockdim64
    from fla.ops.common.chunk_o import chunk_fwd_kernel_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_kkt_solve_kernel
    from fla.ops.gated_delta_rule.wy_fast import recompute_w_u_fwd_kernel

    chunk_fwd.SOLVE_TRIL_DOT_PRECISION = triton.language.constexpr("tf32")  # what FLA chooses on sm_80 and later
    from fla.ops.utils.cumsum import chunk_local_cumsum_scalar_kernel

    idx = {"cu_seqlens": i64, "chunk_indices": i64, "T": i32}
    for w, s, bv in itertools.product([2, 4], [2, 3, 4], [32, 64]):
        yield (
            "h",
            chunk_gated_delta_rule_fwd_kernel_h_blockdim64,
            {
                "k": bf,
                "v": bf,
                "w": bf,
                "v_new": bf,
                "g": f32,
                "h": bf,
                "h0": f32,
                "ht": f32,
                "cu_seqlens": i64,
                "chunk_offsets": i64,
                "T": i32,
            },
            {
                "H": H,
                "HV": HV,
                "K": K,
                "V": V,
                "BT": BT,
                "USE_G": True,
                "USE_GK": False,
                "USE_INITIAL_STATE": True,
                "STORE_FINAL_STATE": True,
                "SAVE_NEW_VALUE": True,
                "STATE_V_FIRST": False,
                "IS_VARLEN": True,
            },
            {"BV": bv},
            w,
            s,
        )
    for bk, w in itertools.product([32, 64], [1, 2, 4]):
        yield (
            "kkt",
            chunk_gated_delta_rule_fwd_kkt_solve_kernel,
            dict(k=bf, g=f32, beta=f32, A=bf, **idx),
            {"H": H, "HV": HV, "K": K, "BT": BT, "BC": 16, "USE_G": True, "IS_VARLEN": True},
            {"BK": bk},
            w,
            3,
        )
    for w, s in itertools.product([2, 4, 8], [2, 3, 4]):
        yield (
            "wu",
            recompute_w_u_fwd_kernel,
            dict(k=bf, v=bf, beta=f32, w=bf, u=bf, A=bf, g=f32, **idx),
            {"H": H, "HV": HV, "K": K, "V": V, "BT": BT, "BK": 64, "BV": 64, "USE_G": True, "IS_VARLEN": True},
            {},
            w,
            s,
        )
    for b, w in ((128, 8), (64, 4), (32, 2)):
        yield (
            "o",
            chunk_fwd_kernel_o,
            dict(q=bf, k=bf, v=bf, h=bf, g=f32, o=bf, scale="fp32", **idx),
            {
                "H": H,
                "HV": HV,
                "K": K,
                "V": V,
                "BT": BT,
                "USE_G": True,
                "USE_G_GAMMA": False,
                "STATE_V_FIRST": False,
                "IS_VARLEN": True,
            },
            {"BK": b, "BV": b},
            w,
            3,
        )
    for w in (1, 2, 4, 8):
        yield (
            "cumsum",
            chunk_local_cumsum_scalar_kernel,
            dict(s=f32, o=f32, scale="fp32", **idx),
            {"B": 1, "H": HV, "BT": BT, "REVERSE": False, "HAS_SCALE": True, "IS_VARLEN": True, "HEAD_FIRST": False},
            {},
            w,
            3,
        )


def backward():
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64
    from fla.ops.common.chunk_o import chunk_bwd_kernel_dqkwg, chunk_bwd_kernel_dv_local
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd_kernel

    idx = {"cu_seqlens": i64, "chunk_indices": i64, "T": i32}
    for w, s, bv in itertools.product([2, 4], [2, 3, 4], [32, 64]):
        yield (
            "dhu",
            chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64,
            {
                "q": bf,
                "k": bf,
                "w": bf,
                "g": f32,
                "dht": f32,
                "dh0": f32,
                "do": bf,
                "dh": bf,
                "dv": bf,
                "dv2": bf,
                "cu_seqlens": i64,
                "chunk_offsets": i64,
                "scale": "fp32",
                "T": i32,
            },
            {
                "H": H,
                "HV": HV,
                "K": K,
                "V": V,
                "BT": BT,
                "USE_G": True,
                "USE_GK": False,
                "USE_INITIAL_STATE": True,
                "USE_FINAL_STATE_GRADIENT": True,
                "STATE_V_FIRST": False,
                "IS_VARLEN": True,
            },
            {"BV": bv},
            w,
            s,
        )
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "BT": BT, "BK": 128, "BV": 128, "USE_G": True, "IS_VARLEN": True}
    for w, s in itertools.product([2, 4], [2, 3, 4]):
        yield (
            "dqkwg",
            chunk_bwd_kernel_dqkwg,
            dict(q=bf, k=bf, v=bf, g=f32, h=bf, do=bf, dh=bf, dq=bf, dk=bf, dw=bf, dv=bf, dg=f32, scale="fp32", **idx),
            {**sizes, "B": 1, "USE_G_GAMMA": False, "USE_DW": True, "STATE_V_FIRST": False},
            {},
            w,
            s,
        )
        yield (
            "dvl",
            chunk_bwd_kernel_dv_local,
            dict(q=bf, k=bf, g=f32, do=bf, dv=bf, scale="fp32", **idx),
            {**sizes, "USE_G_GAMMA": False, "USE_A": False},
            {},
            w,
            s,
        )
    for w, s in itertools.product([2, 4], [2, 3, 4]):
        yield (
            "wyb",
            prepare_wy_repr_bwd_kernel,
            dict(k=bf, v=bf, beta=f32, g=f32, A=bf, dw=bf, du=bf, dk=bf, dv=bf, db=f32, dg=f32, **idx),
            {"H": H, "HV": HV, "K": K, "V": V, "BT": BT, "BK": 64, "BV": 64, "USE_G": True, "IS_VARLEN": True},
            {},
            w,
            s,
        )


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for job in itertools.chain(forward(), backward()):
        build(*job)
