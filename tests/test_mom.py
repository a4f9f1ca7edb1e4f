"""Mixture-of-Memories: the router, the plan, and the routed recurrence against every memory run densely."""

import pytest
import torch
import torch.nn.functional as F

from remora import ops
from remora.ops.routed.naive import naive_mom_gated_delta_rule, naive_mom_route
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(("M", "k"), [(4, 2), (1, 1), (5, 5), (70, 3)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_route(M, k, renormalize, masked):
    logits = torch.randn(2, 75, M, requires_grad=True)
    mask = torch.rand(2, 75) > 0.3 if masked else None
    route = ops.mom_route(logits, k, mask=mask, renormalize=renormalize)
    oracle_logits = logits.detach().double().requires_grad_()
    oracle = naive_mom_route(oracle_logits, k, mask, renormalize)
    plain_logits = logits.detach().requires_grad_()
    plain = naive_mom_route(plain_logits, k, mask, renormalize)
    assert torch.equal(route.indices, oracle[1])
    assert torch.equal(route.hits, oracle[4])
    d = torch.randn(2, 75, k)
    grads = []
    for x, leaf in ((route, logits), (oracle, oracle_logits), (plain, plain_logits)):
        loss = (x[0] * d).sum() + 3 * x[2] + 0.5 * x[3]
        grads.append(torch.autograd.grad(loss, leaf)[0])
    for name, i in (("weights", 0), ("balance", 2), ("z", 3)):
        assert_accurate(route[i].detach(), oracle[i].detach(), plain[i].detach(), name, dtype=torch.float32)
    assert_accurate(*grads, "dlogits", dtype=torch.float32)


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
    for begin, end in bounds:
        for m in range(M + shared):
            rows = [
                j * B * T + t
                for t in range(begin, end)
                for j in range(k + shared)
                if mask.view(-1)[t] and (m == M if j == k else m < M and indices.view(-1, k)[t, j] == m)
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


def inputs(B=2, T=9, H=1, HV=2, K=4, V=3, M=3, k=2, J=None, dtype=torch.float64, N=None, shared=False):
    per = () if J is None else (J,)
    x = {
        "q": F.normalize(torch.randn(B, T, *per, H, K), dim=-1),
        "k": F.normalize(torch.randn(B, T, *per, H, K), dim=-1),
        "v": torch.randn(B, T, *per, HV, V),
        "g": F.logsigmoid(torch.randn(B, T, *per, HV) + 2),
        "beta": torch.rand(B, T, *per, HV),
        "weights": torch.rand(B, T, k),
        "initial_state": torch.randn(N or B, M + shared, HV, K, V),
    }
    indices = torch.rand(B, T, M).argsort(-1)[..., :k]
    return {name: y.to(dtype).requires_grad_() for name, y in x.items()}, indices


@pytest.mark.cpu_only
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("per_choice", [False, True])
@pytest.mark.parametrize(("M", "k"), [(3, 2), (2, 1), (3, 3), (6, 1)])
def test_routed_is_masked_dense(shared, per_choice, M, k):
    x, indices = inputs(T=40, M=M, k=k, J=k + shared if per_choice else None, shared=shared)
    have = ops.mom_gated_delta_rule(**x, indices=indices, num_memories=M, shared_memory=shared, output_final_state=True)
    want = naive_mom_gated_delta_rule(**x, indices=indices, num_memories=M, shared_memory=shared)
    d = [torch.randn_like(y) for y in want]
    for name, a, b in zip(("o", "state"), have, want, strict=True):
        assert_accurate(a.detach(), b.detach(), None, name, dtype=torch.float64)
    grads = [torch.autograd.grad(y, list(x.values()), d) for y in (have, want)]
    for name, a, b in zip(x, *grads, strict=True):
        assert_accurate(a, b, None, f"d{name}", dtype=torch.float64, gradient=True)


@pytest.mark.cpu_only
def test_one_memory_gets_everything_and_others_keep_their_state():
    x, indices = inputs(T=200, M=3, k=1)
    indices = torch.full_like(indices, 1)
    o, state = ops.mom_gated_delta_rule(**x, indices=indices, num_memories=3, output_final_state=True)
    want, _ = naive_mom_gated_delta_rule(**x, indices=indices, num_memories=3)
    assert_accurate(o.detach(), want.detach(), None, "o", dtype=torch.float64)
    assert torch.equal(state[:, [0, 2]], x["initial_state"][:, [0, 2]])


@pytest.mark.cpu_only
def test_gradcheck():
    x, indices = inputs(T=5, K=2, V=2)

    def call(*tensors):
        return ops.mom_gated_delta_rule(
            **dict(zip(x, tensors, strict=True)), indices=indices, num_memories=3, output_final_state=True
        )

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.cpu_only
@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_decode_is_prefill(shared):
    x, indices = inputs(T=12, shared=shared)
    whole, final = ops.mom_gated_delta_rule(
        **x, indices=indices, num_memories=3, shared_memory=shared, output_final_state=True
    )
    state = x.pop("initial_state").clone()
    for t in range(12):
        token = {name: y[:, t : t + 1] for name, y in x.items()}
        o = ops.mom_gated_delta_rule_step(**token, indices=indices[:, t : t + 1], state=state, shared_memory=shared)
        torch.testing.assert_close(o[:, 0], whole[:, t])
    torch.testing.assert_close(state, final)


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
