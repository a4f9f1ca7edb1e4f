"""Routed sequences and routed steps of the gated delta rule, against gathered rows and single steps, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from gated_delta_rule_cases import CUDA_PATH

pytestmark = pytest.mark.usefixtures("kernels")
OP = torch.ops.remora
SCALE, L2NORM, V_FIRST = 0.3, True, False
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if CUDA_PATH else [torch.float64])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def token_inputs(dtype, B, T, H, HV, K, V, shared=False):
    """Tensors q, k, v, g, beta; with `shared`, the choices of a token share q, k and v through a batch stride of 0."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 1 if shared else B
    q, k = (F.normalize(torch.randn(rows, T, H, K), dim=-1).to(dtype).expand(B, -1, -1, -1) for _ in range(2))
    v = torch.randn(rows, T, HV, V).to(dtype).expand(B, -1, -1, -1)
    return [q, k, v, F.logsigmoid(torch.randn(B, T, HV) + 3).to(wide), torch.rand(B, T, HV).to(wide)]


class Routed:
    def __init__(self, dtype, B, T, H, HV, K, V, offsets, shared):
        torch.manual_seed(B * T)
        self.tensors = token_inputs(dtype, B, T, H, HV, K, V, shared)
        self.rows = torch.randperm(B * T).int()
        self.cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        wide = self.tensors[-1].dtype
        self.h0, self.dh = torch.randn(2, len(offsets) - 1, HV, K, V).to(wide)
        self.d_o = torch.randn(B, T, HV, V).to(dtype)

    def gathered(self, x):
        return x.flatten(0, 1)[self.rows.long()][None]

    def scattered(self, x):
        rows = torch.empty_like(x[0])
        rows[self.rows.long()] = x[0]
        return rows.view(*self.d_o.shape[:2], *x.shape[2:])

    def forward(self, tensors, rows, cu_seqlens=None):
        """o, final states, saved states."""
        offsets = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        return OP.gated_delta_rule_fwd(*tensors, self.h0, offsets, rows, SCALE, L2NORM, True, V_FIRST, True)

    def backward(self, tensors, saved, d_o, rows, cu_seqlens=None):
        """dq, dk, dv, dg, dbeta, dinitial_state."""
        offsets = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        states = self.h0, offsets, rows, saved, d_o, self.dh
        return OP.gated_delta_rule_bwd(*tensors, *states, SCALE, L2NORM, V_FIRST)


CASES = {
    "two choices": {"B": 2, "T": 100, "H": 1, "HV": 2, "K": 64, "V": 64, "offsets": (0, 40, 40, 170, 200)},
    "uncovered": {"B": 3, "T": 70, "H": 1, "HV": 1, "K": 40, "V": 72, "offsets": (9, 65, 65, 193)},
    "one choice, groups": {"B": 1, "T": 77, "H": 2, "HV": 4, "K": 64, "V": 40, "offsets": (0, 16, 17, 77)},
    "collapsed": {"B": 2, "T": 90, "H": 1, "HV": 1, "K": 64, "V": 64, "offsets": (0, 0, 180, 180)},
}
LONG = {"B": 2, "T": 1110, "H": 1, "HV": 1, "K": 16, "V": 16, "offsets": (20, 60, 2210)}  # on the GPU, in three spans
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@dtypes
@shared
@pytest.mark.parametrize("case", [*CASES.values(), LONG], ids=[*CASES, "long"])
def test_forward(case, dtype, shared):
    routed = Routed(dtype, shared=shared, **case)
    o, final, _ = routed.forward(routed.tensors, routed.rows)
    want, want_final, _ = routed.forward([routed.gathered(x) for x in routed.tensors], None)
    assert torch.equal(o, routed.scattered(want))
    assert torch.equal(final, want_final)


@dtypes
@shared
@cases
def test_backward(case, dtype, shared):
    routed = Routed(dtype, shared=shared, **case)
    saved = routed.forward(routed.tensors, routed.rows)[2]
    have = routed.backward(routed.tensors, saved, routed.d_o, routed.rows)
    gathered = [routed.gathered(x) for x in routed.tensors]
    want = routed.backward(gathered, routed.forward(gathered, None)[2], routed.gathered(routed.d_o), None)
    for name, a, b in zip(("dq", "dk", "dv", "dg", "dbeta"), have, want, strict=False):
        assert torch.equal(a, routed.scattered(b)), name
    assert torch.equal(have[5], want[5])


def wild(routed):
    """Rows far outside mean the first or the last one, offsets far outside the ends; and what they are clamped to."""
    total = routed.rows.numel()
    rows, offsets = routed.rows.clone(), routed.cu_seqlens.clone()
    rows[rows == 0], rows[rows == total - 1] = -(2**31), 2**31 - 1
    offsets[0], offsets[-1] = -(2**31), 2**31 - 1
    return rows, offsets, offsets.clamp(0, total)


@dtypes
@cases
def test_no_row_or_offset_reaches_outside(case, dtype):
    routed = Routed(dtype, shared=False, **case)
    rows, offsets, clamped = wild(routed)
    have = routed.forward(routed.tensors, rows, offsets)
    want = routed.forward(routed.tensors, routed.rows, clamped)
    for a, b in zip(have[:2], want[:2], strict=True):
        assert torch.equal(a, b)


@dtypes
@cases
def test_no_row_or_offset_reaches_outside_backward(case, dtype):
    routed = Routed(dtype, shared=False, **case)
    rows, offsets, clamped = wild(routed)
    saved = routed.forward(routed.tensors, routed.rows, clamped)[2]
    have = routed.backward(routed.tensors, saved, routed.d_o, rows, offsets)
    want = routed.backward(routed.tensors, saved, routed.d_o, routed.rows, clamped)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("pool", [False, True], ids=["every row", "pool"])
def test_step_with_memories(dtype, pool):
    """Choice b of sequence t steps row `state_indices[t] * num_memories + memories[b, t]`, or is skipped."""
    torch.manual_seed(7)
    B, T, H, HV, K, V, num_memories = 2, 5, 1, 2, 64, 40, 3
    tensors = token_inputs(dtype, B, T, H, HV, K, V)
    slots = [6, -1, 0, 7, 3] if pool else list(range(T))
    state_indices = torch.tensor(slots, dtype=torch.int32) if pool else None
    memories = torch.stack([torch.randperm(num_memories)[:B] for _ in range(T)], dim=1).int()
    memories[0, 2], memories[1, 4], memories[1, 0] = num_memories, -1, -(2**31)
    state = torch.randn((7 if pool else T) * num_memories, HV, K, V, dtype=tensors[-1].dtype)
    options = (None, None, SCALE, L2NORM, False, False, V_FIRST)
    routed, single = state.clone(), state.clone()
    o = OP.gated_delta_rule_step_(*tensors, routed, state_indices, memories, num_memories, *options)
    for b in range(B):
        for t in range(T):
            memory = int(memories[b, t])
            if not (0 <= slots[t] < state.shape[0] // num_memories and 0 <= memory < num_memories):
                assert not o[b, t].any()
                continue
            slot = torch.tensor([slots[t] * num_memories + memory], dtype=torch.int32)
            alone = OP.gated_delta_rule_step_(
                *(x[b : b + 1, t : t + 1].contiguous() for x in tensors), single, slot, None, 1, *options
            )
            assert torch.equal(o[b, t], alone[0, 0])
    assert torch.equal(routed, single)
