"""Routed sequences and routed steps of the gated delta rule, against gathered rows and single steps, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from gated_delta_rule_cases import SIM

pytestmark = pytest.mark.usefixtures("kernels")
OP = torch.ops.remora
SCALE, L2NORM, V_FIRST = 0.3, True, False
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if SIM else [torch.float64])
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

    def run(self, tensors, d_o, rows, cu_seqlens=None):
        cu_seqlens = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        options = (SCALE, L2NORM)
        o, final, saved = OP.gated_delta_rule_fwd(*tensors, self.h0, cu_seqlens, rows, *options, True, V_FIRST, True)
        grads = OP.gated_delta_rule_bwd(*tensors, self.h0, cu_seqlens, rows, saved, d_o, self.dh, *options, V_FIRST)
        return [o, *grads[:5]], [final, grads[5]]


CASES = {
    "two choices": {"B": 2, "T": 100, "H": 1, "HV": 2, "K": 64, "V": 64, "offsets": (0, 40, 40, 170, 200)},
    "uncovered": {"B": 3, "T": 70, "H": 1, "HV": 1, "K": 40, "V": 72, "offsets": (9, 65, 65, 193)},
    "one choice, groups": {"B": 1, "T": 77, "H": 2, "HV": 4, "K": 64, "V": 40, "offsets": (0, 16, 17, 77)},
    "collapsed": {"B": 2, "T": 90, "H": 1, "HV": 1, "K": 64, "V": 64, "offsets": (0, 0, 180, 180)},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.cpu_only
@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@cases
def test_rows(case, dtype, shared):
    routed = Routed(dtype, shared=shared, **case)
    have, have_states = routed.run(routed.tensors, routed.d_o, routed.rows)
    want, want_states = routed.run([routed.gathered(x) for x in routed.tensors], routed.gathered(routed.d_o), None)
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), have, want, strict=True):
        assert torch.equal(a, routed.scattered(b)), name
    for name, a, b in zip(("final_state", "dinitial_state"), have_states, want_states, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.cpu_only
@dtypes
@cases
def test_no_row_or_offset_reaches_outside(case, dtype):
    """Wild rows mean the first or the last one, wild offsets the ends."""
    routed = Routed(dtype, shared=False, **case)
    total = routed.rows.numel()
    rows, offsets = routed.rows.clone(), routed.cu_seqlens.clone()
    rows[rows == 0], rows[rows == total - 1] = -(2**31), 2**31 - 1
    offsets[0], offsets[-1] = -(2**31), 2**31 - 1
    have = routed.run(routed.tensors, routed.d_o, rows, offsets)
    want = routed.run(routed.tensors, routed.d_o, routed.rows, offsets.clamp(0, total))
    for a, b in zip([*have[0], *have[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only
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


@pytest.mark.sim_only
def test_cuda_refuses_rows_and_memories():
    x = token_inputs(torch.float32, 2, 4, 1, 1, 64, 64)
    rows, offsets = torch.arange(8, dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="does not take rows"):
        OP.gated_delta_rule_fwd(*x, None, offsets, rows, SCALE, L2NORM, False, V_FIRST, False)
    state = torch.zeros(8, 1, 64, 64)
    memories = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="does not take memories"):
        OP.gated_delta_rule_step_(*x, state, None, memories, 2, None, None, SCALE, L2NORM, False, False, V_FIRST)
