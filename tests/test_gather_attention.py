"""Attention to chosen blocks: softmax over masked keys is the oracle."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from remora import ops
from remora.ops.segment.gather_attention.naive import naive_block_mask, naive_gather_attention
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def make(B=1, T=37, S=None, H=4, Hk=2, D=16, lists="Hk", n=3, block=8, two_level=False, dtype=torch.float32, low=-1):
    S = T if S is None else S
    lists = {"H": H, "Hk": Hk, "1": 1}[lists]
    tensors = {"q": torch.randn(B, T, H, D), "k": torch.randn(B, S, Hk, D), "v": torch.randn(B, S, Hk, D)}
    if two_level:
        tensors["weight"] = torch.randn(B, T, lists, n)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {x: y.to(wide if x == "weight" else dtype).requires_grad_() for x, y in tensors.items()}
    # repetitions, blocks behind the query, and one past the last
    idx = torch.randint(low, -(-S // block) + 1, (B, T, lists, n), dtype=torch.int32)
    return tensors, idx, block


def attend(f, tensors, idx, block, **options):
    if f is ops.gather_attention:
        options["mode"] = "two_level" if "weight" in tensors else "joint"
    return f(**tensors, idx=idx, block=block, **options)


def results(f, tensors, idx, block, **options):
    o, lse = attend(f, tensors, idx, block, **options)
    torch.manual_seed(1)
    d_o, d_lse = torch.randn(o.shape).to(o.dtype), torch.randn(lse.shape).to(lse.dtype)
    grads = torch.autograd.grad([o, lse], list(tensors.values()), [d_o, d_lse.where(lse > -torch.inf, 0)])
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(tensors, grads, strict=True))}


def check(tensors, idx, block, **options):
    dtype = tensors["q"].dtype
    have = results(ops.gather_attention, tensors, idx, block, **options)
    wanted = []
    for cast in (lambda x: x.double(), lambda x: x):
        leaves = {n: cast(x.detach()).requires_grad_() for n, x in tensors.items()}
        wanted.append(results(naive_gather_attention, leaves, idx, block, **options))
    for name, value in have.items():
        exact, plain = wanted[0][name].double(), wanted[1][name].to(value.dtype)
        rule = value.dtype if name == "lse" else dtype
        assert_accurate(
            value, exact, None if dtype == torch.float64 else plain, name, dtype=rule, gradient=name in tensors
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_matches_the_definition(dtype, two_level):
    check(*make(B=2, dtype=dtype, two_level=two_level))


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
@pytest.mark.parametrize(
    ("H", "Hk", "lists"), [(2, 2, "Hk"), (3, 1, "1"), (8, 1, "1"), (16, 1, "1"), (20, 1, "1"), (6, 2, "H"), (6, 2, "1")]
)
def test_groups_of_heads(H, Hk, lists, two_level):
    check(*make(T=20, H=H, Hk=Hk, lists=lists, two_level=two_level))


@pytest.mark.parametrize(
    "sizes",
    [
        {"D": 1}, {"D": 70}, {"D": 128}, {"D": 256, "T": 20}, {"block": 1}, {"block": 5}, {"block": 16}, {"block": 17},
        {"T": 80, "block": 64, "n": 1}, {"T": 150, "block": 128, "n": 2}, {"T": 1, "S": 40}, {"n": 1},
        {"n": 12, "block": 3},
    ],
    ids=str,
)  # fmt: skip
def test_sizes(sizes):
    check(*make(**{"H": 2, "Hk": 1, **sizes}))


@pytest.mark.parametrize("sizes", [{"D": 70}, {"D": 200, "T": 20}, {"block": 33}, {"block": 1}], ids=str)
def test_sizes_of_two_levels(sizes):
    check(*make(**{"H": 2, "Hk": 1, "two_level": True, **sizes}))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_heads(dtype):
    check(*make(T=12, H=2, Hk=1, D=200, dtype=dtype))


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_without_causality(two_level):
    check(*make(T=9, S=50, two_level=two_level), causal=False)


def test_fewer_queries_than_keys_continue_a_sequence():
    tensors, idx, block = make(T=40)
    o, lse = attend(ops.gather_attention, tensors, idx, block)
    part = {**tensors, "q": tensors["q"][:, 35:]}
    tail, tail_lse = attend(ops.gather_attention, part, idx[:, 35:], block)
    assert torch.equal(tail, o[:, 35:])
    assert torch.equal(tail_lse, lse[:, 35:])


def test_is_masked_attention():
    tensors, idx, block = make(T=60, H=4, Hk=4, n=4, low=0)
    idx = torch.arange(60)[None, :, None, None] // block - torch.tensor([0, 1, 3, 4])  # distinct; negative: none
    idx = idx.expand(1, 60, 4, 4).clamp(min=-1)
    mask = naive_block_mask(60, 60, idx, block, True, None, None).any(3)
    q, k, v = (tensors[n].transpose(1, 2) for n in ("q", "k", "v"))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask.transpose(1, 2))
    o, _ = ops.gather_attention(tensors["q"], tensors["k"], tensors["v"], idx, block)
    torch.testing.assert_close(o, want.transpose(1, 2).float(), rtol=1e-5, atol=1e-5)


def test_all_blocks_are_causal_attention():
    tensors, _, _ = make(T=33, H=2, Hk=2)
    idx = torch.arange(5, dtype=torch.int64).expand(1, 33, 1, 5)
    o, _ = ops.gather_attention(tensors["q"], tensors["k"], tensors["v"], idx, 8)
    q, k, v = (tensors[n].transpose(1, 2) for n in ("q", "k", "v"))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)


def test_two_levels_are_not_one():
    tensors, idx, block = make(T=40, low=0)
    joint, _ = attend(ops.gather_attention, tensors, idx, block, causal=False)
    tensors["weight"] = torch.full(idx.shape, 1 / idx.shape[-1])
    both, _ = attend(ops.gather_attention, tensors, idx, block, causal=False)
    assert (joint - both).abs().max() > 0.1


def test_a_block_listed_twice_counts_twice():
    tensors, _, block = make(T=32, n=2)
    once, twice = (torch.tensor(x, dtype=torch.int32).expand(1, 32, 2, -1) for x in ([0, -1], [0, 0]))
    o, lse = attend(ops.gather_attention, tensors, once, block)
    o_twice, lse_twice = attend(ops.gather_attention, tensors, twice, block)
    torch.testing.assert_close(o, o_twice)
    torch.testing.assert_close(lse + torch.tensor(2.0).log(), lse_twice)


def test_equal_keys_give_the_mean():
    tensors, _, block = make(T=24, H=2, Hk=1)
    k = torch.ones(1, 24, 1, 16)
    idx = torch.tensor([0, 2], dtype=torch.int32).expand(1, 24, 1, 2)
    o, lse = ops.gather_attention(tensors["q"], k, tensors["v"], idx, block, causal=False)
    mean = torch.cat([tensors["v"][0, :8, 0], tensors["v"][0, 16:, 0]]).mean(0)
    torch.testing.assert_close(o[0], mean.expand(24, 2, 16))
    torch.testing.assert_close(lse, tensors["q"].sum(-1) / 4 + torch.tensor(16.0).log())


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_no_blocks(two_level):
    tensors, idx, block = make(two_level=two_level)
    idx[0, 5], idx[0, 6] = -1, 1000
    have = results(ops.gather_attention, tensors, idx, block)
    assert not have["o"][0, 5:7].any()
    assert (have["lse"][0, 5:7] == -torch.inf).all()
    assert not have["q"][0, 5:7].any()
    assert all(x.isfinite().all() for n, x in have.items() if n != "lse")


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_scores_of_minus_infinity_weigh_nothing(two_level):
    tensors, _, block = make(T=16, H=1, Hk=1, D=16, two_level=two_level, dtype=torch.bfloat16)
    tensors = {n: x.detach() for n, x in tensors.items()}
    tensors["q"] = tensors["q"].abs() + 1
    tensors["k"][0, :8] = -torch.inf
    tensors = {n: x.requires_grad_() for n, x in tensors.items()}
    idx = torch.tensor([0, -1, -1], dtype=torch.int32).expand(1, 16, 1, 3)
    o, lse = attend(ops.gather_attention, tensors, idx, block)
    assert not o.any()
    assert (lse == -torch.inf).all()
    (dv,) = torch.autograd.grad(o.sum(), tensors["v"])
    assert not dv.any()


OFFSETS = torch.tensor([0, 5, 5, 29, 60])


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_packed_sequences_equal_single_ones_to_the_bit(two_level):
    tensors, idx, block = make(T=60, two_level=two_level)
    check(tensors, idx, block, cu_seqlens=OFFSETS)
    have = results(ops.gather_attention, tensors, idx, block, cu_seqlens=OFFSETS)
    for a, b in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
        if a == b:
            continue
        alone = {n: x.detach()[:, a:b].requires_grad_() for n, x in tensors.items()}
        o, lse = attend(ops.gather_attention, alone, idx[:, a:b], block)
        assert torch.equal(o, have["o"][:, a:b])
        assert torch.equal(lse, have["lse"][:, a:b])
        torch.manual_seed(1)
        d_o, d_lse = torch.randn(have["o"].shape), torch.randn(have["lse"].shape)
        grads = torch.autograd.grad(
            [o, lse], list(alone.values()), [d_o[:, a:b], d_lse.where(have["lse"] > -torch.inf, 0)[:, a:b]]
        )
        for name, grad in zip(alone, grads, strict=True):
            assert torch.equal(grad, have[name][:, a:b]), name


def test_packed_keys_of_other_lengths():
    check(*make(T=60, S=41), cu_seqlens=OFFSETS, cu_seqlens_k=torch.tensor([0, 10, 12, 12, 40]), causal=False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_causal_to_the_bit(dtype):
    tensors, idx, block = make(T=40, dtype=dtype)
    changed = {n: x.detach().clone() for n, x in tensors.items()}
    changed["k"][:, 21], changed["v"][:, 21], changed["v"][:, 30] = torch.nan, torch.inf, torch.nan
    with torch.no_grad():
        before, after = (attend(ops.gather_attention, x, idx, block) for x in (tensors, changed))
    assert torch.equal(before[0][:, :21], after[0][:, :21])
    assert torch.equal(before[1][:, :21], after[1][:, :21])


def test_reproducible_and_independent_of_the_batch():
    tensors, idx, block = make(B=3, T=30, two_level=True, dtype=torch.bfloat16)
    first = results(ops.gather_attention, tensors, idx, block)
    again = results(ops.gather_attention, tensors, idx, block)
    assert all(torch.equal(x, again[n]) for n, x in first.items())
    alone = {n: x.detach()[1:2].requires_grad_() for n, x in tensors.items()}
    o, lse = attend(ops.gather_attention, alone, idx[1:2], block)
    torch.manual_seed(1)
    d_o, d_lse = torch.randn(first["o"].shape).bfloat16(), torch.randn(first["lse"].shape)
    grads = torch.autograd.grad(
        [o, lse], list(alone.values()), [d_o[1:2], d_lse.where(first["lse"] > -torch.inf, 0)[1:2]]
    )
    for name, x in {"o": o, "lse": lse, **dict(zip(alone, grads, strict=True))}.items():
        assert torch.equal(x, first[name][1:2]), name


def test_one_block_that_all_queries_choose():
    """Lookups of several pieces, summed in the same order whatever stands beside them."""
    tensors, idx, block = make(T=300, H=8, Hk=1, lists="H", n=1, D=8)
    idx[:] = 0
    check(tensors, idx, block)


@pytest.mark.cpu_only
def test_threads_change_no_bit():
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        runs.append(results(ops.gather_attention, *make(T=200)))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, runs[1][n]) for n, x in runs[0].items())


def test_strided_inputs():
    tensors, idx, block = make(B=2, T=30)
    loose = {n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, x in tensors.items()}
    have, want = results(ops.gather_attention, loose, idx, block), results(ops.gather_attention, tensors, idx, block)
    assert all(torch.equal(x, want[n]) for n, x in have.items())
    wide = torch.randn(2, 30, 2, 19)
    view = {**tensors, "k": wide[..., 1:17]}
    whole = {**tensors, "k": wide[..., 1:17].contiguous()}
    assert torch.equal(
        attend(ops.gather_attention, view, idx, block)[0], attend(ops.gather_attention, whole, idx, block)[0]
    )


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_lists_of_the_selection(two_level):
    """The lists that topk_chunks makes, weighted by the scores it chose them for."""
    B, T, H, Hk, D, block = 1, 40, 4, 2, 16, 4
    q, k, v = (torch.randn(B, T, h, D, requires_grad=True) for h in (H, Hk, Hk))
    k_sum = k.detach().view(B, T // block, block, Hk, D).mean(2)
    idx, scores = ops.topk_chunks(q, k_sum, 4, stride=block, size=1, group="kv_group", force_first=1, force_local=1)
    assert (idx[0, :, 0] == (torch.arange(T) // block)[:, None]).any(-1).all()  # the own block, forced
    tensors = {"q": q, "k": k, "v": v}
    if two_level:
        tensors["weight"] = scores.softmax(-1).requires_grad_()
    check(tensors, idx, block)


@pytest.mark.cpu_only
@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_gradcheck(two_level):
    tensors, idx, block = make(T=5, H=2, Hk=1, D=3, n=2, block=2, two_level=two_level, dtype=torch.float64, low=0)
    idx[..., 0] = torch.arange(5)[:, None] // 2  # lse is finite

    def f(*x):
        o, lse = attend(ops.gather_attention, dict(zip(tensors, x, strict=True)), idx, block)
        return o, lse.nan_to_num(neginf=0)

    assert torch.autograd.gradcheck(f, list(tensors.values()))
    check(tensors, idx, block)


@pytest.mark.parametrize("two_level", [False, True], ids=["joint", "two levels"])
def test_registration(two_level):
    tensors, idx, block = make(T=12, two_level=two_level)
    args = tensors["q"], tensors["k"], tensors["v"], idx, tensors.get("weight"), None, None, block, True, 0.25
    opcheck(torch.ops.remora.gather_attention_fwd.default, args)
    compiled = torch.compile(lambda t: attend(ops.gather_attention, t, idx, block), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors)[0], attend(ops.gather_attention, tensors, idx, block)[0])


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"S": 0}, {"n": 0}], ids=str)
def test_no_size(sizes):
    tensors, idx, block = make(**sizes)
    o, lse = attend(ops.gather_attention, tensors, idx, block)
    assert o.shape == tensors["q"].shape
    assert not o.any()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(o.sum(), list(tensors.values()))
    assert not any(g.any() for g in grads)


def test_wild_indices_and_offsets_stay_within_the_tensors():
    """Only a direct call gets that far."""
    tensors, _, block = make(T=30)
    q, k, v = (x.detach() for x in tensors.values())
    idx = torch.tensor([2**31 - 1, -(2**31), 3], dtype=torch.int32).expand(1, 30, 2, 3).contiguous()
    offsets = torch.tensor([-(2**31), 2**31 - 1, 5, 40], dtype=torch.int32)
    o, lse = torch.ops.remora.gather_attention_fwd(q, k, v, idx, None, offsets, offsets, block, True, 1.0)
    assert o.isfinite().all()
    plan = (torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32) for n in (idx.numel(), 7, 8))
    grads = torch.ops.remora.gather_attention_bwd(
        q, k, v, idx, None, offsets, offsets, o, lse, *plan, torch.ones_like(o), None, block, True, 1.0
    )
    assert grads[0].isfinite().all()


ERRORS = {
    "q of rank 3": ({"q": torch.randn(4, 5, 6)}, ValueError, r"q must have shape \[B, T, H, D\]"),
    "k of another dtype": ({"k": torch.randn(1, 37, 2, 16).half()}, TypeError, "k must have dtype"),
    "v of other keys": ({"v": torch.randn(1, 36, 2, 16)}, ValueError, "v must have shape"),
    "no block": ({"block": 0}, ValueError, r"block must be in 1\.\.\.128"),
    "too large a block": ({"block": 129}, ValueError, r"block must be in 1\.\.\.128"),
    "lists of no heads": (
        {"idx": torch.zeros(1, 37, 3, 2).int()},
        ValueError,
        "idx must have H = 4, Hk = 2 or 1 lists",
    ),
    "real indices": ({"idx": torch.zeros(1, 37, 2, 2)}, TypeError, "idx must have dtype"),
    "no such mode": ({"mode": "three_level"}, ValueError, "mode must be one of"),
    "no weights": ({"mode": "two_level"}, ValueError, "weight must be given for mode='two_level'"),
    "keys' offsets alone": ({"cu_seqlens_k": torch.tensor([0, 37])}, ValueError, "given together"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(change, error, message):
    tensors, idx, block = make()
    with pytest.raises(error, match=message):
        ops.gather_attention(**{**tensors, "idx": idx, "block": block, **change})
