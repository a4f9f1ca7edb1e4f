"""Values and gradients of the gated delta rule against the step-by-step oracle in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gated_delta_rule_cases import (
    CUDA_PATH,
    Case,
    check,
    chunked_in_plain_torch,
    in_every_dtype,
    make_inputs,
    references,
    results,
    varlen,
)

from remora import _C, ops
from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")

# A base case, then one factor per case.
SHAPES = {
    "base": Case(),
    **{f"T={T}": Case(T=T) for T in (1, 2, 63, 64, 65, 127, 128, 129, 193)},
    **{f"K={K}": Case(K=K, gate="model") for K in (1, 5)},  # so few channels make keys alike: the memory has to fade
    **{f"K={K}": Case(K=K) for K in (40, 96, 100, 128)},
    **{f"V={V}": Case(V=V) for V in (1, 5, 40, 96, 100, 128)},
    "K=V=128": Case(K=128, V=128, T=70),
    "V=150": Case(V=150, T=70),
    "B=3": Case(B=3, T=70),
    "H=HV=1": Case(HV=1),
    "H=HV=2": Case(H=2),
    "H=2,HV=6": Case(H=2, HV=6, T=70),
    "state": Case(state=1.0),
    "state=30": Case(state=30.0),
    "v_first": Case(state=1.0, v_first=True, V=40),
    "no final state": Case(final=False, state=1.0),
    "scale": Case(scale=-0.75),
    "l2norm": Case(l2norm=True),
    "T=0": Case(T=0, state=1.0),
    "B=0": Case(B=0, state=1.0),
}
LAYOUTS = {
    layout: Case(layout=layout, K=72, T=70, H=2, HV=4)
    for layout in ("head first", "padded", "strided rows", "broadcast", "packed")
}
PACKED = {
    "one sequence": varlen(100),
    "aligned": varlen(64, 64, state=1.0),
    "ragged": varlen(1, 65, 2, 63, 40, state=1.0),
    "empty first": varlen(0, 50, 30, state=1.0),
    "empty between": varlen(50, 0, 30, state=1.0),
    "empty tail": varlen(50, 30, 0, 0, 0, state=1.0),
    "only empty": varlen(0, 0, state=1.0),
    "int64": varlen(50, 30, offsets=torch.int64),
    "v_first, groups": varlen(33, 0, 70, H=2, HV=4, V=40, state=1.0, v_first=True),
    "past a saved state": varlen(20, 150, 3, state=1.0),
}
REGIMES = {
    **{
        f"gate {gate}": Case(gate=gate, state=1.0)
        for gate in ("none", "zero", "model", "strong", "reset", "many resets", "-inf")
    },
    "gate mixed": Case(gate="mixed", HV=4, state=1.0),
    **{f"beta {beta}": Case(beta=beta, state=1.0) for beta in ("zero", "tiny", "one", "two", "mixed")},
    **{f"keys {kind}": Case(keys=kind, state=1.0) for kind in ("correlated", "identical")},
    "keys correlated, gate strong": Case(keys="correlated", gate="strong", state=30.0),
    "gate model, state 30, packed": varlen(65, 0, 40, gate="model", state=30.0),
    "gate mixed, l2norm, groups": Case(gate="mixed", l2norm=True, H=2, HV=4, state=1.0),
}
# Reflections about one direction never forget a rounding error: no 16-bit or TF32 operand keeps the bounds.
EXACT = {"keys identical, beta two": Case(keys="identical", beta="two", state=1.0)}
LARGE = {
    "T=1000": Case(T=1000, B=2, H=2, HV=4, state=1.0),
    "T=1000, correlated": Case(T=1000, keys="correlated", gate="model", state=1.0),
    "T=1000, no gate": Case(T=1000, gate="none", state=1.0),
    "T=300, gate zero": Case(T=300, gate="zero", state=1.0),
    "T=400, correlated, beta two": Case(T=400, keys="correlated", beta="two", state=1.0),
    "K=256": Case(K=256, T=150, state=1.0),
    "V=256": Case(V=256, T=150, state=1.0),
    "K=V=256": Case(K=256, V=256, H=2, HV=2, T=70),
    "K=250, V=201": Case(K=250, V=201, T=70, layout="padded"),
    "ragged": varlen(1, 300, 0, 129, 128, 256, 7, H=2, HV=4, state=1.0),
}
CASES = {**SHAPES, **LAYOUTS, **PACKED, **REGIMES}
# In the simulator every case runs in bfloat16, and these in float32 and float16 too.
CORE = ("base", "T=1", "T=129", "K=40", "V=100", "K=V=128", "v_first", "padded", "packed", "ragged", "gate model",
        "gate strong", "gate many resets", "beta mixed", "keys correlated", "l2norm")  # fmt: skip
if CUDA_PATH:
    WHOLE = {
        name: case
        for name, case in in_every_dtype(CASES).items()
        if case.dtype == torch.bfloat16 or name.rsplit("-", 1)[0] in CORE
    }
    TOKENWISE = {name: case for name, case in WHOLE.items() if name.rsplit("-", 1)[0] in CORE}
else:
    WHOLE = in_every_dtype({**CASES, **{f"large {name}": case for name, case in LARGE.items()}})
    TOKENWISE = in_every_dtype(CASES)
    for cases in (WHOLE, TOKENWISE):
        cases.update((name, case) for name, case in in_every_dtype(EXACT).items() if case.dtype.itemsize >= 4)


def chunk(g=None, **arguments):
    return ops.chunk_delta_rule(**arguments) if g is None else ops.chunk_gated_delta_rule(g=g, **arguments)


def over(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


@over(WHOLE)
def test_chunk(case):
    check(chunk, case)


@over(TOKENWISE)
def test_fused_recurrent(case):
    check(ops.fused_recurrent_gated_delta_rule, case)


def test_fused_recurrent_delta_rule_and_defaults():
    case = Case(gate="none", beta="one", T=20, state=1.0)
    oracle, yardstick = references(case)
    inputs = make_inputs(case, requires_grad=False)
    del inputs.tensors["g"], inputs.tensors["beta"]
    for function in (ops.fused_recurrent_delta_rule, ops.fused_recurrent_gated_delta_rule):
        for name, value in results(function, inputs).items():
            assert_accurate(value, oracle[name], yardstick[name], name, dtype=case.dtype)


def test_without_gradients_the_outputs_are_the_same():
    case = Case(T=150, dtype=torch.bfloat16, state=1.0)
    with_grad = results(chunk, make_inputs(case))
    without = results(chunk, make_inputs(case, requires_grad=False))
    assert without.keys() == {"o", "final_state"}
    for name, value in without.items():
        assert torch.equal(value, with_grad[name])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "g", "beta", "initial_state"])
def test_gradient_of_one_input_alone(wanted):
    case = Case(T=70, dtype=torch.bfloat16, state=1.0)
    every = results(chunk, make_inputs(case))
    inputs = make_inputs(case, requires_grad=False)
    inputs.tensors[wanted].requires_grad_()
    alone = results(chunk, inputs)
    assert alone.keys() == {"o", "final_state", f"d{wanted}"}
    assert torch.equal(alone[f"d{wanted}"], every[f"d{wanted}"])


@pytest.mark.parametrize("function", [chunk, ops.fused_recurrent_gated_delta_rule], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("used", ["o", "final_state"])
def test_gradient_of_one_output_alone(function, used):
    case = Case(T=70, state=1.0)
    oracle, yardstick = make_inputs(case).double(), make_inputs(case)
    actual = make_inputs(case)
    grads = []
    for call, inputs in ((naive_gated_delta_rule, oracle), (chunked_in_plain_torch, yardstick), (function, actual)):
        leaves = list(inputs.tensors.values())
        for x in leaves:
            x.requires_grad_()
        o, final_state = inputs.call(call)
        output, gradient = (o, inputs.d_o) if used == "o" else (final_state, inputs.d_final)
        grads.append(torch.autograd.grad(output, leaves, gradient, materialize_grads=True))
    for name, want, rule, have in zip(actual.tensors, *grads, strict=True):
        assert_accurate(have, want, rule, f"d{name}", dtype=case.dtype, gradient=True)


def test_gradient_of_the_output_may_have_any_strides():
    case = Case(T=70, dtype=torch.bfloat16)
    dense = results(chunk, make_inputs(case))
    inputs = make_inputs(case)
    inputs.d_o = inputs.d_o.transpose(1, 3).contiguous().transpose(1, 3)
    inputs.d_final = inputs.d_final.transpose(2, 3).contiguous().transpose(2, 3)
    for name, value in results(chunk, inputs).items():
        assert torch.equal(value, dense[name]), name


def test_one_tensor_as_query_and_key():
    case = Case(T=70)
    x = F.normalize(torch.randn(1, 70, 1, 64), dim=-1)
    inputs = make_inputs(case, requires_grad=False)
    inputs.tensors["q"] = inputs.tensors["k"] = x
    apart = make_inputs(case, requires_grad=False)
    apart.tensors.update(q=x.clone(), k=x.clone())
    for name, value in results(chunk, inputs).items():
        assert torch.equal(value, results(chunk, apart)[name])


# The maps are the same float32 arithmetic for every dtype of q.
LOGITS = {"float32": Case(T=70, HV=4), **({} if CUDA_PATH else {"float64": Case(T=70, HV=4, dtype=torch.float64)})}


@over(LOGITS)
@pytest.mark.parametrize("function", [chunk, ops.fused_recurrent_gated_delta_rule], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("neg_eigval", [False, True], ids=["sigmoid", "twice sigmoid"])
def test_gate_and_beta_from_logits(case, function, with_bias, neg_eigval):
    def call(rule, inputs):
        x = inputs.tensors
        x["A_log"] = torch.tensor([2.0, 1.0, 1.5, 0.02], dtype=x["beta"].dtype).log().requires_grad_()
        x["dt_bias"] = torch.tensor([-4.0, -1.0, 0.0, 25.0], dtype=x["beta"].dtype) if with_bias else None
        x["g"] = (2 * x["g"].detach() + 1).requires_grad_()
        x["beta"] = (4 * x["beta"].detach() - 2).requires_grad_()
        if with_bias:
            x["dt_bias"].requires_grad_()
        for name in ("q", "k", "v"):
            x[name] = x[name].detach().requires_grad_()
        return results(rule, inputs)

    def yardstick(g, beta, A_log, dt_bias, **rest):
        g = -A_log.exp() * F.softplus(g if dt_bias is None else g + dt_bias)
        for option in ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"):
            del rest[option]
        return chunked_in_plain_torch(g=g, beta=beta.sigmoid() * (2 if neg_eigval else 1), **rest)

    inputs = make_inputs(case)
    inputs.options.update(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=neg_eigval)
    oracle = call(naive_gated_delta_rule, inputs.double())
    rule = dict.fromkeys(oracle) if case.dtype == torch.float64 else call(yardstick, make_like(inputs))
    actual = call(function, make_like(inputs))
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        assert_accurate(value, oracle[name], rule[name], name, dtype=case.dtype, gradient=name.startswith("d"))


def make_like(inputs):
    """The same inputs, to be called another way."""
    return replace(inputs, tensors=dict(inputs.tensors), options=dict(inputs.options))


def test_gates_and_betas_of_any_dtype():
    case = Case(T=70, dtype=torch.bfloat16)
    inputs = make_inputs(case, requires_grad=False)
    for name in ("g", "beta"):
        inputs.tensors[name] = inputs.tensors[name].bfloat16()
    low = results(chunk, inputs)
    for name in ("g", "beta"):
        inputs.tensors[name] = inputs.tensors[name].float()
    for name, value in results(chunk, inputs).items():
        assert torch.equal(value, low[name])


def test_autocast_lowers_q_k_v_only():
    case = Case(T=70, state=1.0)
    inputs = make_inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(chunk, replace(inputs, d_o=inputs.d_o.bfloat16()))
    low = make_inputs(case)
    for name in ("q", "k", "v"):
        low.tensors[name] = low.tensors[name].detach().bfloat16().requires_grad_()
    direct = results(chunk, replace(low, d_o=low.d_o.bfloat16()))
    assert cast["o"].dtype == torch.bfloat16
    assert cast["final_state"].dtype == torch.float32
    assert cast["dq"].dtype == torch.float32
    for name, value in cast.items():
        assert torch.equal(value, direct[name].to(value.dtype)), name


@pytest.mark.cpu_only
@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    """The last token of a view whose strides pass 2^31 elements."""
    T, K = 5, 8
    stride = 2**31 // (T - 1) + 8
    storage = torch.zeros(stride * (T - 1) + 64, dtype=torch.float16)
    wide = [storage[shift:].as_strided((1, T, 1, K), (0, stride, K, 1)) for shift in (0, 16, 32)]
    inputs = make_inputs(Case(T=T, HV=1, K=K, V=K, dtype=torch.float16))
    dense = results(chunk, inputs)
    for view, name in zip(wide, ("q", "k", "v"), strict=True):
        inputs.tensors[name] = view.copy_(inputs.tensors[name].detach()).requires_grad_()
    for name, value in results(chunk, inputs).items():
        assert torch.equal(value, dense[name]), name


@pytest.mark.sim_only
def test_float64_is_refused_by_the_cuda_path():
    inputs = make_inputs(Case(dtype=torch.float64))
    message = r"q must have dtype torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"
    for function in (ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule):
        with pytest.raises(TypeError, match=message):
            inputs.call(function)


CUT = {
    "float32": Case(T=1600, HV=1, state=1.0),
    "bfloat16": Case(T=3200, HV=1, state=1.0, dtype=torch.bfloat16),
    "packed": varlen(1500, 1700, HV=1, state=1.0),
    "gate model": Case(T=1600, HV=1, gate="model", V=40, v_first=True, state=1.0),
}


@pytest.mark.sim_only
@over(CUT)
def test_a_long_sequence_is_cut_into_spans(case):
    """Few heads and many multiprocessors: the spans' states are combined exactly."""
    shape = {"batch": case.B, "seqlen": case.T, "num_heads": case.H, "num_value_heads": case.HV, "head_dim": case.K}
    dtype = str(case.dtype).removeprefix("torch.")
    plan = _C.gated_delta_rule_fwd_plan(**shape, value_dim=case.V, num_seqs=case.N, dtype=dtype, num_sms=132, arch=90)
    assert plan["span_tokens"] < case.T / case.N
    assert plan["num_map_slots"] > 0
    check(chunk, case)


@pytest.mark.parametrize("T", [100, 400])
@pytest.mark.parametrize("gate", ["none", "weak"])
def test_outputs_where_tokens_reflect_the_state_about_alike_keys(gate, T):
    case = Case(T=T, gate=gate, beta="two", keys="correlated", state=1.0, dtype=torch.bfloat16)
    o, _ = make_inputs(case, requires_grad=False).call(chunk)
    oracle, _ = make_inputs(case, requires_grad=False).double().call(naive_gated_delta_rule)
    assert (o.double() - oracle).norm() <= 0.004 * oracle.norm()


SMALLER = {
    "bfloat16": Case(T=200, K=128, V=150, dtype=torch.bfloat16, l2norm=True, state=1.0),
    "float16, packed": varlen(70, 0, 130, dtype=torch.float16, H=2, state=1.0),
    "float32": Case(T=150, K=128, V=70, state=1.0),
}


@pytest.mark.sim_only
@pytest.mark.parametrize("arch", [80, 86])
@over(SMALLER)
def test_where_shared_memory_is_smaller(arch, case):
    from remora.testing import sim

    with sim.options(arch=arch):
        check(chunk, case)
