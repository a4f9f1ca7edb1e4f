"""Mixture-of-Memories: the router, the plan, and the routed recurrence against every memory run densely."""

from dataclasses import replace

import pytest
import torch
from gated_delta_rule_cases import CUDA_PATH
from mom_cases import DTYPES, Case, check, make_inputs, oracle, results

from remora import ops
from remora.ops.routed.naive import naive_mom_route
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(("M", "k"), [(4, 2), (1, 1), (5, 5), (70, 3), (1000, 2)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_route(M, k, renormalize, masked):
    T = 75 if M < 100 else 9
    logits = torch.randn(2, T, M, requires_grad=True)
    mask = torch.rand(2, T) > 0.3 if masked else None
    route = ops.mom_route(logits, k, mask=mask, renormalize=renormalize)
    oracle_logits = logits.detach().double().requires_grad_()
    oracle = naive_mom_route(oracle_logits, k, mask, renormalize)
    plain_logits = logits.detach().requires_grad_()
    plain = naive_mom_route(plain_logits, k, mask, renormalize)
    assert torch.equal(route.indices, oracle[1])
    assert torch.equal(route.hits, oracle[4])
    d = torch.randn(2, T, k)
    grads = []
    for x, leaf in ((route, logits), (oracle, oracle_logits), (plain, plain_logits)):
        loss = (x[0] * d).sum() + 3 * x[2] + 0.5 * x[3]
        grads.append(torch.autograd.grad(loss, leaf)[0])
    for name, i in (("weights", 0), ("balance", 2), ("z", 3)):
        assert_accurate(route[i].detach(), oracle[i].detach(), plain[i].detach(), name, dtype=torch.float32)
    assert_accurate(*grads, "dlogits", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_of_16_bit_logits(dtype):
    logits = torch.randn(2, 75, 4).to(dtype).requires_grad_()
    route = ops.mom_route(logits, 2)
    exact = logits.detach().double().requires_grad_()
    oracle_route = naive_mom_route(exact, 2)
    plain = logits.detach().requires_grad_()
    plain_route = naive_mom_route(plain, 2)
    # Equal 16-bit logits are ties, which both break by index.
    assert torch.equal(route.indices, oracle_route[1])
    d = torch.randn(2, 75, 2)
    losses = [(x[0] * d).sum() + 3 * x[2] + 0.5 * x[3] for x in (route, oracle_route, plain_route)]
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (logits, exact, plain), strict=True)]
    assert_accurate(route.weights.detach(), oracle_route[0].detach(), plain_route[0].detach(), "w", dtype=torch.float32)
    assert_accurate(*grads, "dlogits", dtype=dtype)


def test_losses_of_many_blocks_of_tokens():
    logits = torch.randn(1, 1500, 3)
    mask = torch.rand(1, 1500) > 0.5
    route, want = ops.mom_route(logits, 1, mask=mask), naive_mom_route(logits.double(), 1, mask)
    torch.testing.assert_close(route.balance_loss.double(), want[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(route.z_loss.double(), want[3], rtol=1e-6, atol=0)
    assert torch.equal(route.hits, want[4])


def test_balance_loss_has_its_least_value_where_all_memories_are_used_alike():
    logits = 3 * torch.eye(4).repeat(1, 25, 1)  # [1, 100, 4]: every memory first for a quarter of the tokens
    for k in (1, 4):
        torch.testing.assert_close(ops.mom_route(logits, k).balance_loss, torch.tensor(float(k)))
    collapsed = ops.mom_route(torch.tensor([9.0, 0, 0, 0]).repeat(1, 100, 1), 1).balance_loss
    assert collapsed > 3.9


def test_padding_alone_has_no_loss():
    logits = torch.randn(1, 5, 3, requires_grad=True)
    route = ops.mom_route(logits, 2, mask=torch.zeros(1, 5, dtype=torch.bool))
    assert route.balance_loss == 0
    assert route.z_loss == 0
    assert not route.hits.any()
    (grad,) = torch.autograd.grad(route.weights.sum() + route.balance_loss + route.z_loss, logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_route_ties_nan_and_repeats():
    logits = torch.tensor([[[1.0, 2, 2, 2], [0, 0, 0, 0], [5, torch.nan, 1, 7], [1, -torch.inf, 0, -torch.inf]]])
    route = ops.mom_route(logits, 3)
    assert route.indices.tolist() == [[[1, 2, 3], [0, 1, 2], [3, 0, 2], [0, 2, 1]]]
    assert route.weights[0, 2].isnan().all()
    assert route.weights[0, [0, 1, 3]].isfinite().all()
    again = ops.mom_route(logits, 3)
    assert torch.equal(again.weights.nan_to_num(), route.weights.nan_to_num())


def plan_by_hand(indices, M, bounds, shared, capacity, drop, mask):
    B, T, k = indices.shape
    segments = []
    seen = set()
    chosen, real = indices.flatten(0, 1).tolist(), mask.flatten().tolist()
    for begin, end in bounds:
        for m in range(M + shared):
            rows = [
                j * B * T + t
                for t in range(begin, end)
                for j in range(k + shared)
                if real[t] and (m == M if j == k else m < M and chosen[t][j] == m)
            ]
            if capacity is not None and m < M:
                rows = rows[:capacity] if drop == "newest" else rows[len(rows) - min(capacity, len(rows)) :]
            segments.append(rows)
            seen.update(rows)
    dropped = set(range((k + shared) * B * T)) - seen
    offsets = [0]
    for rows in segments:
        offsets.append(offsets[-1] + len(rows))
    return segments, dropped, offsets


@pytest.mark.parametrize("drop", ["oldest", "newest"])
@pytest.mark.parametrize("capacity", [None, 0, 7])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_plan(drop, capacity, shared, packed):
    B, T, k, M = (1, 600, 2, 5) if packed else (3, 130, 2, 5)
    indices = torch.randint(-1, M + 2, (B, T, k))
    mask = torch.rand(B, T) > 0.1
    offsets = torch.tensor([0, 100, 100, 333, 600]) if packed else None
    bounds = [(0, 100), (100, 100), (100, 333), (333, 600)] if packed else [(b * T, b * T + T) for b in range(B)]
    plan = ops.route_plan(indices, M, cu_seqlens=offsets, shared_memory=shared, capacity=capacity, drop=drop, mask=mask)
    segments, dropped, want = plan_by_hand(indices, M, bounds, shared, capacity, drop, mask)
    assert plan.cu_seqlens.tolist() == want
    assert plan.rows[: want[-1]].tolist() == [row for rows in segments for row in rows]
    assert set(plan.rows[want[-1] :].tolist()) == dropped
    assert torch.equal(plan.rows[plan.positions.long()], torch.arange(len(plan.rows), dtype=torch.int32))


def test_plan_of_many_memories_and_of_int64_indices():
    indices = torch.randint(0, 1024, (2, 70, 3))
    plan = ops.route_plan(indices, 1024)
    segments, dropped, want = plan_by_hand(
        indices, 1024, [(0, 70), (70, 140)], False, None, "oldest", torch.ones(2, 70, dtype=torch.bool)
    )
    assert plan.cu_seqlens.tolist() == want
    assert plan.rows.tolist() == [row for rows in segments for row in rows]
    assert not dropped
    for x, y in zip(ops.route_plan(indices.int(), 1024), plan, strict=True):
        assert torch.equal(x, y)


def test_plan_of_many_tokens():
    """More than one chunk of the counting sort on either device."""
    indices = torch.randint(0, 5, (1, 5000 if CUDA_PATH else 30000, 2))
    plan = ops.route_plan(indices, 5, shared_memory=True)
    J, T = 3, indices.shape[1]
    memory = torch.cat([indices[0], torch.full((T, 1), 5)], dim=-1).flatten()
    order = memory.sort(stable=True).indices
    assert torch.equal(plan.rows.long(), order % J * T + order // J)
    assert torch.equal(plan.counts.long(), torch.bincount(memory, minlength=6))


def test_plan_without_tokens():
    plan = ops.route_plan(torch.zeros(2, 0, 2, dtype=torch.int32), 3)
    assert plan.rows.shape == plan.positions.shape == (0,)
    assert plan.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [0, 1])
def test_combine(dtype, extra):
    o = torch.randn(2 + extra, 30, 2, 33).to(dtype).requires_grad_()
    weights = torch.rand(3, 10, 2, requires_grad=True)
    d = torch.randn(3, 10, 2, 33).to(dtype)

    def plain(o, w):
        w = torch.cat([w, torch.ones_like(w[..., :1])], -1)[..., : len(o)].reshape(30, -1).t()[:, :, None, None]
        return (w * o).sum(0).view(3, 10, 2, 33)

    out = ops.mom_combine(o, weights)
    have = [out, *torch.autograd.grad(out, (o, weights), d)]
    o2, w2 = o.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    out = plain(o2, w2)
    want = [out, *torch.autograd.grad(out, (o2, w2), d.double())]
    low = plain(o, weights.to(dtype))
    yardstick = [low, *torch.autograd.grad(low, (o, weights), d)]
    for name, *x in zip(("o", "do", "dw"), have, want, yardstick, strict=True):
        assert_accurate(*(y.detach() for y in x), name, dtype=dtype)


CASES = {
    "base": Case(),
    "shared memory": Case(shared=True),
    "own tensors": Case(per_choice=True),
    "own tensors, shared memory": Case(per_choice=True, shared=True),
    "one choice": Case(k=1, M=2),
    "one memory": Case(k=1, M=1),
    "all memories": Case(k=3, M=3),
    "many memories": Case(B=1, T=9, HV=1, K=4, V=4, M=40, k=3),
    "collapsed": Case(T=90, routing="collapsed", k=1),
    "a memory without tokens": Case(routing="one unused"),
    "packed": Case(B=1, T=70, lengths=(20, 0, 1, 49), shared=True),
    "capacity, newest go": Case(capacity=5),
    "capacity, oldest go": Case(capacity=5, drop="oldest", shared=True),
    "capacity zero": Case(capacity=0, shared=True),
    "padding": Case(masked=True, shared=True),
    "grouped heads, norm": Case(H=2, HV=4, l2norm=True, T=20),
}


# In the simulator, the cases in float32 and the two that reach all code in every dtype.
IN_DTYPES = {
    f"{name}-{str(dtype).removeprefix('torch.')}": replace(case, dtype=dtype)
    for name, case in CASES.items()
    for dtype in DTYPES
    if not CUDA_PATH or dtype == torch.float32 or name in ("shared memory", "packed")
}


@pytest.mark.parametrize("case", IN_DTYPES.values(), ids=IN_DTYPES.keys())
def test_routed_is_masked_dense(case):
    check(case)


def test_no_gate():
    inputs = make_inputs(Case(), requires_grad=False)
    inputs.tensors["g"] = None
    have = inputs.call()
    inputs.tensors["g"] = torch.zeros_like(inputs.tensors["beta"])
    for a, b in zip(have, inputs.call(), strict=True):
        torch.testing.assert_close(a, b)


def test_all_memories_are_the_sum_of_dense_ones():
    inputs = make_inputs(Case(M=3, k=3, per_choice=True), requires_grad=False)
    x = inputs.tensors
    o, state = inputs.call()
    total = torch.zeros_like(o)
    for m in range(3):
        j = (inputs.indices == m).int().argmax(-1)
        own = [x[n].gather(2, j.view(*j.shape, *[1] * (x[n].dim() - 2)).expand(-1, -1, 1, *x[n].shape[3:]))[:, :, 0]
               for n in ("q", "k", "v", "g", "beta")]  # fmt: skip
        dense, final = ops.chunk_gated_delta_rule(
            *own, initial_state=x["initial_state"][:, m].contiguous(), output_final_state=True
        )
        total += x["weights"].gather(2, j[..., None])[..., None] * dense
        assert torch.equal(state[:, m], final)
    torch.testing.assert_close(o, total)


def test_a_memory_without_tokens_keeps_its_state_to_the_bit():
    inputs = make_inputs(Case(T=90, routing="collapsed", k=1))
    _, state = inputs.call()
    assert torch.equal(state[:, 1:], inputs.tensors["initial_state"][:, 1:])
    assert not torch.equal(state[:, 0], inputs.tensors["initial_state"][:, 0])


def test_a_thousand_memories_of_which_three_are_used():
    """The same bits as with three, and the states of the others as they were."""
    few = make_inputs(Case(B=1, M=3, K=4, V=4), requires_grad=False)
    names = torch.tensor([7, 500, 1000])
    states = torch.randn(1, 1001, 2, 4, 4)
    states[:, names] = few.tensors["initial_state"]
    many = replace(
        few, case=replace(few.case, M=1001), indices=names[few.indices.long()],
        tensors=few.tensors | {"initial_state": states},
    )  # fmt: skip
    (o, final), (want, want_final) = many.call(), few.call()
    assert torch.equal(o, want)
    assert torch.equal(final[:, names], want_final)
    used = torch.zeros(1001, dtype=torch.bool).index_fill(0, names, True)
    assert torch.equal(final[:, ~used], states[:, ~used])


def test_a_plan_at_hand_is_the_same():
    inputs = make_inputs(Case(shared=True, capacity=7), requires_grad=False)
    want = inputs.call()
    plan = ops.route_plan(inputs.indices, inputs.case.M, **inputs.plan_options())
    have = ops.mom_gated_delta_rule(
        **inputs.tensors, indices=inputs.indices, num_memories=3, output_final_state=True, plan=plan, shared_memory=True
    )
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


def test_gates_from_logits():
    inputs = make_inputs(Case(T=20), requires_grad=False)
    A_log, dt_bias = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)
    logits = {"g": torch.randn(2, 20, 2, requires_grad=True), "beta": torch.randn(2, 20, 2, requires_grad=True)}
    call = {"indices": inputs.indices, "num_memories": 3}
    o, _ = ops.mom_gated_delta_rule(
        **(inputs.tensors | logits), **call, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
    )  # fmt: skip
    gates = {
        "g": -A_log.exp() * torch.nn.functional.softplus(logits["g"] + dt_bias),
        "beta": 2 * logits["beta"].sigmoid(),
    }
    want, _ = ops.mom_gated_delta_rule(**(inputs.tensors | gates), **call)
    torch.testing.assert_close(o, want)
    leaves = [A_log, dt_bias, *logits.values()]
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (o, want)), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_decode_is_prefill(shared, pool):
    inputs = make_inputs(Case(T=12, shared=shared), requires_grad=False)
    whole, final = inputs.call()
    x = dict(inputs.tensors)
    state = x.pop("initial_state").clone()
    slots = torch.tensor([3, 1]) if pool else None
    if pool:
        state = torch.randn(5, *state.shape[1:])
        state[slots] = inputs.tensors["initial_state"]
    before = state.clone()
    for t in range(12):
        token = {name: y[:, t : t + 1] for name, y in x.items()}
        o = ops.mom_gated_delta_rule_step(
            **token, indices=inputs.indices[:, t : t + 1], state=state, shared_memory=shared, state_indices=slots
        )
        torch.testing.assert_close(o[:, 0], whole[:, t])
    torch.testing.assert_close(state if slots is None else state[slots], final)
    if pool:
        assert torch.equal(state[[0, 2, 4]], before[[0, 2, 4]])


@torch.no_grad()
def test_decode_touches_the_chosen_memories_only():
    inputs = make_inputs(Case(T=1, M=5, shared=True), requires_grad=False)
    x = dict(inputs.tensors)
    state = x.pop("initial_state")
    state = torch.where(torch.ones(2, 6, 1, 1, 1, dtype=torch.bool), state, 0)
    chosen = torch.zeros(2, 6, dtype=torch.bool).scatter(1, inputs.indices[:, 0].long(), True)
    chosen[:, 5] = True
    state[~chosen] = torch.nan  # neither read nor written
    before = state.clone()
    o = ops.mom_gated_delta_rule_step(**x, indices=inputs.indices, state=state, shared_memory=True)
    assert o.isfinite().all()
    assert torch.equal((state != before).flatten(2).any(-1) & chosen, chosen)
    assert state[~chosen].isnan().all()
    again = before.clone()
    slots = torch.tensor([-1, 1])
    o = ops.mom_gated_delta_rule_step(**x, indices=inputs.indices, state=again, shared_memory=True, state_indices=slots)
    assert not o[0].any()
    assert torch.equal(again[0].nan_to_num(), before[0].nan_to_num())
    assert torch.equal(again[1].nan_to_num(), state[1].nan_to_num())


@pytest.mark.parametrize("packed", [False, True])
def test_a_wild_index_is_no_choice(packed):
    case = Case(B=1, T=30, lengths=(10, 20)) if packed else Case(T=15)
    inputs = make_inputs(case)
    inputs.indices[:, 3:6] = torch.tensor([-1, case.M])
    inputs.indices[:, 7, 0] = 2**31 - 1
    inputs.indices[:, 8, 1] = -(2**31)
    actual, want = results(inputs.call(), inputs.tensors, inputs), oracle(inputs)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not actual["o"][:, 3:6].any()


def test_no_index_or_offset_of_a_plan_reaches_outside():
    """The operator below the checks: wild offsets mean the ends, whatever order they stand in nothing is lost."""
    indices = torch.randint(0, 3, (30, 2)).int()
    plan = torch.ops.remora.route_plan
    tame = plan(indices, torch.tensor([0, 10, 30], dtype=torch.int32), None, 30, 3, True, -1, False)
    wild = plan(indices, torch.tensor([-(2**31), 10, 2**31 - 1], dtype=torch.int32), None, 30, 3, True, -1, False)
    assert all(torch.equal(a, b) for a, b in zip(wild, tame, strict=True))
    indices[3], indices[17] = 2**31 - 1, -(2**31)
    for offsets in ([5, 2**31 - 1, -7, 3], [30, 20, 10, 0], [7, 7, 7, 7]):
        rows, positions, bounds, counts = plan(
            indices, torch.tensor(offsets, dtype=torch.int32), None, 30, 3, True, 2, True
        )
        assert torch.equal(rows.sort().values, torch.arange(90, dtype=torch.int32))
        assert torch.equal(rows[positions.long()], torch.arange(90, dtype=torch.int32))
        assert bounds[0] == 0
        assert 0 <= bounds[-1] <= 90
        assert (bounds.diff() >= 0).all()
        assert (counts >= 0).all()


def test_errors():
    logits = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="topk"):
        ops.mom_route(logits, 4)
    with pytest.raises(TypeError, match="mask"):
        ops.mom_route(logits, 1, mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="drop"):
        ops.route_plan(torch.zeros(1, 4, 2, dtype=torch.int32), 3, drop="middle")
    with pytest.raises(ValueError, match="choices"):
        ops.mom_combine(torch.randn(4, 4, 1, 2), torch.rand(1, 4, 2))
    inputs = make_inputs(Case(T=4), requires_grad=False)
    call = {"indices": inputs.indices, "num_memories": 3}
    with pytest.raises(ValueError, match=r"weights must have shape \[B, T, k\]"):
        ops.mom_gated_delta_rule(**(inputs.tensors | {"weights": torch.rand(2, 4, 3)}), **call)
    with pytest.raises(ValueError, match="initial_state must have shape"):
        ops.mom_gated_delta_rule(**(inputs.tensors | {"initial_state": torch.zeros(2, 4, 2, 16, 24)}), **call)
    with pytest.raises(ValueError, match="v must start with"):
        ops.mom_gated_delta_rule(**(inputs.tensors | {"v": torch.zeros(2, 5, 2, 24)}), **call)
    with pytest.raises(TypeError, match="indices must"):
        ops.mom_gated_delta_rule(**inputs.tensors, indices=inputs.indices.float(), num_memories=3)
    with pytest.raises(ValueError, match="use_gate_in_kernel=True needs g"):
        ops.mom_gated_delta_rule(**(inputs.tensors | {"g": None}), **call, use_gate_in_kernel=True)
    several = {name: x for name, x in inputs.tensors.items() if name != "initial_state"}
    step = {name: x[:, :1] for name, x in several.items()}
    state = torch.zeros(2, 3, 2, 16, 24)
    with pytest.raises(ValueError, match="T = 1 in a step"):
        ops.mom_gated_delta_rule_step(**several, indices=inputs.indices, state=state)
    with pytest.raises(ValueError, match="state must be contiguous"):
        ops.mom_gated_delta_rule_step(**step, indices=inputs.indices[:, :1], state=state[0])
    with pytest.raises(ValueError, match="has no gradient"):
        ops.mom_gated_delta_rule_step(
            **(step | {"q": step["q"].clone().requires_grad_()}), indices=inputs.indices[:, :1], state=state
        )
