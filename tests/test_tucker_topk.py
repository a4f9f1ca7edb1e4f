"""Tucker-decomposed retrieval against its definition."""

import pytest
import torch

from remora import ops
from remora.ops.pkm.pk_topk.naive import naive_order, naive_tucker_topk
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


def inputs(T=5, Hq=2, H=2, n=20, ds=6, r=2, h=2, rq=None, make=integers):
    return (
        make(T, Hq, 2, r if rq is None else rq, ds), make(H, 2, n, ds, r), make(h, H, r, r), make(H, r), make(H, r),
    )  # fmt: skip


@pytest.mark.parametrize("signs", ["positive", "both"])
@pytest.mark.parametrize(
    ("sizes", "k", "candidates"),
    [
        ({}, 8, 6),
        ({"rq": 1}, 8, 6),
        ({"r": 1}, 5, 8),
        ({"r": 3, "h": 1}, 36, 6),
        ({"r": 5, "h": 3}, 4, 20),
        ({"H": 4, "Hq": 2}, 8, 100),
        ({"n": 7, "T": 1}, 9, 4),
        ({"n": 70, "T": 2, "Hq": 1, "H": 1}, 40, 40),
        ({"n": 40, "T": 2, "Hq": 1, "H": 1}, 1024, 33),
    ],
)
def test_definition(sizes, k, candidates, signs):
    """Small integers: exact sums, and ties everywhere."""
    x = inputs(**sizes)
    scores, slots = ops.tucker_topk(*x, k, candidates=candidates, signs=signs)
    want = naive_tucker_topk(*(y.double() for y in x), k, candidates=candidates, signs=signs)
    assert torch.equal(slots.long(), want[1])
    assert torch.equal(scores.double(), want[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient(dtype):
    query, keys, core, u, t = inputs(T=9, make=lambda *shape: torch.randn(shape))
    query, keys = query.to(dtype), keys.to(dtype)
    d = torch.randn(9, 2, 8, 2)
    slots = ops.tucker_topk(query, keys, core, u, t, 8, candidates=6)[1].long()

    def of_slots(query, keys, core):
        rows, columns = torch.einsum("thard,handr->thanr", query, keys).unbind(2)
        row = rows.gather(2, (slots // 20)[..., None].expand(*slots.shape, 2))
        column = columns.gather(2, (slots % 20)[..., None].expand(*slots.shape, 2))
        return torch.einsum("thkr,chrs,thks->thkc", row, core.to(row), column)

    def run(f, convert):
        leaves = [convert(x).clone().requires_grad_() for x in (query, keys, core)]
        out = f(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, d.to(out))]

    have = run(lambda *x: ops.tucker_topk(*x, u, t, 8, candidates=6)[0], lambda x: x)
    want, plain = run(of_slots, lambda x: x.double()), run(of_slots, lambda x: x)
    for name, *x in zip(("scores", "d_query", "d_keys", "d_core"), have, want, plain, strict=True):
        assert_accurate(*x, name, dtype=dtype, gradient=name != "scores")
    again = run(lambda *x: ops.tucker_topk(*x, u, t, 8, candidates=6)[0], lambda x: x)
    assert all(torch.equal(x, y) for x, y in zip(have, again, strict=True))


@pytest.mark.parametrize("signs", ["positive", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_gradients(dtype, signs):
    query, keys, core, u, t = inputs(n=50, ds=40, make=torch.randn)
    query, keys = query.to(dtype).requires_grad_(), keys.to(dtype).requires_grad_()
    options = {"candidates": 20, "signs": signs}
    scores, slots = ops.tucker_topk(query, keys, core, u, t, 12, **options)
    with torch.no_grad():
        again, same_slots = ops.tucker_topk(query, keys, core, u, t, 12, **options)
    assert torch.equal(slots, same_slots)
    assert torch.equal(scores, again)


@pytest.mark.cpu_only
@pytest.mark.parametrize("rq", [1, 2])
def test_gradcheck(rq):
    query, keys, core, u, t = inputs(T=2, n=6, ds=3, rq=rq, make=lambda *s: torch.randn(s, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in (query, keys, core)]
    assert torch.autograd.gradcheck(lambda *x: ops.tucker_topk(*x, u, t, 5, candidates=4)[0], leaves)


def test_no_gradient_reaches_the_pair():
    query, keys, core, u, t = inputs()
    u.requires_grad_()
    query.requires_grad_()
    scores, _ = ops.tucker_topk(query, keys, core, u, t, 4)
    assert torch.autograd.grad(scores.sum(), u, allow_unused=True) == (None,)


def test_both_signs_find_what_one_misses():
    """Recall of the true best slots on Gaussian scores: about a half, and nearly all."""
    query, keys, _, _, _ = inputs(T=40, n=30, h=1, make=lambda *shape: torch.randn(shape))
    core = torch.tensor([[1.0, 0.1], [0.0, 0.2]]).expand(1, 2, 2, 2).contiguous()
    u, t, _ = ops.tucker_pair(core)
    rows, columns = torch.einsum("thard,handr->thanr", query, keys).unbind(2)
    best = naive_order(torch.einsum("thir,chrs,thjs->thij", rows, core, columns).flatten(2))[..., :8]

    def recall(signs):
        slots = ops.tucker_topk(query, keys, core, u, t, 8, candidates=15, signs=signs)[1]
        return (slots[..., None] == best[..., None, :]).any(-1).float().mean().item()

    assert 0.3 < recall("positive") < 0.7
    assert recall("both") > 0.95


def test_pair_and_its_sign():
    core = torch.randn(2, 3, 2, 2)
    u, t, gap = ops.tucker_pair(core)
    total = core.sum(0)
    values = torch.linalg.svdvals(total)
    torch.testing.assert_close(torch.einsum("hr,hrs,hs->h", u, total, t), values[:, 0])
    torch.testing.assert_close(gap, values[:, 0] / values[:, 1])
    assert (u.sum(-1) >= 0).all()
    # continuous: a core a little further on keeps the sign of either history
    for sign in (1, -1):
        moved = ops.tucker_pair(core + 1e-3 * torch.randn_like(core), (sign * u, sign * t))
        torch.testing.assert_close(moved.u, sign * u, atol=0.05, rtol=0)
        torch.testing.assert_close(moved.t, sign * t, atol=0.05, rtol=0)
    assert ops.tucker_pair(torch.ones(1, 1, 1, 1)).gap.isinf().all()


def test_core_penalty():
    core = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    values = torch.linalg.svdvals(core.detach().sum(0))[:, 1:]
    want = sum(max(0.0, value - 0.15) ** 2 for value in values.flatten().tolist()) / 2
    assert abs(ops.tucker_core_penalty(core).item() - want) < 1e-12
    assert torch.autograd.gradcheck(ops.tucker_core_penalty, core)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 17}, r"k .* must be in 1...16, got 17"),
        ({"candidates": 0}, "candidates must be in 1...512, got 0"),
        ({"signs": "negative"}, "signs must be 'positive' or 'both'"),
        ({"query": torch.zeros(5, 2, 2, 3, 6)}, "query must have rq = 1 or r = 2, got 3"),
        ({"query": torch.zeros(5, 3, 2, 2, 6)}, "divides H = 2, got 3"),
        ({"keys": torch.zeros(2, 2, 20, 6)}, "keys must have shape"),
        ({"core": torch.zeros(2, 2, 3, 3)}, "core must have shape"),
        ({"u": torch.zeros(2, 3)}, "u must have shape"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("query", "keys", "core", "u", "t"), inputs(), strict=True))
    arguments |= {"k": 4, "candidates": 4, **change}
    with pytest.raises(ValueError, match=message):
        ops.tucker_topk(**arguments)


def test_compile():
    x = inputs()
    have = torch.compile(lambda *x: ops.tucker_topk(*x, 4), fullgraph=True, backend="aot_eager")(*x)
    assert all(torch.equal(a, b) for a, b in zip(have, ops.tucker_topk(*x, 4), strict=True))
    index = torch.randint(20, (5, 2, 2, 7), dtype=torch.int32)
    arguments = (x[0], x[1].movedim(-1, 2).contiguous(), index, x[2].sum(0), 5, 4)
    torch.library.opcheck(torch.ops.remora.tucker_select.default, arguments)


def test_sub_keys_outside_the_table_score_zero():
    """Only a direct call gets that far."""
    query, keys, core, _, _ = inputs(T=1, Hq=1, H=1, r=2, n=4, h=1, make=torch.ones)
    index = torch.tensor([[[[-1, 3, 2**31 - 1], [0, 4, -(2**31)]]]], dtype=torch.int32)
    by_rank = keys.movedim(-1, 2).contiguous()
    chosen, sub_scores = torch.ops.remora.tucker_select(query, by_rank, index, core.sum(0), 9, 3)
    valid = (chosen >= 0) & (chosen < 4)
    assert valid.any()
    assert torch.equal(sub_scores, (6.0 * valid).unsqueeze(3).expand(sub_scores.shape))
