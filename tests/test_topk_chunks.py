"""Selection of chunks: every chunk scored and sorted is the oracle. Indices are compared to the bit where products are
exact.
"""

import pytest
import torch
from torch.library import opcheck

from remora import ops
from remora.ops.segment.topk_chunks.naive import naive_all_scores, naive_chunk_scores, naive_topk_chunks
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LISTS = {"per_head": lambda H, Hk: H, "kv_group": lambda H, Hk: Hk, "shared": lambda H, Hk: 1}


def make(B=1, T=21, S=40, H=4, Hk=2, D=16, dtype=torch.float32, low=-3, high=4):
    """Small integers, whose products every backend adds without rounding."""
    q = torch.randint(low, high, (B, T, H, D)).to(dtype)
    k_sum = torch.randint(low, high, (B, S, Hk, D)).to(dtype)
    return q, k_sum


def same_bits(have, want):
    """Equal scores and indices; -0 is +0, and any NaN a NaN."""
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=0, equal_nan=True)


def check_exact(q, k_sum, k, group="per_head", **options):
    have = ops.topk_chunks(q, k_sum, k, group=group, scale=0.25, **options)
    options.pop("score", None)
    want = naive_topk_chunks(q, k_sum, k, lists=LISTS[group](q.shape[2], k_sum.shape[2]), scale=0.25, **options)
    same_bits(have, want)
    return have


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", LISTS)
def test_exact_products(dtype, group):
    check_exact(*make(dtype=dtype), 8, group, stride=1)


@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ({"T": 1, "S": 1, "H": 1, "Hk": 1, "D": 1}, 1), ({"T": 130, "S": 12, "H": 1, "Hk": 1}, 3),
        ({"T": 3, "S": 200, "H": 2, "Hk": 1, "D": 70}, 16), ({"T": 3, "S": 300, "H": 1, "Hk": 1, "D": 256}, 64),
        ({"B": 3, "T": 5, "S": 70, "H": 6, "Hk": 2, "D": 24}, 1), ({"T": 2, "S": 600, "H": 1, "Hk": 1}, 130),
        ({"T": 2, "S": 700, "H": 1, "Hk": 1}, 512), ({"T": 9, "S": 65, "H": 16, "Hk": 1, "D": 8}, 4),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("group", ["per_head", "shared"])
def test_shapes(sizes, k, group):
    check_exact(*make(**sizes), k, group)


@pytest.mark.cpu_only
def test_more_chunks_than_a_span():
    check_exact(*make(T=3, S=5000, H=2, Hk=1, D=8), 40, force_first=2, force_local=3)


@pytest.mark.parametrize(("stride", "size"), [(1, 1), (4, None), (4, 9), (10, 11), (3, 1), (50, 60)])
def test_windows(stride, size):
    check_exact(*make(T=70, S=20, H=1, Hk=1), 5, stride=stride, size=size)


def test_strict_windows_are_those_before_the_segment_of_the_query():
    q, k_sum = make(T=25, S=5, H=1, Hk=1)
    idx, _ = ops.topk_chunks(q, k_sum, 5, stride=5, size=6)
    assert torch.equal((idx[0, :, 0] >= 0).sum(-1), torch.arange(25) // 5)


def test_visible_numbers():
    n_visible = torch.randint(-5, 60, (2, 21))
    check_exact(*make(B=2), 8, n_visible=n_visible)


@pytest.mark.parametrize("group", ["per_head", "kv_group"])
@pytest.mark.parametrize(("first", "local"), [(1, 2), (0, 6), (6, 0), (3, 3), (2, 0)])
def test_forced_chunks(first, local, group):
    idx, _ = check_exact(*make(), 6, group, stride=1, force_first=first, force_local=local)
    assert (idx[0, 20, :, : first + local] == torch.tensor([*range(first), *range(21 - local, 21)])).all()


def test_nan_follows_forced_chunks_and_precedes_others():
    q, k_sum = make(T=4, S=30, H=1, Hk=1)
    k_sum[0, [5, 11, 28], 0, 3] = torch.nan
    idx, scores = check_exact(q, k_sum, 6, force_first=1, force_local=2)
    assert idx[0, :, 0].tolist() == [[0, 28, 29, 5, 11, idx[0, t, 0, 5].item()] for t in range(4)]
    assert scores[0, :, 0, [1, 3, 4]].isnan().all()


def test_infinite_scores_have_their_places():
    q, k_sum = make(T=4, S=30, H=1, Hk=1)
    bias = torch.zeros(30)
    bias[:27], bias[4], bias[9] = -torch.inf, torch.inf, torch.nan
    idx, scores = check_exact(q, k_sum, 8, bias=bias)
    assert idx[0, 0, 0, [0, 1]].tolist() == [9, 4]
    assert idx[0, 0, 0, 5:].tolist() == [0, 1, 2]  # chosen, at -infinity
    assert scores[0, 0, 0, 5:].tolist() == [-torch.inf] * 3


def test_equal_scores_by_index():
    q, k_sum = torch.ones(1, 70, 2, 16), torch.ones(1, 200, 2, 16)
    idx, _ = ops.topk_chunks(q, k_sum, 16)
    assert torch.equal(idx, torch.arange(16, dtype=torch.int32).expand(1, 70, 2, 16))
    check_exact(*make(T=5, S=300, low=0, high=2, D=2), 20)
    check_exact(*make(T=5, S=300, low=0, high=2, D=2), 70)


def test_ascending_scores():
    """Every chunk is better than all before it: the longest way through the candidates."""
    q, k_sum = torch.ones(1, 3, 1, 8), torch.arange(400).view(1, 400, 1, 1).expand(1, 400, 1, 8).float()
    check_exact(q, k_sum, 5)
    check_exact(q, k_sum, 100)


@pytest.mark.parametrize("group", LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_weighted(group, dtype):
    q, k_sum = make(dtype=dtype, T=70, S=20)
    w = torch.randint(-2, 3, (1, 70, 4)).float()
    check_exact(q, k_sum, 8, group, score="relu_weighted", w=w, stride=2)


@pytest.mark.parametrize("shape", [(40,), (2, 40), (2, 4, 40)], ids=str)
def test_bias(shape):
    check_exact(*make(B=2), 7, bias=torch.randint(-9, 10, shape).float())


def test_any_numbers_and_groups():
    """Scores of what was chosen, and of the best there are."""
    q, k_sum = torch.randn(1, 40, 6, 64), torch.randn(1, 90, 2, 64)
    for group, lists in (("per_head", 6), ("kv_group", 2), ("shared", 1)):
        idx, scores = ops.topk_chunks(q, k_sum, 12, group=group)
        exact, plain = (naive_all_scores(x, y, lists) for x, y in ((q.double(), k_sum.double()), (q, k_sum)))
        for oracle, yardstick in (
            (exact.gather(-1, idx.long()), plain.gather(-1, idx.long())),
            (exact.topk(12)[0], plain.topk(12)[0]),
        ):
            assert_accurate(scores, oracle, yardstick, group, dtype=torch.float32)


OFFSETS = torch.tensor([0, 7, 7, 47, 60]), torch.tensor([0, 1, 1, 9, 11])


def test_packed_sequences():
    q, k_sum = make(T=60, S=14)
    offsets, offsets_k = OFFSETS
    options = {"stride": 5, "force_local": 1}
    idx, scores = check_exact(q, k_sum, 4, cu_seqlens=offsets, cu_seqlens_k=offsets_k, **options)
    for n in range(4):
        (a, b), (c, d) = offsets[n : n + 2].tolist(), offsets_k[n : n + 2].tolist()
        alone = ops.topk_chunks(q[:, a:b], k_sum[:, c:d], 4, scale=0.25, **options)
        same_bits((idx[:, a:b], scores[:, a:b]), alone)


def test_strided_inputs():
    q, k_sum = make(B=2, T=20, S=30, D=16)
    loose = q.transpose(1, 2).contiguous().transpose(1, 2), k_sum.transpose(2, 3).contiguous().transpose(2, 3)
    same_bits(ops.topk_chunks(*loose, 5), ops.topk_chunks(q, k_sum, 5))
    wide = torch.randn(2, 30, 2, 19)
    view = wide[..., 2:18]
    same_bits(ops.topk_chunks(q, view, 5), ops.topk_chunks(q, view.contiguous(), 5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_independence_and_repeats(dtype):
    q, k_sum = torch.randn(3, 70, 4, 24).to(dtype), torch.randn(3, 90, 2, 24).to(dtype)
    whole = ops.topk_chunks(q, k_sum, 9, stride=1)
    same_bits(ops.topk_chunks(q, k_sum, 9, stride=1), whole)
    same_bits(ops.topk_chunks(q[1:2], k_sum[1:2], 9, stride=1), [x[1:2] for x in whole])
    same_bits(ops.topk_chunks(q[:, :30], k_sum, 9, stride=1), [x[:, :30] for x in whole])
    same_bits(ops.topk_chunks(q[:, :, 2:], k_sum[:, :, 1:], 9, stride=1), [x[:, :, 2:] for x in whole])
    q[1], k_sum[1] = torch.nan, torch.nan
    k_sum[0, 40:] = torch.nan  # not yet visible before token 40
    changed = ops.topk_chunks(q, k_sum, 9, stride=1)
    same_bits([x[2] for x in changed], [x[2] for x in whole])
    same_bits([x[0, :40] for x in changed], [x[0, :40] for x in whole])


@pytest.mark.cpu_only
def test_threads_change_no_bit():
    q, k_sum = torch.randn(1, 300, 2, 20), torch.randn(1, 300, 2, 20)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        runs.append(ops.topk_chunks(q, k_sum, 9, stride=1))
    torch.set_num_threads(threads)
    same_bits(*runs)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}], ids=str)
def test_no_size(sizes):
    q, k_sum = (x.requires_grad_() for x in make(**sizes))
    idx, scores = ops.topk_chunks(q, k_sum, 3, stride=1)
    assert idx.shape == scores.shape == (*q.shape[:3], 3)
    assert (idx == -1).all()
    assert (scores == -torch.inf).all()
    chosen = ops.chunk_scores(q, k_sum, idx)
    grads = torch.autograd.grad(chosen.sum(), [q, k_sum])
    assert not any(g.any() for g in grads)


# ---- scores of chosen chunks


def make_scores(B=2, T=13, S=20, H=4, Hk=2, D=16, k=5, group="per_head", relu=False, bias=False, dtype=torch.float32):
    tensors = {"q": torch.randn(B, T, H, D), "k_sum": torch.randn(B, S, Hk, D)}
    if relu:
        tensors["w"] = torch.randn(B, T, H)
    if bias:
        tensors["bias"] = torch.randn(B, LISTS[group](H, Hk), S)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {n: x.to(dtype if n in ("q", "k_sum") else wide).requires_grad_() for n, x in tensors.items()}
    idx = torch.randint(-1, S + 1, (B, T, LISTS[group](H, Hk), k), dtype=torch.int32)  # repetitions, and S is no chunk
    return tensors, idx, {"group": group, "score": "relu_weighted" if relu else "dot"}


def scores_and_grads(f, tensors, idx, **options):
    scores = f(**tensors, idx=idx, **options)
    torch.manual_seed(1)
    d_scores = torch.randn(idx.shape).to(scores.dtype)
    d_scores[scores == -torch.inf] = torch.nan  # may not be read
    mine = d_scores if f is ops.chunk_scores else d_scores.nan_to_num()
    grads = torch.autograd.grad(scores, list(tensors.values()), mine)
    return {"scores": scores.detach(), **dict(zip(tensors, grads, strict=True))}


def check_scores(tensors, idx, options, dtype=torch.float32, **offsets):
    have = scores_and_grads(ops.chunk_scores, tensors, idx, **options, **offsets)
    results = []
    for wide in (torch.float64, torch.float32):
        leaves = {n: x.detach().to(wide).requires_grad_() for n, x in tensors.items()}
        results.append(scores_and_grads(naive_chunk_scores, leaves, idx, **offsets))
    for name, value in have.items():
        exact, plain = results[0][name], results[1][name].to(value.dtype)
        rule = dtype if name in ("q", "k_sum") else torch.float32
        assert_accurate(value, exact, plain, name, dtype=rule, gradient=name != "scores")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("relu", [False, True], ids=["dot", "relu"])
def test_scores_match_the_definition(dtype, relu):
    check_scores(*make_scores(relu=relu, bias=True, dtype=dtype), dtype)


@pytest.mark.parametrize("relu", [False, True], ids=["dot", "relu"])
@pytest.mark.parametrize("group", LISTS)
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2)], ids=str)
def test_scores_of_groups(group, heads, relu):
    check_scores(*make_scores(B=1, H=heads[0], Hk=heads[1], group=group, relu=relu))


@pytest.mark.parametrize("sizes", [{"D": 1}, {"D": 70}, {"D": 256}, {"k": 1}, {"k": 40}], ids=str)
def test_scores_of_sizes(sizes):
    check_scores(*make_scores(**{"B": 1, **sizes}))


def test_scores_of_one_chunk_that_all_queries_choose():
    tensors, idx, options = make_scores(B=1, T=400, H=4, Hk=1, S=3)
    idx[..., :3] = 1  # segments of several pieces
    check_scores(tensors, idx, options)


def test_scores_of_packed_sequences():
    tensors, idx, options = make_scores(B=1, T=60, S=14)
    idx = torch.randint(-1, 9, idx.shape, dtype=torch.int32)
    check_scores(tensors, idx, options, cu_seqlens=OFFSETS[0], cu_seqlens_k=OFFSETS[1])


def test_chosen_scores_are_those_of_the_selection():
    q, k_sum = make()
    idx, scores = ops.topk_chunks(q, k_sum, 6, stride=1)
    same_bits((ops.chunk_scores(q, k_sum, idx),), (scores,))


def test_gradients_are_reproducible_and_independent_of_the_batch():
    def run(part):
        tensors, idx, options = make_scores(B=3, T=200, S=4)
        tensors = {n: x[part].detach().requires_grad_() for n, x in tensors.items()}
        scores = ops.chunk_scores(**tensors, idx=idx[part], **options)
        return torch.autograd.grad(scores[scores.isfinite()].square().sum(), list(tensors.values()))

    runs = []
    for part in (slice(0, 3), slice(0, 3), slice(1, 2)):
        torch.manual_seed(0)
        runs.append(run(part))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.cpu_only
@pytest.mark.parametrize("relu", [False, True], ids=["dot", "relu"])
def test_gradcheck(relu):
    tensors, idx, options = make_scores(B=1, T=4, S=5, D=3, k=3, bias=True, relu=relu, dtype=torch.float64)
    idx = idx.clamp(0, 4)
    assert torch.autograd.gradcheck(
        lambda *x: ops.chunk_scores(**dict(zip(tensors, x, strict=True)), idx=idx, **options), list(tensors.values())
    )


def test_registration():
    tensors, idx, _ = make_scores(B=1, relu=True)
    args = tensors["q"], tensors["k_sum"]
    opcheck(
        torch.ops.remora.topk_chunks_fwd.default,
        (*(x.detach() for x in args), None, None, None, None, None, 3, 4, 2, 2, 1, 1, 0.5),
    )
    opcheck(torch.ops.remora.chunk_scores_fwd.default, (*args, idx, tensors["w"], None, None, 0.5))

    def f(q, k_sum):
        chosen, _ = ops.topk_chunks(q, k_sum, 4, stride=1)
        return ops.chunk_scores(q, k_sum, chosen, bias=torch.ones(k_sum.shape[1])).softmax(-1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), f(*args))


def test_wild_offsets_stay_within_the_tensors():
    """Only a direct call gets that far; the public function refuses such offsets on the CPU."""
    q, k_sum = make(T=30, S=12)
    offsets = torch.tensor([-(2**31), 2**31 - 1, 5, 40], dtype=torch.int32)
    idx, _ = torch.ops.remora.topk_chunks_fwd(q, k_sum, None, None, None, offsets, offsets, 4, 4, 1, 1, 0, 0, 1.0)
    assert idx.max() < 12
    chosen = torch.full((1, 30, 4, 2), 2**31 - 1, dtype=torch.int32)
    scores = torch.ops.remora.chunk_scores_fwd(q, k_sum, chosen, None, offsets, offsets, 1.0)
    assert (scores == -torch.inf).all()


def wild(*shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def test_wild_indices_stay_within_the_tensors():
    """Only a direct call gets that far."""
    q, k_sum = make(T=30, S=12)
    idx, scores = torch.ops.remora.topk_chunks_fwd(q, k_sum, None, None, wild(1, 30), None, None, 5, 4, 0, 0, 2, 2, 1.0)
    assert -1 <= idx.min() < idx.max() < 12
    assert not scores.isnan().any()
    chosen = torch.where(torch.rand(1, 30, 4, 5) < 0.5, wild(1, 30, 4, 5), idx)
    plan = wild(chosen.numel()), wild(7), wild(8)
    grads = torch.ops.remora.chunk_scores_bwd(q, k_sum, chosen, None, None, None, *plan, torch.ones(chosen.shape), 1.0)
    assert grads[0].isfinite().all()


ERRORS = {
    "q of rank 3": ({"q": torch.randn(4, 5, 6)}, ValueError, r"q must have shape \[B, T, H, D\]"),
    "k_sum of another dtype": ({"k_sum": torch.randn(1, 40, 2, 16).half()}, TypeError, "k_sum must have dtype"),
    "k_sum of other channels": ({"k_sum": torch.randn(1, 40, 2, 8)}, ValueError, "k_sum must have shape"),
    "heads that do not divide": ({"k_sum": torch.randn(1, 40, 3, 16)}, ValueError, "divides H = 4"),
    "no such group": ({"group": "pairs"}, ValueError, "group must be one of"),
    "no such score": ({"score": "cosine"}, ValueError, "score must be one of"),
    "weights of dot": ({"w": torch.randn(1, 21, 4)}, ValueError, "w must be given for score='relu_weighted'"),
    "size alone": ({"size": 3}, ValueError, "size needs stride"),
    "no stride": ({"stride": 0}, ValueError, "stride must be in"),
    "two visibilities": ({"stride": 3, "n_visible": torch.zeros(1, 21).int()}, ValueError, "stands in place"),
    "too many": ({"k": 513}, ValueError, r"k must be in 1\.\.\.512"),
    "more forced than k": ({"force_first": 5, "force_local": 4}, ValueError, "force_local"),
    "bias of other chunks": ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
    "offsets alone": ({"cu_seqlens": torch.tensor([0, 21])}, ValueError, "given together"),
    "offsets beyond the chunks": (
        {"cu_seqlens": torch.tensor([0, 21]), "cu_seqlens_k": torch.tensor([0, 41])}, ValueError, "cu_seqlens_k must"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(change, error, message):
    q, k_sum = make()
    with pytest.raises(error, match=message):
        ops.topk_chunks(**{"q": q, "k_sum": k_sum, "k": 8, **change})


def test_bad_lists_are_named():
    q, k_sum = make()
    with pytest.raises(ValueError, match="idx must have shape"):
        ops.chunk_scores(q, k_sum, torch.zeros(1, 21, 3, 2).int())
    with pytest.raises(TypeError, match="idx must have dtype"):
        ops.chunk_scores(q, k_sum, torch.zeros(1, 21, 4, 2))
    tensors, idx, _ = make_scores()
    scores = ops.chunk_scores(**tensors, idx=idx)
    (dq,) = torch.autograd.grad(scores[scores.isfinite()].square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()
