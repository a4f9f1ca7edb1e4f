"""Values, gradients and promises of linear attention with scalar decay, against the step-by-step oracle in float64."""
# ruff: noqa: E501 (a row of a table is one line)

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gated_delta_rule_cases import CUDA_PATH, in_every_dtype, results
from simple_gla_cases import Case, check, make_inputs, varlen
from torch.library import opcheck

from remora import ops
from remora.ops.recurrence.simple_gla.naive import naive_simple_gla
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")
OP = torch.ops.remora
CHUNK, RECURRENT = ops.chunk_simple_gla, ops.fused_recurrent_simple_gla

# A base case, then one factor per case.
CASES = {
    "base": Case(),
    **{f"T={T}": Case(T=T, state=1.0) for T in (1, 2, 15, 17, 63, 64, 65, 127, 129)},
    **{f"K={K}": Case(K=K, T=70) for K in (1, 5, 40, 100, 128)},
    **{f"V={V}": Case(V=V, T=70) for V in (1, 5, 40, 100, 128)},
    "K=V=128": Case(K=128, V=128, T=70, HV=1),
    "B=3": Case(B=3, T=33),
    "H=2,HV=6": Case(H=2, HV=6, T=40, K=32, V=32),
    "state=30": Case(state=30.0),
    "v_first": Case(state=1.0, v_first=True, V=40),
    "no final state": Case(final=False, state=1.0),
    "scale": Case(scale=-0.75),
    "T=0": Case(T=0, state=1.0),
    "B=0": Case(B=0, state=1.0),
    **{f"layout {layout}": Case(layout=layout, K=72, T=40, H=2, HV=4)
       for layout in ("head first", "padded", "strided rows", "broadcast")},
    "ragged": varlen(1, 65, 2, 0, 40, state=1.0),
    "only empty": varlen(0, 0, state=1.0),
    "int64": varlen(50, 30, offsets=torch.int64),
    "v_first, groups": varlen(33, 0, 70, H=2, HV=4, V=40, state=1.0, v_first=True),
    "past a saved state": varlen(20, 150, 3, state=1.0),
    **{f"gate {gate}": Case(gate=gate, state=1.0)
       for gate in ("none", "zero", "model", "strong", "reset", "many resets", "-inf")},
    "gate mixed": Case(gate="mixed", HV=4, state=1.0),
    "gamma alone": Case(gate="none", gamma=True, state=1.0),
    "gamma too": Case(gamma=True, state=1.0),
}  # fmt: skip
LARGE = {
    "T=1000": Case(T=1000, B=2, H=2, HV=4, state=1.0),
    "T=1000, no gate": Case(T=1000, gate="none", state=1.0),
    "T=300, gate zero": Case(T=300, gate="zero", state=1.0),
    "K=V=256": Case(K=256, V=256, H=2, HV=2, T=70),
    "K=250, V=201": Case(K=250, V=201, T=150, layout="padded"),
    "ragged": varlen(1, 300, 0, 129, 128, 256, 7, H=2, HV=4, state=1.0),
}
# Every case runs in bfloat16, on the CPU in float32 too; these in every dtype, and token by token.
CORE = ("base", "T=1", "T=129", "K=40", "V=100", "v_first", "layout padded", "ragged", "gate model", "gate strong",
        "gate many resets", "gamma too")  # fmt: skip
EVERY = in_every_dtype(CASES if CUDA_PATH else {**CASES, **{f"large {name}": case for name, case in LARGE.items()}})
TOKENWISE = {name: case for name, case in EVERY.items() if name.rsplit("-", 1)[0] in CORE}
WHOLE = TOKENWISE | {name: case for name, case in EVERY.items()
                     if case.dtype in ((torch.bfloat16,) if CUDA_PATH else (torch.bfloat16, torch.float32))}  # fmt: skip


def over(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


functions = pytest.mark.parametrize("function", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@over(WHOLE)
def test_chunk(case):
    check(CHUNK, case)


@over(TOKENWISE)
def test_fused_recurrent(case):
    check(RECURRENT, case)


# ------------------------------------------------------------------------------------------------------- to the bit


def part(inputs, rows, batch=slice(None), options=None, state=None):
    """The call on some of the tokens."""
    tensors = {name: inputs.tensors[name].detach()[batch, rows] for name in ("q", "k", "v", "g")}
    whole = inputs.tensors["initial_state"]
    tensors |= {"g_gamma": None, "initial_state": whole.detach()[batch] if state is None else state}
    for x in tensors.values():
        if x is not None:
            x.requires_grad_()
    return replace(
        inputs, tensors=tensors, options={**inputs.options, **(options or {})}, d_o=inputs.d_o[batch, rows],
        d_final=inputs.d_final[batch],
    )  # fmt: skip


@functions
@dtypes
def test_three_runs_agree(function, dtype):
    case = Case(T=130 if CUDA_PATH else 700, dtype=dtype, HV=1 if CUDA_PATH else 4, state=1.0)
    first = results(function, make_inputs(case))
    for _ in range(2):
        for name, value in results(function, make_inputs(case)).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.cpu_only
@dtypes
@pytest.mark.parametrize(
    "case",
    [Case(T=700, HV=1, K=128, V=128, state=1.0), varlen(1, 300, 0, 129, 270, H=1, HV=3, K=100, state=1.0)],
    ids=["one head", "packed"],
)
def test_the_number_of_threads_does_not_matter(dtype, case):
    case = replace(case, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(CHUNK, make_inputs(case))
        for number in (2, 3, 8):
            torch.set_num_threads(number)
            for name, value in results(CHUNK, make_inputs(case)).items():
                assert torch.equal(value, first[name]), name
    finally:
        torch.set_num_threads(threads)


@functions
@dtypes
def test_a_sequence_alone_and_packed(function, dtype):
    """On the CPU, a head is cut by columns in one of the two calls and not in the other."""
    lengths = (70, 80) if CUDA_PATH else (1, 64, 0, 300, 129, 70)
    inputs = make_inputs(varlen(*lengths, dtype=dtype, H=1, HV=2, K=100, V=128, state=1.0))
    packed = results(function, inputs)
    begin = 0
    for n, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        begin += length
        alone = part(inputs, rows, options={"cu_seqlens": None}, state=inputs.tensors["initial_state"].detach()[n:][:1])
        alone.d_final = inputs.d_final[n : n + 1]
        single = results(function, alone)
        for name, value in single.items():
            want = packed[name][n : n + 1] if "state" in name else packed[name][:, rows]
            assert torch.equal(value, want), (name, n)


BAD = {"other": 0.5, "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "huge": 3e38}


@functions
@dtypes
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("at", [1, 37, 64] if CUDA_PATH else [1, 15, 64, 129])
def test_outputs_do_not_see_later_tokens(function, dtype, bad, at):
    inputs = make_inputs(Case(T=140, dtype=dtype, HV=1, state=1.0), requires_grad=False)
    clean, _ = inputs.call(function)
    for name in ("q", "k", "v", "g"):
        x = inputs.tensors[name]
        largest = torch.finfo(x.dtype).max
        value = -bad if name == "g" and bad in (torch.inf, 3e38, 0.5) else bad
        x[:, at:] = value if value != value or abs(value) == torch.inf else max(-largest, min(value, largest))
    dirty, _ = inputs.call(function)
    assert torch.equal(dirty[:, :at], clean[:, :at])


@functions
def test_nan_reaches_what_depends_on_it(function):
    inputs = make_inputs(Case(T=100), requires_grad=False)
    inputs.tensors["v"][:, 50] = torch.nan
    o, final_state = inputs.call(function)
    assert o[:, 50:].isnan().all()
    assert not o[:, :50].isnan().any()
    assert final_state.isnan().all()


@dtypes
def test_a_bad_token_stays_in_its_sequence(dtype):
    inputs = make_inputs(varlen(60, 30, 0, 40, dtype=dtype, state=1.0))
    clean = results(CHUNK, inputs)
    with torch.no_grad():
        inputs.tensors["v"][:, 75] = torch.inf
    for name, value in results(CHUNK, inputs).items():
        kept = [0, 2, 3] if "state" in name else [*range(60), *range(90, 130)]
        dim = 0 if "state" in name else 1
        index = torch.tensor(kept)
        assert torch.equal(value.index_select(dim, index), clean[name].index_select(dim, index)), name


@functions
@dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k first", "v first"])
def test_state_handed_over_at_an_aligned_cut_is_exact(function, dtype, v_first):
    inputs = make_inputs(Case(T=150, dtype=dtype, state=1.0, v_first=v_first, V=40), requires_grad=False)
    o, final_state = inputs.call(function)
    first, state = part(inputs, slice(0, 128)).call(function)
    second, last = part(inputs, slice(128, None), state=state).call(function)
    assert torch.equal(torch.cat([first, second], dim=1), o)
    assert torch.equal(last, final_state)


def test_gradient_of_constant_decay_alone_and_without():
    """Without a gradient of the gate, nothing else changes."""
    inputs = make_inputs(Case(T=70, dtype=torch.bfloat16, state=1.0))
    every = results(CHUNK, inputs)
    inputs.tensors["g"] = inputs.tensors["g"].detach()
    for name, value in results(CHUNK, inputs).items():
        assert torch.equal(value, every[name]), name


# ---------------------------------------------------------------------------------------------------- routed, steps


def routed(dtype, B, T, H, HV, K, V, offsets):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = [torch.randn(1, T, H, K).to(dtype).expand(B, -1, -1, -1), torch.randn(B, T, H, K).to(dtype),
         torch.randn(B, T, HV, V).to(dtype), F.logsigmoid(torch.randn(B, T, HV) + 3).to(wide)]  # fmt: skip
    rows, offsets = torch.randperm(B * T).int(), torch.tensor(offsets, dtype=torch.int32)
    h0, dh = torch.randn(2, len(offsets) - 1, HV, K, V).to(wide)
    return x, torch.randn(B, T, HV, V).to(dtype), rows, offsets, h0, dh


ROUTED = {
    "two choices": {"B": 2, "T": 100, "H": 1, "HV": 2, "K": 64, "V": 64, "offsets": (0, 40, 40, 170, 200)},
    "uncovered": {"B": 3, "T": 70, "H": 1, "HV": 1, "K": 40, "V": 72, "offsets": (9, 65, 65, 193)},
    "one choice, groups": {"B": 1, "T": 77, "H": 2, "HV": 4, "K": 64, "V": 40, "offsets": (0, 16, 17, 77)},
    "collapsed": {"B": 2, "T": 90, "H": 1, "HV": 1, "K": 64, "V": 64, "offsets": (0, 0, 180, 180)},
}


@dtypes
@pytest.mark.parametrize("case", ROUTED.values(), ids=ROUTED.keys())
def test_rows(case, dtype):
    """Routed rows are gathered rows, to the bit; wild rows and offsets mean the nearest ones allowed."""
    x, d_o, rows, offsets, h0, dh = routed(dtype, **case)
    total = rows.numel()

    def run(x, d_o, rows, offsets):
        o, final, saved = OP.simple_gla_fwd(*x, h0, offsets, rows, 0.3, True, False, True)
        *grads, d_state = OP.simple_gla_bwd(*x, h0, offsets, rows, saved, d_o, dh, 0.3, False, True)
        return [o, *grads], [final, d_state]

    gathered = [y.flatten(0, 1)[rows.long()][None] for y in (*x, d_o)]
    want, want_states = run(gathered[:4], gathered[4], None, offsets)
    wild_rows, wild_offsets = rows.clone(), offsets.clone()
    wild_rows[rows == 0], wild_rows[rows == total - 1] = -(2**31), 2**31 - 1
    if offsets[0] == 0:
        wild_offsets[0] = -(2**31)
    for some_rows, some_offsets in ((rows, offsets), (wild_rows, wild_offsets)):
        have, have_states = run(x, d_o, some_rows, some_offsets)
        for name, a, b in zip(("o", "dq", "dk", "dv", "dg"), have, want, strict=True):
            back = torch.empty_like(b[0])
            back[rows.long()] = b[0]
            assert torch.equal(a, back.view_as(a)), name
        for a, b in zip(have_states, want_states, strict=True):
            assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k first", "v first"])
@pytest.mark.parametrize(("K", "V", "T"), [(64, 64, 1), (40, 100, 1), (128, 33, 1), (17, 40, 5)])
def test_step(dtype, v_first, K, V, T):
    """A pool of states in place: some slots worked on, some sequences idle."""
    case = Case(B=3, T=T, HV=2, K=K, V=V, dtype=dtype, state=1.0, v_first=v_first, gamma=True)
    inputs = make_inputs(case, requires_grad=False)
    x = {name: inputs.tensors[name] for name in ("q", "k", "v", "g", "g_gamma")}
    pool = torch.randn(5, *case.state_shape[1:])
    before = pool.clone()
    o = ops.simple_gla_step(**x, state=pool, state_indices=torch.tensor([4, -1, 1]), state_v_first=v_first)
    y = {name: t.double() if name == "g_gamma" else t[[0, 2]].double() for name, t in x.items()}
    want, final = naive_simple_gla(
        **y, initial_state=before[[4, 1]].double(), output_final_state=True, state_v_first=v_first
    )
    rule, _ = naive_simple_gla(
        **{n: t if n == "g_gamma" else t[[0, 2]] for n, t in x.items()}, initial_state=before[[4, 1]],
        state_v_first=v_first,
    )  # fmt: skip
    assert_accurate(o[[0, 2]], want, rule.to(dtype), "o", dtype=dtype)
    assert not o[1].any()
    torch.testing.assert_close(pool[[4, 1]].double(), final, rtol=1e-5, atol=1e-5)
    assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]])


@dtypes
@pytest.mark.parametrize("pool", [False, True], ids=["every row", "pool"])
def test_step_with_memories(dtype, pool):
    """Choice b of sequence t steps row `state_indices[t] * num_memories + memories[b, t]`, or is skipped."""
    B, T, HV, K, V, num_memories = 2, 5, 2, 64, 40, 3
    x = [torch.randn(B, T, 1, K).to(dtype), torch.randn(B, T, 1, K).to(dtype), torch.randn(B, T, HV, V).to(dtype),
         -torch.rand(B, T, HV)]  # fmt: skip
    slots = [6, -1, 0, 7, 3] if pool else list(range(T))
    memories = torch.stack([torch.randperm(num_memories)[:B] for _ in range(T)], dim=1).int()
    memories[0, 2], memories[1, 4], memories[1, 0] = num_memories, -1, -(2**31)
    state = torch.randn((7 if pool else T) * num_memories, HV, K, V)
    chosen, single = state.clone(), state.clone()
    indices = torch.tensor(slots, dtype=torch.int32) if pool else None
    o = OP.simple_gla_step_(*x, chosen, indices, memories, num_memories, 0.3, False)
    for b in range(B):
        for t in range(T):
            memory = int(memories[b, t])
            if not (0 <= slots[t] < state.shape[0] // num_memories and 0 <= memory < num_memories):
                assert not o[b, t].any()
                continue
            slot = torch.tensor([slots[t] * num_memories + memory], dtype=torch.int32)
            token = (y[b : b + 1, t : t + 1].contiguous() for y in x)
            assert torch.equal(o[b, t], OP.simple_gla_step_(*token, single, slot, None, 1, 0.3, False)[0, 0])
    assert torch.equal(chosen, single)


def test_prefill_then_steps():
    inputs = make_inputs(Case(T=40, state=1.0, gate="model"), requires_grad=False)
    o, final_state = inputs.call(CHUNK)
    first, state = part(inputs, slice(0, 35)).call(CHUNK)
    state, steps = state.detach(), [first.detach()]
    for t in range(35, 40):
        x = {name: inputs.tensors[name][:, t : t + 1] for name in ("q", "k", "v", "g")}
        steps.append(ops.simple_gla_step(**x, state=state))
    torch.testing.assert_close(torch.cat(steps, dim=1), o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final_state, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- instances


def instance(HV=4, T=50, K=32, V=24):
    q, k = torch.rand(1, T, HV, K), torch.rand(1, T, HV, K)
    return [q.requires_grad_(), k.requires_grad_(), torch.randn(1, T, HV, V, requires_grad=True)]


def same(have, want, inputs):
    d = torch.randn_like(have)
    torch.testing.assert_close(have, want.to(have.dtype), rtol=2e-5, atol=2e-5)
    grads = (torch.autograd.grad(x, inputs, d.to(x.dtype), retain_graph=True) for x in (have, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_linear_attention_and_its_normalisation():
    x = instance()
    q, k, v = x
    weights = (torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[3] ** -0.5).tril()
    plain = torch.einsum("bhij,bjhv->bihv", weights, v)
    same(ops.chunk_linear_attn(*x, normalize=False)[0], plain, x)
    same(ops.chunk_linear_attn(*x)[0], plain / weights.sum(-1).transpose(1, 2)[..., None], x)
    with torch.no_grad():
        o, (state, z) = ops.chunk_linear_attn(*x, output_final_state=True)
        assert z.shape == (1, 1, 4, 32)
        torch.testing.assert_close(z[:, 0], k.sum(1))
        first, middle = ops.chunk_linear_attn(*(y[:, :20] for y in x), output_final_state=True)
        second, last = ops.chunk_linear_attn(*(y[:, 20:] for y in x), initial_state=middle, output_final_state=True)
        torch.testing.assert_close(torch.cat([first, second], 1), o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[0], state)
        torch.testing.assert_close(last[1], z)
        assert ops.chunk_linear_attn(*x)[1] is None


def test_retention():
    x = instance()
    g = (1 - 2.0 ** (-5.0 - torch.arange(4.0))).log().expand(1, 50, 4)
    same(ops.chunk_retention(*x)[0], naive_simple_gla(*x, g)[0], x)


def test_lightning_attention():
    x = instance()
    g = (-(8 / 4) * (1 - 1 / 3) * torch.arange(4.0)).expand(1, 50, 4)
    same(ops.chunk_lightning_attn(*x, layer_idx=1, num_layers=3)[0], naive_simple_gla(*x, g)[0], x)


def test_mamba2():
    """State space duality: A, dt, B, C, x and D of Mamba-2 in terms of q, k, v and g."""
    L, heads, groups, P, N = 40, 4, 2, 16, 32
    x, B, C = torch.randn(1, L, heads, P), torch.randn(1, L, groups, N), torch.randn(1, L, groups, N)
    dt, A, D = torch.rand(1, L, heads), -torch.rand(heads) - 0.5, torch.randn(heads)
    leaves = [t.requires_grad_() for t in (x, B, C, dt, A, D)]
    v = x * dt[..., None]
    y, state = ops.chunk_simple_gla(C, B, v, A * dt, scale=1.0, output_final_state=True, state_v_first=True)
    y = y + x * D[:, None]
    h, rows = torch.zeros(1, heads, P, N), []
    for t in range(L):
        repeated = [m[:, t].repeat_interleave(heads // groups, dim=1) for m in (B, C)]
        update = (dt[:, t, :, None] * x[:, t])[..., None] * repeated[0][..., None, :]
        h = h * (dt[:, t] * A).exp()[..., None, None] + update
        rows.append((h * repeated[1][..., None, :]).sum(-1) + D[:, None] * x[:, t])
    want = torch.stack(rows, dim=1)
    d = torch.randn_like(y)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, h, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(y, leaves, d), torch.autograd.grad(want, leaves, d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# ---------------------------------------------------------------------------------------------- as a torch operator


SMALL = {
    "plain": Case(B=2, T=5, K=3, V=4),
    "state": Case(T=6, H=2, HV=4, K=4, V=3, state=1.0),
    "v first": Case(T=4, K=3, V=4, state=1.0, v_first=True),
    "packed": varlen(3, 0, 5, 1, K=3, V=2, state=1.0),
    "gamma too": Case(T=5, K=3, V=3, gate="model", gamma=True, state=1.0),
    "no gate": Case(T=6, K=3, V=4, gate="none", state=1.0),
    "two chunks": Case(T=20, HV=1, K=2, V=2, state=1.0),
    "two units": Case(T=3, HV=1, K=33, V=2, state=1.0),
    "past a saved state": Case(T=131, HV=1, K=1, V=1, state=1.0),
}


@pytest.mark.cpu_only
@functions
@over(SMALL)
def test_gradcheck(function, case):
    inputs = make_inputs(replace(case, dtype=torch.float64))
    leaves = {name: x for name, x in inputs.tensors.items() if x is not None}

    def call(*tensors):
        tensors = dict(zip(leaves, tensors, strict=True))
        return replace(inputs, tensors={**inputs.tensors, **tensors}).call(function)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(requires_grad):
    inputs = make_inputs(Case(B=2, T=5, H=1, HV=2, K=16, V=24, state=1.0), requires_grad)
    x = [inputs.tensors[name] for name in ("q", "k", "v", "g")]
    h0 = inputs.tensors["initial_state"]
    opcheck(OP.simple_gla_fwd.default, (*x, h0, None, None, 0.3, True, False, True))
    opcheck(OP.simple_gla_recurrent_fwd.default, (*x, h0, None, 0.3, True, False))
    if not requires_grad:
        saved = OP.simple_gla_fwd(*x, h0, None, None, 0.3, True, False, True)[2]
        opcheck(OP.simple_gla_bwd.default, (*x, h0, None, None, saved, inputs.d_o, inputs.d_final, 0.3, False, True))
        opcheck(OP.simple_gla_step_.default, (*x, h0, None, None, 1, 0.3, False))


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@over({"state": Case(T=40, dtype=torch.bfloat16, state=1.0, gamma=True), "packed": varlen(10, 0, 20, state=1.0)})
def test_compile(function, dynamic, case):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = results(function, make_inputs(case))
    for name, value in results(compiled, make_inputs(case)).items():
        assert torch.equal(value, eager[name]), name


def test_compile_step():
    torch._dynamo.reset()
    inputs = make_inputs(Case(B=2, T=1, state=1.0), requires_grad=False)
    x = {name: inputs.tensors[name] for name in ("q", "k", "v", "g")}
    states = inputs.tensors["initial_state"].clone(), inputs.tensors["initial_state"].clone()
    compiled = torch.compile(ops.simple_gla_step, fullgraph=True, backend="aot_eager")
    slots = torch.tensor([1, 0])
    eager = ops.simple_gla_step(**x, state=states[0], state_indices=slots)
    assert torch.equal(compiled(**x, state=states[1], state_indices=slots), eager)
    assert torch.equal(*states)


def test_autocast_lowers_q_k_v_only():
    inputs = make_inputs(Case(T=40, state=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        o, final_state = inputs.call(CHUNK)
    low = {name: inputs.tensors[name].bfloat16() for name in ("q", "k", "v")}
    direct, direct_state = replace(inputs, tensors={**inputs.tensors, **low}).call(CHUNK)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, direct)
    assert torch.equal(final_state, direct_state)


def test_meta_tensors_have_the_right_shapes():
    inputs = make_inputs(Case(T=20, H=2, HV=4, K=16, V=24, state=1.0, dtype=torch.bfloat16), requires_grad=False)
    meta = {name: None if x is None else x.to("meta") for name, x in inputs.tensors.items()}
    for function in (CHUNK, RECURRENT):
        pairs = zip(replace(inputs, tensors=meta).call(function), inputs.call(function), strict=True)
        for have, want in pairs:
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())


def test_a_second_derivative_is_refused():
    inputs = make_inputs(Case(T=5))
    o, _ = inputs.call(CHUNK)
    (dq,) = torch.autograd.grad(o.sum(), inputs.tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), inputs.tensors["v"])


# ---------------------------------------------------------------------------------------------------------- refusals


def arguments(**changes):
    x = make_inputs(Case(B=2, T=5, H=2, HV=4, K=16, V=24, state=1.0, gamma=True), requires_grad=False).tensors
    return {**x, **changes}


X = torch.zeros
WRONG = {
    "q not a tensor": ({"q": [1.0]}, TypeError, r"q must be a tensor, got list"),
    "g not a tensor": ({"g": 0.5}, TypeError, r"g must be a tensor, got float"),
    "gamma not a tensor": ({"g_gamma": 0.5}, TypeError, r"g_gamma must be a tensor, got float"),
    "q of integers": ({"q": X(2, 5, 2, 16).long()}, TypeError, r"q must have dtype .*got torch.int64"),
    "k of another dtype": ({"k": X(2, 5, 2, 16).half()}, TypeError, r"k must have dtype torch.float32, got torch.float16"),
    "g of integers": ({"g": X(2, 5, 4).int()}, TypeError, r"g must have dtype .*got torch.int32"),
    "gamma of integers": ({"g_gamma": X(4).int()}, TypeError, r"g_gamma must have dtype .*got torch.int32"),
    "state of bfloat16": ({"initial_state": X(2, 4, 16, 24).bfloat16()}, TypeError, r"initial_state must have dtype torch.float32"),
    "q of rank 3": ({"q": X(2, 5, 16)}, ValueError, r"q must have shape \[B, T, H, K\], got \[2, 5, 16\]"),
    "k of other T": ({"k": X(2, 6, 2, 16)}, ValueError, r"k must have shape .*got \[2, 6, 2, 16\]"),
    "v of other B": ({"v": X(1, 5, 4, 24)}, ValueError, r"v must have shape .*got \[1, 5, 4, 24\]"),
    "HV no multiple": ({"v": X(2, 5, 3, 24)}, ValueError, r"must be a multiple of the heads of q \(H = 2\), got 3"),
    "K too large": ({"q": X(2, 5, 2, 257), "k": X(2, 5, 2, 257)}, ValueError, r"head size K .*1\.\.\.256, got 257"),
    "V too large": ({"v": X(2, 5, 4, 300)}, ValueError, r"head size V of v must be in 1\.\.\.256, got 300"),
    "g of q's heads": ({"g": X(2, 5, 2)}, ValueError, r"g must have shape \[B, T, HV\] = \[2, 5, 4\], got \[2, 5, 2\]"),
    "gamma of q's heads": ({"g_gamma": X(2)}, ValueError, r"g_gamma must have shape \[HV\] = \[4\], got \[2\]"),
    "state transposed": ({"initial_state": X(2, 4, 24, 16)}, ValueError, r"initial_state must have shape \[N, HV, K, V\]"),
    "state not transposed": ({"state_v_first": True}, ValueError, r"initial_state must have shape \[N, HV, V, K\]"),
    "offsets of a batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens needs inputs with B = 1 .*got B = 2"),
    "v elsewhere": ({"v": X(2, 5, 4, 24, device="meta")}, ValueError, r"v must be on the device of q \(cpu\), got meta"),
    "gamma elsewhere": ({"g_gamma": X(4, device="meta")}, ValueError, r"g_gamma must be on the device of q"),
}  # fmt: skip


@functions
@pytest.mark.parametrize(("changes", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(function, changes, kind, message):
    with pytest.raises(kind, match=message):
        function(**arguments(**changes))


STEP = {
    "state missing rows": ({"state": X(1, 4, 16, 24)}, ValueError, r"state must have shape .*\[2, 4, 16, 24\]"),
    "state with gaps": ({"state": X(2, 4, 16, 48)[..., ::2]}, ValueError, r"state must be contiguous"),
    "indices of floats": ({"state_indices": X(2)}, TypeError, r"state_indices must have dtype torch.int32"),
    "indices of another N": ({"state_indices": X(3).int()}, ValueError, r"state_indices must have shape \[N\] = \[2\], got \[3\]"),
    "a gradient": ({"q": X(2, 5, 2, 16, requires_grad=True)}, ValueError, r"simple_gla_step has no gradient"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), STEP.values(), ids=STEP.keys())
def test_wrong_arguments_of_a_step(changes, kind, message):
    x = arguments()
    x["state"] = x.pop("initial_state")
    with pytest.raises(kind, match=message):
        ops.simple_gla_step(**{**x, **changes})


def test_wrong_arguments_of_the_instances():
    q, k, v = (t.detach() for t in instance())
    with pytest.raises(ValueError, match="reverse must be False"):
        RECURRENT(q, k, v, reverse=True)
    with pytest.raises(ValueError, match=r"layer_idx \(num_layers = 3\) must be in 0\.\.\.2, got 3"):
        ops.chunk_lightning_attn(q, k, v, 3, 3)
    state = torch.zeros(1, 4, 32, 24)
    with pytest.raises(ValueError, match="initial_state must be a pair"):
        ops.chunk_linear_attn(q, k, v, initial_state=state)
    with pytest.raises(ValueError, match="initial_state must be one tensor, got a tuple"):
        ops.chunk_linear_attn(q, k, v, initial_state=(state, state), normalize=False)
    with pytest.raises(ValueError, match=r"key sum of initial_state must have shape \[N, 1, H, K\]"):
        ops.chunk_linear_attn(q, k, v, initial_state=(state, torch.zeros(1, 4, 32)))


@pytest.mark.sim_only
def test_what_the_cuda_kernels_refuse():
    small = arguments()
    q, k, v = torch.zeros(1, 3, 1, 160), torch.zeros(1, 3, 1, 160), torch.zeros(1, 3, 1, 160)
    with pytest.raises(ValueError, match=r"on CUDA, the head size K of q and k must be in 1\.\.\.128, got 160"):
        CHUNK(q, k, v)
    with pytest.raises(
        ValueError, match=r"on CUDA with gradients, the head size V of v must be in 1\.\.\.128, got 160"
    ):
        CHUNK(q[..., :64], k[..., :64], v.requires_grad_())
    with pytest.raises(TypeError, match=r"q must have dtype torch.float32 or torch.bfloat16 or torch.float16"):
        CHUNK(**{name: x.double() for name, x in small.items()})
