"""The operators as PyTorch sees them: schemas, fake kernels, autograd formulas, tracing, gradients in float64."""

from dataclasses import replace

import pytest
import torch
from gated_delta_rule_cases import Case, make_inputs, results, varlen

from remora import ops

pytestmark = pytest.mark.usefixtures("kernels")

CASES = {
    "plain": Case(T=20, K=16, V=24),
    "state": Case(T=20, H=2, HV=4, K=16, V=24, state=1.0),
    "no gate": Case(T=20, K=16, V=24, gate="none"),
    "v first": Case(T=20, K=16, V=24, state=1.0, v_first=True),
    "packed": varlen(7, 140, K=16, V=24, state=1.0),
    "empty sequence": varlen(7, 0, 140, K=16, V=24, state=1.0),
    "bfloat16": Case(T=20, K=16, V=24, dtype=torch.bfloat16, state=1.0),
    "strided": Case(T=20, K=16, V=24, layout="packed"),
    "no tokens": Case(T=0, K=16, V=24, state=1.0),
    "l2norm": Case(T=20, K=16, V=24, l2norm=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
gradients = pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operands(case, requires_grad, final=True):
    inputs = make_inputs(case, requires_grad)
    x = [inputs.tensors[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
    x[3:6] = [None if t is None else t.detach().contiguous().requires_grad_(requires_grad) for t in x[3:6]]
    return inputs, x, inputs.options["cu_seqlens"], (case.K**-0.5, case.l2norm), final


def opcheck(operator, arguments):
    with torch.random.fork_rng():
        outcome = torch.library.opcheck(operator, arguments, test_utils=TESTS)
    assert outcome == dict.fromkeys(TESTS, "SUCCESS")


@cases
@gradients
@pytest.mark.parametrize("final", [True, False], ids=["final state", "no final state"])
def test_opcheck_fwd(case, requires_grad, final):
    _, x, offsets, options, _ = operands(case, requires_grad)
    # Saved states of a sequence without tokens stay NaN, which opcheck takes for a difference.
    save_states = requires_grad and case.T > 0 and 0 not in (case.lengths or ())
    if requires_grad and not save_states:
        x = [None if t is None else t.detach() for t in x]
    arguments = (*x, offsets, None, *options, final, case.v_first, save_states)
    opcheck(torch.ops.remora.gated_delta_rule_fwd.default, arguments)


@cases
@gradients
def test_opcheck_recurrent_fwd(case, requires_grad):
    _, x, offsets, options, final = operands(case, requires_grad)
    opcheck(torch.ops.remora.gated_delta_rule_recurrent_fwd.default, (*x, offsets, *options, final, case.v_first))


@cases
@pytest.mark.parametrize("d_final", [True, False], ids=["final state", "no final state"])
def test_opcheck_bwd(case, d_final):
    inputs, x, offsets, options, final = operands(case, requires_grad=False)
    saved = torch.ops.remora.gated_delta_rule_fwd(*x, offsets, None, *options, final, case.v_first, True)[2]
    arguments = (*x, offsets, None, saved, inputs.d_o, inputs.d_final if d_final else None, *options, case.v_first)
    opcheck(torch.ops.remora.gated_delta_rule_bwd.default, arguments)


@pytest.mark.parametrize("indices", [None, [2, -1]], ids=["in order", "pool"])
@pytest.mark.parametrize("logits", [False, True], ids=["gates", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_step(indices, logits, dtype):
    _, x, _, options, _ = operands(Case(B=2, T=1, K=16, V=24, dtype=dtype), requires_grad=False)
    slots = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    a_log, dt_bias = (torch.zeros(2), torch.ones(2)) if logits else (None, None)
    state = torch.randn(2 if indices is None else 3, 2, 16, 24)
    opcheck(
        torch.ops.remora.gated_delta_rule_step_.default,
        (*x[:5], state, slots, None, 1, a_log, dt_bias, *options, logits, False, False),
    )


FUNCTIONS = {"chunk": ops.chunk_gated_delta_rule, "recurrent": ops.fused_recurrent_gated_delta_rule}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@functions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=70, dtype=torch.bfloat16, state=1.0),
        varlen(20, 0, 50, state=1.0),
        Case(T=70, l2norm=True, final=False),
        Case(T=0, state=1.0),
    ],
    ids=["state", "packed", "l2norm", "no tokens"],
)
def test_compile(function, dynamic, case):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (case.T, case.T + 9) if dynamic and case.lengths is None else (case.T,):
        sized = replace(case, T=T)
        eager = results(function, make_inputs(sized))
        for name, value in results(compiled, make_inputs(sized)).items():
            assert torch.equal(value, eager[name]), name


def test_compile_with_gates_from_logits():
    torch._dynamo.reset()

    def block(q, k, v, a, b, A_log, dt_bias):
        o, _ = ops.chunk_gated_delta_rule(
            q, k, v, a, b, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        return o.square().sum()

    inputs = make_inputs(Case(T=40, state=None))
    x = [inputs.tensors[name] for name in ("q", "k", "v", "g", "beta")]
    x += [torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    eager = torch.autograd.grad(block(*x), x)
    traced = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(*x), x)
    for have, want in zip(traced, eager, strict=True):
        torch.testing.assert_close(have, want)


def test_compile_step():
    torch._dynamo.reset()
    inputs = make_inputs(Case(B=2, T=1, state=1.0), requires_grad=False)
    x = {name: inputs.tensors[name] for name in ("q", "k", "v", "g", "beta")}
    slots = torch.tensor([1, 0])
    states = inputs.tensors["initial_state"].clone(), inputs.tensors["initial_state"].clone()
    compiled = torch.compile(ops.gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    eager = ops.gated_delta_rule_step(**x, state=states[0], state_indices=slots)
    assert torch.equal(compiled(**x, state=states[1], state_indices=slots), eager)
    assert torch.equal(*states)


def test_meta_tensors_have_the_right_shapes():
    case = Case(T=20, H=2, HV=4, K=16, V=24, state=1.0, dtype=torch.bfloat16)
    real = make_inputs(case, requires_grad=False)
    meta = make_inputs(case, requires_grad=False)
    meta.tensors = {name: x.to("meta") for name, x in meta.tensors.items()}
    for function in FUNCTIONS.values():
        for have, want in zip(meta.call(function), real.call(function), strict=True):
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())
            assert have.device.type == "meta"


SMALL = {
    "plain": Case(B=2, T=5, H=1, HV=2, K=3, V=4),
    "state": Case(B=1, T=6, H=2, HV=4, K=4, V=3, state=1.0),
    "v first": Case(B=1, T=4, K=3, V=4, state=1.0, v_first=True),
    "packed": varlen(3, 0, 5, 1, K=3, V=2, state=1.0),
    "l2norm": Case(B=1, T=5, K=4, V=3, l2norm=True, state=1.0),
    "model gate": Case(B=1, T=5, K=3, V=3, gate="model", state=1.0),
    "mixed beta": Case(B=1, T=6, K=3, V=3, beta="mixed", keys="correlated", state=1.0),
    "two chunks": Case(B=1, T=20, HV=1, K=2, V=2, state=1.0),
    "past a saved state": Case(B=1, T=131, HV=1, K=1, V=1, state=1.0),
}


@pytest.mark.cpu_only
@functions
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(function, case):
    inputs = make_inputs(replace(case, dtype=torch.float64))

    def call(*tensors):
        return replace(inputs, tensors=dict(zip(inputs.tensors, tensors, strict=True))).call(function)

    assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()))


@pytest.mark.cpu_only
def test_gradcheck_without_gate():
    inputs = make_inputs(Case(B=1, T=6, K=3, V=4, gate="none", dtype=torch.float64, state=1.0))
    leaves = {name: x for name, x in inputs.tensors.items() if x is not None}

    def call(*tensors):
        arguments = dict(zip(leaves, tensors, strict=True))
        return ops.chunk_delta_rule(**arguments, output_final_state=True)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_a_second_derivative_is_refused():
    """The gradient is an operator without a gradient of its own: an error, not a silent zero."""
    inputs = make_inputs(Case(T=5))
    o, _ = inputs.call(ops.chunk_gated_delta_rule)
    (dq,) = torch.autograd.grad(o.sum(), inputs.tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), inputs.tensors["v"])
