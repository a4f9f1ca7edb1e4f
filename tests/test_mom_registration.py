"""The routed operators as PyTorch sees them: schemas, fake kernels, autograd formulas, tracing, float64 gradients."""

import pytest
import torch
from mom_cases import Case, make_inputs, results

from remora import ops

pytestmark = pytest.mark.usefixtures("kernels")

OP = torch.ops.remora
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
gradients = pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])


def opcheck(operator, *arguments):
    with torch.random.fork_rng():
        outcome = torch.library.opcheck(operator, arguments, test_utils=TESTS)
    assert outcome == dict.fromkeys(TESTS, "SUCCESS")


@gradients
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_losses", [False, True])
def test_opcheck_route(requires_grad, masked, with_losses):
    logits = torch.randn(12, 4, requires_grad=requires_grad)
    mask = (torch.rand(12) > 0.3).to(torch.uint8) if masked else None
    opcheck(OP.mom_route_fwd.default, logits, mask, 2, True, with_losses)
    weights, indices, lse, losses, counts = OP.mom_route_fwd(logits.detach(), mask, 2, True, with_losses)
    d_losses = torch.ones_like(losses)
    opcheck(
        OP.mom_route_bwd.default, logits.detach(), mask, weights, indices, lse, counts, torch.rand(12, 2), d_losses,
        True, with_losses,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_plan(packed):
    indices = torch.randint(0, 3, (12, 2)).int()
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32) if packed else None
    opcheck(OP.route_plan.default, indices, offsets, None, 12 if packed else 6, 3, True, 2, False)


@gradients
@pytest.mark.parametrize("extra", [0, 1])
def test_opcheck_combine(requires_grad, extra):
    o, weights = torch.randn(2 + extra, 6, 5, requires_grad=requires_grad), torch.rand(6, 2)
    weights.requires_grad_(requires_grad)
    opcheck(OP.mom_combine_fwd.default, o, weights)
    opcheck(OP.mom_combine_bwd.default, o.detach(), weights.detach(), torch.randn(6, 5))


@gradients
def test_opcheck_routed_recurrence(requires_grad):
    x = [torch.randn(2, 9, 1, 16) for _ in range(3)]
    x += [-torch.rand(2, 9, 1), torch.rand(2, 9, 1), torch.randn(3, 1, 16, 16)]
    x = [y.requires_grad_(requires_grad) for y in x]
    rows, offsets = torch.randperm(18).int(), torch.tensor([0, 7, 10, 18], dtype=torch.int32)
    # Only a call that will need them saves states.
    opcheck(OP.gated_delta_rule_fwd.default, *x, offsets, rows, 0.25, True, True, False, requires_grad)
    x = [y.detach() for y in x]
    saved = OP.gated_delta_rule_fwd(*x, offsets, rows, 0.25, True, True, False, True)[2]
    d_o, d_final = torch.randn(2, 9, 1, 16), torch.randn(3, 1, 16, 16)
    opcheck(OP.gated_delta_rule_bwd.default, *x, offsets, rows, saved, d_o, d_final, 0.25, True, False)


def test_opcheck_routed_step():
    x = [torch.randn(2, 3, 1, 16) for _ in range(3)] + [-torch.rand(2, 3, 1), torch.rand(2, 3, 1)]
    memories = torch.tensor([[0, 3, 2], [1, 1, 0]], dtype=torch.int32)
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    opcheck(
        OP.gated_delta_rule_step_.default, *x, torch.randn(9, 1, 16, 16), slots, memories, 3, None, None, 0.25, True,
        False, False, False,
    )  # fmt: skip


def route_and_recur(logits, q, k, v, g, beta, state, capacity=None):
    route = ops.mom_route(logits, 2)
    o, final = ops.mom_gated_delta_rule(
        q, k, v, g, beta, route.weights, route.indices, logits.shape[-1], initial_state=state, output_final_state=True,
        shared_memory=True, capacity=capacity,
    )  # fmt: skip
    return o.float().square().mean() + final.square().mean() + 0.01 * route.balance_loss + 0.01 * route.z_loss


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.cpu_only), True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(route_and_recur, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33) if dynamic else (20,):
        inputs = make_inputs(Case(T=T, shared=True))
        x = [torch.randn(2, T, 3, requires_grad=True)]
        x += [inputs.tensors[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
        for capacity in (None, 4):
            want = torch.autograd.grad(route_and_recur(*x, capacity), x)
            have = torch.autograd.grad(compiled(*x, capacity), x)
            for a, b in zip(have, want, strict=True):
                torch.testing.assert_close(a, b)


@torch.no_grad()
def test_compile_step():
    torch._dynamo.reset()
    compiled = torch.compile(ops.mom_gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(Case(T=1, shared=True), requires_grad=False)
    x = dict(inputs.tensors)
    state = x.pop("initial_state")
    states = state.clone(), state.clone()
    eager = ops.mom_gated_delta_rule_step(**x, indices=inputs.indices, state=states[0], shared_memory=True)
    traced = compiled(**x, indices=inputs.indices, state=states[1], shared_memory=True)
    assert torch.equal(traced, eager)
    assert torch.equal(*states)


def test_meta_tensors_have_the_right_shapes():
    inputs = make_inputs(Case(T=9, shared=True), requires_grad=False)
    logits = torch.randn(2, 9, 3)
    route, plan = ops.mom_route(logits, 2), ops.route_plan(inputs.indices, 3, shared_memory=True)
    real = [*route, *plan, *inputs.call()]
    inputs.tensors = {name: x.to("meta") for name, x in inputs.tensors.items()}
    inputs.indices = inputs.indices.to("meta")
    meta = [*ops.mom_route(logits.to("meta"), 2), *ops.route_plan(inputs.indices, 3, shared_memory=True)]
    for have, want in zip([*meta, *inputs.call()], real, strict=True):
        assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())
        assert have.device.type == "meta"


SMALL = {
    "base": Case(T=5, K=2, V=2),
    "shared": Case(B=1, T=5, K=2, V=3, shared=True),
    "own tensors": Case(B=1, T=5, HV=1, K=2, V=2, per_choice=True),
    "packed, norm": Case(B=1, T=7, lengths=(3, 0, 4), HV=1, K=3, V=2, l2norm=True),
    "capacity": Case(B=1, T=7, HV=1, K=2, V=2, capacity=2),
    "padding": Case(B=1, T=7, HV=1, K=2, V=2, masked=True, shared=True),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(case):
    inputs = make_inputs(Case(**{**case.__dict__, "dtype": torch.float64}))

    def call(*tensors):
        inputs.tensors = dict(zip(inputs.tensors, tensors, strict=True))
        return inputs.call()

    assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()))


@pytest.mark.cpu_only
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_router(renormalize, masked):
    logits = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 6) > 0.3 if masked else None

    def call(x):
        route = ops.mom_route(x, 2, mask=mask, renormalize=renormalize)
        return route.weights, route.balance_loss, route.z_loss

    assert torch.autograd.gradcheck(call, (logits,))


def test_a_second_derivative_is_refused():
    inputs = make_inputs(Case(T=5))
    o, _ = inputs.call()
    (d_weights,) = torch.autograd.grad(o.sum(), inputs.tensors["weights"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(d_weights.sum(), inputs.tensors["v"])
    assert set(results(inputs.call(), inputs.tensors, inputs)) >= {"dweights", "dinitial_state"}
