"""Mixture-of-Memories: promises to the bit, and launches that do not depend on the number of memories."""

from dataclasses import replace

import pytest
import torch
from gated_delta_rule_cases import CUDA_PATH
from mom_cases import Case, make_inputs, results

from remora import ops

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LONG = 150 if CUDA_PATH else 600


def run(inputs):
    return results(inputs.call(), inputs.tensors, inputs)


def assert_same(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_three_routes_agree():
    logits = torch.randn(2, 300, 6, requires_grad=True)
    runs = []
    for _ in range(3):
        route = ops.mom_route(logits, 2)
        grad = torch.autograd.grad(route.weights.square().sum() + route.balance_loss + route.z_loss, logits)[0]
        plan = ops.route_plan(route.indices, 6, capacity=90)
        runs.append([*route, grad, *plan])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_a_row_of_the_router_depends_on_no_other():
    logits = torch.randn(3, 50, 5)
    route = ops.mom_route(logits, 2)
    other = torch.randn(3, 50, 5)
    other[1, 20] = logits[1, 20]
    again = ops.mom_route(other, 2)
    assert torch.equal(again.weights[1, 20], route.weights[1, 20])
    assert torch.equal(again.indices[1, 20], route.indices[1, 20])


@dtypes
def test_three_runs_agree(dtype):
    case = Case(T=LONG, dtype=dtype, shared=True)
    first = run(make_inputs(case))
    for _ in range(2):
        assert_same(run(make_inputs(case)), first)


@pytest.mark.cpu_only
@dtypes
@pytest.mark.parametrize("routing", ["random", "collapsed"])
def test_the_number_of_threads_does_not_matter(dtype, routing):
    case = Case(B=1, T=3000, HV=1, K=32, V=32, k=1, dtype=dtype, routing=routing)
    logits = torch.randn(1, 3000, 3, requires_grad=True)
    threads = torch.get_num_threads()

    def everything():
        route = ops.mom_route(logits, 1)
        grad = torch.autograd.grad(route.weights.sum() + route.balance_loss + route.z_loss, logits)[0]
        plan = ops.route_plan(route.indices, 3, capacity=700)
        return run(make_inputs(case)) | {"route": torch.stack([route.balance_loss, route.z_loss]).detach(), "d": grad,
                                         "rows": plan.rows}  # fmt: skip

    try:
        torch.set_num_threads(1)
        first = everything()
        for number in (2, 5):
            torch.set_num_threads(number)
            assert_same(everything(), first)
    finally:
        torch.set_num_threads(threads)


@dtypes
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_later_tokens_reach_no_earlier_output(dtype, poison):
    """Values and routing of what follows, in the same memories and in others: outputs before keep their bits."""
    inputs = make_inputs(Case(T=LONG, dtype=dtype, shared=True), requires_grad=False)
    o, _ = inputs.call()
    cut = LONG * 2 // 3 + 1
    for name in ("q", "k", "v", "g", "beta", "weights"):
        inputs.tensors[name][:, cut:] = -poison if name == "g" else poison
    inputs.indices[:, cut:] = inputs.indices.flip(1)[:, cut:]
    after, _ = inputs.call()
    assert torch.equal(after[:, :cut], o[:, :cut])
    assert not torch.equal(after[:, cut:], o[:, cut:])


@dtypes
def test_tokens_of_one_memory_reach_no_other(dtype):
    inputs = make_inputs(Case(T=LONG, k=1, dtype=dtype), requires_grad=False)
    o, state = inputs.call()
    elsewhere = inputs.indices[..., 0] != 0
    for name in ("q", "k", "v", "g", "beta"):
        inputs.tensors[name][elsewhere] = torch.nan
    after, states = inputs.call()
    assert torch.equal(after[~elsewhere], o[~elsewhere])
    assert torch.equal(states[:, 0], state[:, 0])
    assert states[:, 1:].isnan().any(-1).any(-1).all()


@dtypes
def test_a_sequence_alone_in_a_batch_and_packed(dtype):
    case = Case(B=3, T=100, dtype=dtype, shared=True, capacity=30, drop="newest")
    inputs = make_inputs(case)
    batch = run(inputs)

    def part(rows, shape, cu_seqlens=None):
        tensors = {name: x.detach()[rows] for name, x in inputs.tensors.items()}
        for name, x in tensors.items():
            if name != "initial_state":
                tensors[name] = x.reshape(*shape, *x.shape[2:])
        return run(
            replace(
                inputs,
                tensors={name: x.contiguous().requires_grad_() for name, x in tensors.items()},
                indices=inputs.indices[rows].reshape(*shape, -1),
                cu_seqlens=cu_seqlens,
                d_o=inputs.d_o[rows].reshape(*shape, *inputs.d_o.shape[2:]),
                d_final=inputs.d_final[rows],
            )
        )

    for n in range(3):
        alone = part(slice(n, n + 1), (1, 100))
        for name, value in alone.items():
            assert torch.equal(value[0], batch[name][n]), (name, n)
    packed = part(slice(None), (1, 300), torch.tensor([0, 100, 200, 300]))
    for name, value in packed.items():
        assert torch.equal(value.reshape(batch[name].shape), batch[name]), name


def test_pieces_join():
    """The final states of one call handed to the next: the routed tokens go on where they were."""
    inputs = make_inputs(Case(T=60, shared=True), requires_grad=False)
    whole, final = inputs.call()
    state, outputs = inputs.tensors["initial_state"], []
    for rows in (slice(0, 25), slice(25, 26), slice(26, 60)):
        piece = replace(
            inputs,
            tensors={n: x if n == "initial_state" else x[:, rows] for n, x in inputs.tensors.items()},
            indices=inputs.indices[:, rows],
        )
        piece.tensors["initial_state"] = state
        o, state = piece.call()
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, final)


def launches(call):
    from remora.testing import sim

    sim.reset_stats()
    result = call()
    return result, sum(kernel["launches"] for kernel in sim.stats().values())


@pytest.mark.sim_only
def test_launches_of_router_and_plan_do_not_depend_on_the_number_of_memories():
    counts = []
    for M in (2, 40):
        logits = torch.randn(2, 20, M, requires_grad=True)
        route, forward = launches(lambda x=logits: ops.mom_route(x, 2))
        _, backward = launches(lambda r=route, x=logits: torch.autograd.grad(r.weights.sum() + r.balance_loss, x))
        _, decode = launches(lambda x=logits: ops.mom_route(x, 2, with_losses=False))
        _, plan = launches(lambda r=route, m=M: ops.route_plan(r.indices, m, capacity=3))
        counts.append((forward, backward, decode, plan))
    assert counts[0] == counts[1] == (3, 1, 1, 4)


@pytest.mark.sim_only
def test_launches_of_the_recurrence_do_not_depend_on_memories_or_sequences():
    """Plan, recurrence and weighted sum: one launch of the recurrence over all memories of all sequences."""
    counts = []
    for B, M in ((1, 2), (3, 2), (1, 9)):
        inputs = make_inputs(Case(B=B, T=20, M=M, V=16, shared=True))
        (o, state), forward = launches(inputs.call)
        _, backward = launches(
            lambda x=inputs, y=(o, state): torch.autograd.grad(y, list(x.tensors.values()), (x.d_o, x.d_final))
        )
        counts.append((forward, backward))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == 4 + 1 + 1
