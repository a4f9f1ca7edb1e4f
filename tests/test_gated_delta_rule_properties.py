"""Promises to the bit: reproducible, causal, independent of neighbours and threads; and how pieces join."""

from dataclasses import replace

import pytest
import torch
from gated_delta_rule_cases import CUDA_PATH, Case, make_inputs, references, results, varlen

from remora import ops
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")

FUNCTIONS = {"chunk": ops.chunk_gated_delta_rule, "recurrent": ops.fused_recurrent_gated_delta_rule}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16} | ({} if CUDA_PATH else {"float16": torch.float16})
LONG = 200 if CUDA_PATH else 700
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def assert_same(actual, expected, names=None):
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), name


def tokens(inputs, rows, batch=slice(None), keep_state=True):
    """The call on some of the tokens."""
    tensors = {name: None if x is None else x.detach()[batch, rows] for name, x in inputs.tensors.items()
               if name != "initial_state"}  # fmt: skip
    state = inputs.tensors["initial_state"]
    tensors["initial_state"] = state.detach()[batch] if keep_state and state is not None else None
    for x in tensors.values():
        if x is not None:
            x.requires_grad_()
    return replace(inputs, tensors=tensors, d_o=inputs.d_o[batch, rows], d_final=inputs.d_final[batch])


@functions
@dtypes
def test_three_runs_agree(function, dtype):
    case = (
        Case(T=LONG, B=2, H=2, HV=4, dtype=dtype, state=1.0) if not CUDA_PATH else Case(T=130, dtype=dtype, state=1.0)
    )
    first = results(function, make_inputs(case))
    for _ in range(2):
        assert_same(results(function, make_inputs(case)), first)


@pytest.mark.cpu_only
@functions
@dtypes
@pytest.mark.parametrize(
    "case",
    [Case(T=LONG, B=2, H=2, HV=4, state=1.0), varlen(1, 300, 0, 129, 270, HV=3, state=1.0)],
    ids=["batch", "packed"],
)
def test_the_number_of_threads_does_not_matter(function, dtype, case):
    case = replace(case, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(function, make_inputs(case))
        for number in (2, 3, 8):
            torch.set_num_threads(number)
            assert_same(results(function, make_inputs(case)), first)
    finally:
        torch.set_num_threads(threads)


@functions
@dtypes
def test_a_sequence_alone_in_a_batch_and_packed(function, dtype):
    lengths = (70, 130) if CUDA_PATH else (1, 64, 0, 300, 129, 70)
    case = varlen(*lengths, dtype=dtype, H=1, HV=2, state=1.0)
    inputs = make_inputs(case)
    packed = results(function, inputs)
    begin = 0
    for n, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        alone = tokens(inputs, rows)
        alone.options = {**inputs.options, "cu_seqlens": None}
        alone.tensors["initial_state"] = inputs.tensors["initial_state"].detach()[n : n + 1].requires_grad_()
        alone.d_final = inputs.d_final[n : n + 1]
        single = results(function, alone)
        for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
            assert torch.equal(single[name], packed[name][:, rows]), (name, n)
        for name in ("final_state", "dinitial_state"):
            assert torch.equal(single[name][0], packed[name][n]), (name, n)

        twice = replace(
            alone,
            tensors={
                name: torch.cat(
                    [x.detach().flip(1) if name != "initial_state" else -x.detach(), x.detach()]
                ).requires_grad_()
                for name, x in alone.tensors.items()
            },
            d_o=torch.cat([-alone.d_o, alone.d_o]),
            d_final=torch.cat([-alone.d_final, alone.d_final]),
        )
        batch = results(function, twice)
        for name, value in single.items():
            assert torch.equal(value[0], batch[name][1]), (name, n)
        begin += length


@dtypes
def test_a_long_sequence_alone_in_a_batch_and_packed(dtype):
    """Few heads: on a GPU it is cut into spans, wherever it stands."""
    lengths = 40, 2100, 100
    inputs = make_inputs(varlen(*lengths, dtype=dtype, HV=1, K=16, V=16, state=1.0), requires_grad=False)
    packed, final = inputs.call(ops.chunk_gated_delta_rule)
    rows = slice(lengths[0], lengths[0] + lengths[1])
    alone = tokens(inputs, rows)
    alone.options = {**inputs.options, "cu_seqlens": None}
    alone.tensors["initial_state"] = inputs.tensors["initial_state"][1:2]
    single, single_final = alone.call(ops.chunk_gated_delta_rule)
    assert torch.equal(single, packed[:, rows])
    assert torch.equal(single_final[0], final[1])
    twice = replace(alone, tensors={name: torch.cat([x.flip(1), x]) for name, x in alone.tensors.items()})
    batch, batch_final = twice.call(ops.chunk_gated_delta_rule)
    assert torch.equal(batch[1], single[0])
    assert torch.equal(batch_final[1], single_final[0])


@functions
@dtypes
def test_more_heads_do_not_change_a_head(function, dtype):
    case = Case(T=130, H=3, HV=3, dtype=dtype, state=1.0)
    inputs = make_inputs(case)
    every = results(function, inputs)
    one = replace(
        inputs,
        tensors={
            name: x.detach()[:, 1:2].requires_grad_()
            if name == "initial_state"
            else x.detach()[:, :, 1:2].requires_grad_()
            for name, x in inputs.tensors.items()
        },
        d_o=inputs.d_o[:, :, 1:2],
        d_final=inputs.d_final[:, 1:2],
    )
    for name, value in results(function, one).items():
        part = every[name][:, 1:2] if "state" in name else every[name][:, :, 1:2]
        assert torch.equal(value, part), name


BAD = {"other": 0.5, "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "huge": 3e38}


def spoil(x, value):
    largest = torch.finfo(x.dtype).max
    x.fill_(value if value != value or abs(value) == torch.inf else max(-largest, min(value, largest)))


@functions
@dtypes
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("at", [1, 37, 64, 127] if CUDA_PATH else [1, 15, 16, 37, 63, 64, 127, 128, 129])
def test_outputs_do_not_see_later_tokens(function, dtype, bad, at):
    case = Case(T=140, dtype=dtype, state=1.0)
    inputs = make_inputs(case, requires_grad=False)
    clean, _ = inputs.call(function)
    spoilt = {
        "q": bad, "k": bad, "v": bad, "beta": bad,
        "g": -bad if bad in (torch.inf, 3e38, 0.5) else bad,
    }  # fmt: skip
    for name, value in spoilt.items():
        spoil(inputs.tensors[name][:, at:], value)
    dirty, _ = inputs.call(function)
    assert torch.equal(dirty[:, :at], clean[:, :at])


@dtypes
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_a_bad_token_stays_in_its_sequence(dtype, bad, name):
    """Values and gradients of the neighbours of a sequence that overflows."""
    case = varlen(60, 30, 0, 40, dtype=dtype, state=1.0)
    inputs = make_inputs(case)
    clean = results(ops.chunk_gated_delta_rule, inputs)
    with torch.no_grad():
        spoil(inputs.tensors[name][:, 75], bad)
    dirty = results(ops.chunk_gated_delta_rule, inputs)
    for out, value in clean.items():
        for rows in (slice(0, 60), slice(90, None)):
            if "state" in out:
                rows = slice(0, 1) if rows.start == 0 else slice(2, None)
                assert torch.equal(dirty[out][rows], value[rows]), out
            else:
                assert torch.equal(dirty[out][:, rows], value[:, rows]), out


@dtypes
def test_nan_reaches_what_depends_on_it(dtype):
    case = Case(T=100, dtype=dtype)
    inputs = make_inputs(case, requires_grad=False)
    inputs.tensors["v"][:, 50] = torch.nan
    for function in FUNCTIONS.values():
        o, final_state = inputs.call(function)
        assert o[:, 50:].isnan().all()
        assert not o[:, :50].isnan().any()
        assert final_state.isnan().all()


def join(function, inputs, cut):
    """The sequence in two calls, the state handed over."""
    first = tokens(inputs, slice(0, cut))
    o1, state = first.call(function, output_final_state=True)
    second = tokens(inputs, slice(cut, None))
    second.tensors["initial_state"] = state
    o2, final_state = second.call(function)
    return torch.cat([o1, o2], dim=1), final_state


@functions
@dtypes
@pytest.mark.parametrize("gate", ["weak", "model", "reset"])
@pytest.mark.parametrize("v_first", [False, True], ids=["k first", "v first"])
def test_state_handed_over_at_an_aligned_cut_is_exact(function, dtype, gate, v_first):
    case = Case(T=LONG, dtype=dtype, gate=gate, state=1.0, v_first=v_first, V=40)
    inputs = make_inputs(case)
    o, final_state = inputs.call(function)
    for cut in [128] if CUDA_PATH else [128, 256, 640]:
        joined, joined_state = join(function, inputs, cut)
        assert torch.equal(joined, o), cut
        assert torch.equal(joined_state, final_state), cut


@dtypes
@pytest.mark.parametrize("cut", [1, 63, 64, 100, 129])
def test_state_handed_over_at_any_cut_is_accurate(dtype, cut):
    case = Case(T=150, dtype=dtype, gate="model", state=1.0)
    oracle, yardstick = references(case)
    inputs = make_inputs(case)
    o, final_state = join(ops.chunk_gated_delta_rule, inputs, cut)
    bound = 0.004 if dtype == torch.bfloat16 else None
    for name, value in (("o", o), ("final_state", final_state)):
        assert_accurate(value.detach(), oracle[name], yardstick[name], name, dtype=dtype, relative_rms=bound)


def test_gradient_through_a_handed_over_state():
    case = Case(T=150, state=1.0)
    oracle, yardstick = references(case)
    inputs = make_inputs(case)
    whole = inputs.tensors
    o1, state = replace(inputs, tensors={n: x if "state" in n else x[:, :128] for n, x in whole.items()}).call(
        ops.chunk_gated_delta_rule, output_final_state=True
    )
    o2, final = replace(inputs, tensors={n: state if "state" in n else x[:, 128:] for n, x in whole.items()}).call(
        ops.chunk_gated_delta_rule
    )
    grads = torch.autograd.grad([torch.cat([o1, o2], 1), final], list(whole.values()), [inputs.d_o, inputs.d_final])
    for name, grad in zip(whole, grads, strict=True):
        name = f"d{name}"
        assert_accurate(grad, oracle[name], yardstick[name], name, dtype=case.dtype, gradient=True)


@dtypes
@pytest.mark.parametrize("prefill", [1, 64, 100])
def test_prefill_then_steps_is_the_whole(dtype, prefill):
    case = Case(B=2, T=105, H=1, HV=2, dtype=dtype, gate="model", state=1.0)
    oracle, yardstick = references(case)
    inputs = make_inputs(case, requires_grad=False)
    o, state = tokens(inputs, slice(0, prefill)).call(ops.chunk_gated_delta_rule)
    outputs, state = [o.detach()], state.detach()
    rest = {name: inputs.tensors[name].detach() for name in ("q", "k", "v", "g", "beta")}
    with torch.no_grad():
        for t in range(prefill, case.T if not CUDA_PATH else min(case.T, prefill + 5)):
            token = {name: x[:, t : t + 1] for name, x in rest.items()}
            outputs.append(ops.gated_delta_rule_step(**token, state=state))
    joined = torch.cat(outputs, dim=1)
    bound = 0.004 if dtype == torch.bfloat16 else None
    rows = slice(0, joined.shape[1])
    assert_accurate(joined, oracle["o"][:, rows], yardstick["o"][:, rows], "o", dtype=dtype, relative_rms=bound)
    if joined.shape[1] == case.T:
        name = "final_state"
        assert_accurate(state, oracle[name], yardstick[name], name, dtype=dtype, relative_rms=bound)
