"""Product-key selection: every pair scored and sorted is the oracle, compared to the bit."""

import pytest
import torch

from remora import ops
from remora.ops.pkm.pk_topk.naive import naive_order, naive_pk_select, naive_pk_topk, naive_sub_scores
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def same_bits(have, want):
    """Equal scores and slots; -0 is +0, and any NaN a NaN."""
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=0, equal_nan=True)


def normal(*shape):
    return torch.randn(shape)


def quantised(*shape):
    return torch.randint(-2, 3, shape) / 2.0


def colliding(*shape):
    """Sums of many pairs round to the same number."""
    return 1e6 + torch.randn(shape) * 0.1


def signed_zeros(*shape):
    return torch.where(torch.rand(shape) < 0.5, -0.0, 0.0) + torch.randint(0, 2, shape) * torch.finfo().tiny


def infinite(*shape):
    return torch.tensor([torch.inf, -torch.inf, 0.0, 1.0])[torch.randint(0, 4, shape)]


def with_nan(*shape):
    x = infinite(*shape)
    return torch.where(torch.rand(shape) < 0.1, torch.nan, x)


def huge(*shape):
    """Sums overflow."""
    return torch.randn(shape) * 3e38


VALUES = [normal, quantised, colliding, signed_zeros, infinite, with_nan, huge, torch.zeros]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("n", "k"), [(37, 8), (130, 32), (7, 49)])
def test_select_is_brute_force(values, n, k):
    sub_scores = values(3, 2, 2, n)
    same_bits(ops.pk_select(sub_scores, k), naive_pk_select(sub_scores, k))


@pytest.mark.parametrize(
    ("n", "k", "T", "H"),
    [
        (1, 1, 2, 1), (2, 4, 3, 1), (33, 1, 5, 3), (8, 64, 2, 2), (33, 100, 2, 1), (100, 33, 2, 1), (300, 128, 1, 1),
        (600, 130, 1, 1), (32, 1024, 1, 1), (64, 8, 70, 1), (16, 4, 2, 32), (1100, 32, 1, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("values", [normal, quantised])
def test_select_shapes(n, k, T, H, values):
    sub_scores = values(T, H, 2, n)
    same_bits(ops.pk_select(sub_scores, k), naive_pk_select(sub_scores, k))


@pytest.mark.parametrize("values", [normal, torch.zeros])
def test_select_largest(values):
    sub_scores = values(1, 1, 2, 8192)
    have = ops.pk_select(sub_scores, 1024)
    # the square of the 1024 best holds the answer; the oracle of all 2^26 pairs would take minutes
    same_bits(have, naive_pk_select(sub_scores, 1024, candidates=1024))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_select_dtypes(dtype, backend):
    if dtype == torch.float64 and backend != "cpu":
        with pytest.raises(TypeError, match="sub_scores must have dtype"):
            ops.pk_select(torch.zeros(1, 1, 2, 4, dtype=dtype), 2)
        return
    sub_scores = torch.randn(5, 2, 2, 40).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores, slots = ops.pk_select(sub_scores, 16)
    assert (scores.dtype, slots.dtype) == (wide, torch.int32)
    same_bits((scores, slots), naive_pk_select(sub_scores.to(wide), 16))


def test_candidates_are_a_square():
    sub_scores = torch.randn(20, 1, 2, 50)
    for candidates in (6, 10, 32, 50):
        have = ops.pk_select(sub_scores, 32, candidates=candidates)
        same_bits(have, naive_pk_select(sub_scores, 32, candidates=candidates))
    few = ops.pk_select(sub_scores, 32, candidates=6)[1]
    assert not torch.equal(few, ops.pk_select(sub_scores, 32)[1])  # an approximation


def test_a_constant_on_one_axis_changes_no_slot():
    sub_scores = torch.randint(-1000, 1000, (4, 2, 2, 60)).float()
    slots = ops.pk_select(sub_scores, 24)[1]
    sub_scores[:, :, 1] += 64
    assert torch.equal(slots, ops.pk_select(sub_scores, 24)[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "H", "n", "ds", "k"),
    [(5, 2, 40, 16, 8), (1, 1, 1, 1, 1), (33, 1, 130, 70, 32), (3, 2, 9, 5, 81), (2, 3, 17, 64, 12), (40, 1, 20, 3, 7)],
)
def test_topk_of_exact_products(dtype, T, H, n, ds, k):
    """Small integers, whose products every backend adds without rounding: the bits of the oracle, ties and all."""
    query = torch.randint(-3, 4, (T, H, 2, ds)).to(dtype)
    keys = torch.randint(-3, 4, (H, 2, n, ds)).to(dtype)
    same_bits(ops.pk_topk(query, keys, k), naive_pk_topk(query, keys, k))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", ["dot", "cosine", "idw"])
def test_topk_of_any_score(dtype, score):
    T, H, n, ds, k = 9, 2, 50, 24, 20
    query, keys = torch.randn(T, H, 2, ds).to(dtype), torch.randn(H, 2, n, ds).to(dtype)
    scores, slots = ops.pk_topk(query, keys, k, score=score, tau=3.0)
    exact = naive_sub_scores(query.double(), keys.double(), score, tau=3.0)
    plain = naive_sub_scores(query.float(), keys.float(), score, tau=3.0)
    # scores of the slots, and of the best there are
    rows, columns = slots.long() // n, slots.long() % n
    for oracle, yardstick in (
        (exact[:, :, 0].gather(-1, rows) + exact[:, :, 1].gather(-1, columns),
         plain[:, :, 0].gather(-1, rows) + plain[:, :, 1].gather(-1, columns)),
        (naive_pk_select(exact, k)[0], naive_pk_select(plain, k)[0]),
    ):  # fmt: skip
        assert_accurate(scores, oracle, yardstick, "scores", dtype=torch.float32)
    assert (scores.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == k for row in slots.flatten(0, 1).tolist())


def test_idw_of_a_key_that_is_the_query():
    keys = torch.randn(1, 2, 10, 8)
    query = keys[:, :, 3][None].clone()
    scores, slots = ops.pk_topk(query, keys, 1, score="idw", eps=1e-3)
    assert slots.item() == 33
    assert abs(scores.item() + 2 * torch.tensor(1e-3).log().item()) < 0.05


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_independence_and_repeats(dtype):
    query, keys = torch.randn(37, 2, 2, 20).to(dtype), torch.randn(2, 2, 60, 20).to(dtype)
    whole = ops.pk_topk(query, keys, 16)
    same_bits(ops.pk_topk(query, keys, 16), whole)
    same_bits(ops.pk_topk(query[5:6], keys, 16), [x[5:6] for x in whole])
    same_bits(ops.pk_topk(query[20:], keys, 16), [x[20:] for x in whole])
    same_bits(ops.pk_topk(query[:, 1:], keys[1:], 16), [x[:, 1:] for x in whole])
    query[3] = torch.nan
    others = [i for i in range(37) if i != 3]
    same_bits([x[others] for x in ops.pk_topk(query, keys, 16)], [x[others] for x in whole])


@pytest.mark.cpu_only
def test_threads_change_no_bit():
    query, keys = torch.randn(300, 2, 2, 20), torch.randn(2, 2, 60, 20)
    threads = torch.get_num_threads()
    want = ops.pk_topk(query, keys, 16)
    try:
        torch.set_num_threads(1)
        same_bits(ops.pk_topk(query, keys, 16), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.sim_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_choice_is_written(dtype):
    """Neither the scores of the sub-keys nor sums of pairs reach device memory."""
    from remora.testing import sim

    T, H, n, ds, k = 40, 2, 128, 32, 16
    query, keys = torch.randn(T, H, 2, ds).to(dtype), torch.randn(H, 2, n, ds).to(dtype)
    with sim.options(memory_stats=1):
        sim.reset_stats()
        scores, slots = ops.pk_topk(query, keys, k)
        (counters,) = sim.stats().values()
    assert counters["global_store"]["bytes"] == scores.nbytes + slots.nbytes
    assert counters["global_store"]["bytes"] == T * H * k * 8


def test_strided_inputs_and_no_tokens():
    query, keys = torch.randn(2, 6, 2, 10).transpose(0, 1), torch.randn(2, 2, 10, 12).mT
    same_bits(ops.pk_topk(query, keys, 5), ops.pk_topk(query.contiguous(), keys.contiguous(), 5))
    scores, slots = ops.pk_topk(query[:0], keys, 5)
    assert scores.shape == slots.shape == (0, 2, 5)
    # 16-byte copies are not possible
    odd = torch.randn(6 * 2 * 2 * 10 + 1)[1:].view(6, 2, 2, 10)
    same_bits(ops.pk_topk(odd, keys, 5), ops.pk_topk(odd.clone(), keys, 5))


def test_select_gradient():
    sub_scores = quantised(6, 2, 2, 30).requires_grad_()
    d = torch.randn(6, 2, 40)
    (have,) = torch.autograd.grad(ops.pk_select(sub_scores, 40)[0], sub_scores, d)
    exact = sub_scores.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(naive_pk_select(exact, 40)[0], exact, d.double())
    (plain,) = torch.autograd.grad(naive_pk_select(sub_scores, 40)[0], sub_scores, d)
    assert_accurate(have, want, plain, "d_sub_scores", dtype=torch.float32, gradient=True)
    (again,) = torch.autograd.grad(ops.pk_select(sub_scores, 40)[0], sub_scores, d)
    assert torch.equal(have, again)


@pytest.mark.cpu_only
def test_select_gradcheck():
    sub_scores = torch.randn(3, 2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.pk_select(x, 12)[0], sub_scores)


def test_slots_outside_of_the_memory_are_dropped():
    slots = torch.tensor([[[5, -1, 16, 5, 2**31 - 1]]], dtype=torch.int32)
    d = torch.ops.remora.pk_select_bwd(slots, torch.ones(1, 1, 5), 4)
    assert d.tolist() == [[[[0, 2, 0, 0], [0, 2, 0, 0]]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k .* must be in 1...100, got 0"),
        ({"k": 101}, r"k .* must be in 1...100, got 101"),
        ({"candidates": 11}, r"candidates .* must be in 1...10, got 11"),
        ({"candidates": 2}, "candidates must have a square of at least k = 5, got 2"),
        ({"score": "l2"}, "score must be one of 'dot', 'cosine', 'idw', got 'l2'"),
        ({"score": "idw", "eps": 0.0}, "eps must be positive"),
        ({"query": torch.zeros(3, 2, 2)}, "query must have shape"),
        ({"query": torch.zeros(3, 1, 2, 4)}, r"keys must have shape"),
        ({"keys": torch.zeros(2, 2, 10, 5)}, r"keys must have shape"),
        ({"keys": torch.zeros(2, 2, 8193, 4)}, r"n of keys .* must be in 1...8192, got 8193"),
    ],
)
def test_errors(change, message):
    arguments = {"query": torch.zeros(3, 2, 2, 4), "keys": torch.zeros(2, 2, 10, 4), "k": 5, **change}
    with pytest.raises(ValueError, match=message):
        ops.pk_topk(**arguments)


def test_type_errors():
    with pytest.raises(TypeError, match="keys must have dtype"):
        ops.pk_topk(torch.zeros(3, 2, 2, 4), torch.zeros(2, 2, 10, 4).bfloat16(), 5)
    with pytest.raises(TypeError, match="query must be a tensor"):
        ops.pk_topk(3, torch.zeros(2, 2, 10, 4), 5)
    with pytest.raises(ValueError, match=r"k .* must be in 1...1024"):
        ops.pk_select(torch.zeros(1, 1, 2, 40), 1025)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", ["dot", "cosine", "idw"])
def test_topk_gradient(dtype, score):
    T, H, n, ds, k = 70, 2, 40, 24, 12
    query, keys = torch.randn(T, H, 2, ds).to(dtype), torch.randn(H, 2, n, ds).to(dtype)
    d = torch.randn(T, H, k)

    def grads(f, convert):
        q, key = (convert(x).detach().requires_grad_() for x in (query, keys))
        return torch.autograd.grad(f(q, key), (q, key), d.to(torch.promote_types(q.dtype, torch.float32)))

    slots = ops.pk_topk(query, keys, k, score=score, tau=3.0)[1].long()

    def of_slots(q, key):
        """The same slots, whatever rounding would choose."""
        x = naive_sub_scores(q, key, score, tau=3.0)
        return x[:, :, 0].gather(-1, slots // n) + x[:, :, 1].gather(-1, slots % n)

    have = grads(lambda q, key: ops.pk_topk(q, key, k, score=score, tau=3.0)[0], lambda x: x.clone())
    want = grads(of_slots, lambda x: x.double())
    plain = grads(of_slots, lambda x: x.clone())
    for name, *x in zip(("d_query", "d_keys"), have, want, plain, strict=True):
        assert x[0].dtype == dtype
        assert_accurate(*x, name, dtype=dtype, gradient=True)
    again = grads(lambda q, key: ops.pk_topk(q, key, k, score=score, tau=3.0)[0], lambda x: x.clone())
    assert all(torch.equal(x, y) for x, y in zip(have, again, strict=True))


@pytest.mark.parametrize("k", [1, 100, 1024])
def test_topk_gradient_of_many_slots(k):
    """More slots than sub-keys: every row and column is chosen many times."""
    query, keys = torch.randint(-3, 4, (3, 1, 2, 130)).float(), torch.randint(-3, 4, (1, 2, 33, 130)).float()
    query, keys = query.requires_grad_(), keys.requires_grad_()
    d = torch.randint(-2, 3, (3, 1, k)).float()  # integers: exact sums
    have = torch.autograd.grad(ops.pk_topk(query, keys, k)[0], (query, keys), d)
    want = torch.autograd.grad(naive_pk_topk(query, keys, k)[0], (query, keys), d)
    same_bits(have, want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("score", ["dot", "cosine", "idw"])
def test_topk_gradcheck(score):
    query = torch.randn(3, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, key: ops.pk_topk(q, key, 7, score=score)[0], (query, keys))


def test_no_second_derivative():
    query, keys = torch.randn(2, 1, 2, 4, requires_grad=True), torch.randn(1, 2, 5, 4, requires_grad=True)
    (d,) = torch.autograd.grad(ops.pk_topk(query, keys, 3)[0].sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d.sum().backward()


def test_a_token_that_is_nan_spoils_no_other_gradient():
    query, keys = torch.randn(20, 1, 2, 8), torch.randn(1, 2, 12, 8)
    query[4] = torch.nan
    query.requires_grad_()
    (d,) = torch.autograd.grad(ops.pk_topk(query, keys, 6)[0].sum(), query)
    assert d[[i for i in range(20) if i != 4]].isfinite().all()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    query = torch.randn(3, 2, 2, 4, requires_grad=needs_grad)
    keys = torch.randn(2, 2, 5, 4, requires_grad=needs_grad)
    sub_scores = torch.randn(3, 2, 2, 5, requires_grad=needs_grad)
    slots = torch.zeros(3, 2, 4, dtype=torch.int32)
    ours = torch.ops.remora
    for op, arguments in (
        (ours.pk_topk_fwd, (query, keys, 4, 4, 0, 1.0, 0.0)),
        (ours.pk_select_fwd, (sub_scores, 4, 4)),
        (ours.pk_select_bwd, (slots, torch.randn(3, 2, 4), 5)),
        (ours.sub_key_scores_fwd, (query.flatten(1, 2), keys.flatten(0, 1), slots.repeat(1, 2, 1))),
        (ours.sub_key_scores_bwd, (query.detach().flatten(1, 2), keys.detach().flatten(0, 1), slots.repeat(1, 2, 1),
                                   torch.randn(3, 4, 4), 2, 1.0, 1e-3)),
    ):  # fmt: skip
        torch.library.opcheck(op.default, arguments)
    with torch.no_grad():
        torch.library.opcheck(ours.pk_axis_topk.default, (query.detach(), keys.detach(), 3, 2, 0, 1.0, 0.0))


def test_compile():
    query, keys = torch.randn(3, 2, 2, 4, requires_grad=True), torch.randn(2, 2, 5, 4, requires_grad=True)

    def f(query, keys):
        scores, slots = ops.pk_topk(query, keys, 4)
        return scores, slots + 1

    have = torch.compile(f, fullgraph=True, backend="aot_eager")(query, keys)
    same_bits(have, f(query, keys))
    want = torch.autograd.grad(f(query, keys)[0].sum(), (query, keys))
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(have[0].sum(), (query, keys)), want, strict=True))


@pytest.mark.parametrize("lowest", [0, 3, 12])
def test_axis_order(lowest):
    query, keys = torch.randint(-2, 3, (5, 2, 2, 6)).float(), torch.randint(-2, 3, (2, 2, 20, 6)).float()
    scores, index = torch.ops.remora.pk_axis_topk(query, keys, 8, lowest, 0, 1.0, 0.0)
    exact = naive_sub_scores(query, keys)
    order = naive_order(exact)
    want = torch.cat([order[..., :8], order.flip(-1)[..., :lowest]], -1)
    same_bits((scores, index), (exact.gather(-1, want), want))
