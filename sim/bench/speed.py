"""Interpreter speed on one core: thread instructions per second, mma per second."""

import numpy as np

from remora.testing.sim import ptx

LOOP = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out, .param .u32 n) {{
 .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .pred %p<4>; .reg .b64 %rd<4>;
 ld.param.u64 %rd1, [out];
 ld.param.u32 %r1, [n];
 mov.u32 %r2, %tid.x;
 cvt.rn.f32.u32 %f1, %r2;
 mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f3F000000; mov.f32 %f4, 0f00000000; mov.f32 %f5, 0f00000000;
 mov.f32 %f6, 0f00000000; mov.f32 %f7, 0f00000000;
 mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b32 %r14, 0; mov.b32 %r15, 0;
LOOP:
{body}
 sub.s32 %r1, %r1, 1;
 setp.ne.s32 %p1, %r1, 0;
 @%p1 bra LOOP;
 mad.wide.u32 %rd2, %r2, 4, %rd1;
 st.global.f32 [%rd2], %f4;
 st.global.f32 [%rd2], %f5;
 ret;
}}
"""
FP32 = "\n".join(f" fma.rn.f32 %f{4 + i % 4}, %f1, %f2, %f{4 + i % 4};" for i in range(32))
INT = "\n".join(
    f" mad.lo.s32 %r{10 + i % 4}, %r2, %r2, %r{10 + i % 4};\n xor.b32 %r14, %r{10 + i % 4}, %r14;" for i in range(16)
)
MMA = 8 * (
    " mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{%f4,%f5,%f6,%f7}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%f4,%f5,%f6,%f7};\n"
)


def measure(name, body, iterations, unit, per_iteration=None):
    """Best of three; `per_iteration` operations a warp and iteration, or all thread instructions."""
    out = np.zeros(1024, np.float32)
    module = ptx.load_ptx(LOOP.format(body=body))
    runs = [module.launch("k", 1, 128, [out, iterations], threads=1, memory_stats=0) for _ in range(4)]
    amount = runs[0]["thread_instructions"] if per_iteration is None else per_iteration * iterations * 4
    print(f"{name:28s} {amount / min(run['seconds'] for run in runs[1:]) / 1e6:10.2f} M {unit}/s")  # noqa: T201


measure("fp32 fma", FP32, 20000, "thread instructions")
measure("integer mad, xor", INT, 20000, "thread instructions")
measure("mma.m16n8k16 f16", MMA, 4000, "mma", 8)
