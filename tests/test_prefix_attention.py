"""Prefix attention against its definition, and what it promises."""

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from remora import _ext, ops
from remora.ops.segment.prefix_attention.naive import naive_prefix_attention, visible_prefix
from remora.testing.numeric import assert_accurate

SIM = _ext.HOST_BACKEND == "sim"
DEVICE = "cuda" if _ext.HOST_BACKEND == "cuda" else "cpu"
LOW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = LOW if DEVICE == "cuda" or SIM else [*LOW, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("q", "k", "v", "k_self", "v_self", "k_win", "v_win", "bias", "sink")


def make(
    B=2, T=70, H=4, Hk=2, D=64, S=8, Tw=None, own=True, window=0, bias=None, sink=False, dtype=torch.float32, seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    Tw = T if Tw is None else Tw
    return {
        "q": normal(B, T, H, D),
        "k": normal(B, S, Hk, D),
        "v": normal(B, S, Hk, D),
        "k_self": normal(B, T, Hk, D) if own else None,
        "v_self": normal(B, T, Hk, D) if own else None,
        "k_win": normal(B, Tw, Hk, D) if window else None,
        "v_win": normal(B, Tw, Hk, D) if window else None,
        "bias": None if bias is None else normal(*{"S": (S,), "HS": (H, S), "BHS": (B, H, S)}[bias], dtype=wide),
        "sink": normal(H, dtype=wide) if sink else None,
    }


def attend(tensors, **options):
    q, k, v, *rest = (tensors[name] for name in NAMES)
    return ops.prefix_attention(q, k, v, **dict(zip(NAMES[3:], rest, strict=True)), **options)


def definition(tensors, n_visible, **options):
    q, k, v, *rest = (tensors[name] for name in NAMES)
    return naive_prefix_attention(q, k, v, n_visible, **dict(zip(NAMES[3:], rest, strict=True)), **options)


def cotangents(o, lse, dtype, seed=1):
    """Values that `dtype` can hold, so that the definition in another dtype gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(dtype).to(t.device, t.dtype) for t in (o, lse)]


def results(o, lse, tensors, dtype):
    leaves = {name: t for name, t in tensors.items() if t is not None}
    seen = torch.isfinite(lse.detach())
    d_o, d_lse = cotangents(o, lse, dtype)
    grads = torch.autograd.grad([o, lse], list(leaves.values()), [d_o, torch.where(seen, d_lse, 0)])
    return {"o": o.detach(), "lse": lse.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def check_against_definition(tensors, seen, dtype, window=0, window_offset=0, scale=None, **rule):
    band = {"window": window, "window_offset": window_offset, "scale": scale}
    have = results(*attend(tensors, **band, **rule), tensors, dtype)

    def at(wanted):
        copies = {n: None if t is None else t.detach().to(wanted).requires_grad_() for n, t in tensors.items()}
        return results(*definition(copies, seen, **band), copies, dtype)

    oracle, yardstick = at(torch.float64), at(dtype)
    for name, value in have.items():
        if value.numel():
            plain = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
            assert_accurate(value, oracle[name], plain, name, dtype=dtype, gradient=name.startswith("d"))


SIZES = [
    {},
    {"T": 1, "S": 0},
    {"T": 7, "S": 0, "own": False},
    {"T": 7, "S": 1},
    {"T": 79, "S": 9},
    {"T": 80, "S": 10, "own": False},
    {"T": 81, "S": 10, "Hk": 4, "B": 1},
    {"H": 3, "Hk": 1},
    {"H": 8, "Hk": 1, "T": 33},
    {"H": 16, "Hk": 1, "T": 20, "B": 1},
    {"D": 16},
    {"D": 33, "T": 20},
    {"D": 80, "T": 30},
    {"D": 128},
    {"D": 256, "T": 40, "B": 1},
    {"stride": 1, "S": 150, "T": 150, "B": 1, "H": 2},
    {"size": 16, "own": False},
    {"offset": 3},
    {"offset": -45, "S": 14},
    {"bias": "S"},
    {"bias": "HS", "own": False},
    {"bias": "BHS", "H": 2},
    {"sink": True},
    {"sink": True, "own": False, "bias": "HS"},
    {"window": 5, "S": 0},
    {"window": 20, "own": False},
    {"window": 9, "window_offset": 4, "Tw": 50},
    {"window": 30, "window_offset": -10, "Tw": 80, "sink": True, "bias": "BHS"},
    {"scale": 0.3},
]


@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()) or "base")
def test_matches_the_definition(kernels, sizes, dtype):
    rule = {name: sizes[name] for name in ("stride", "size", "offset") if name in sizes}
    rule.setdefault("stride", 8)
    band = {name: sizes[name] for name in ("window_offset", "scale") if name in sizes}
    shape = {n: value for n, value in sizes.items() if n not in (*rule, *band)}
    tensors = make(**shape, dtype=dtype)
    size = rule.get("size", rule["stride"])
    offset = rule.get("offset", int(tensors["k_self"] is not None))
    n = visible_prefix(tensors["q"].shape[1], tensors["k"].shape[1], rule["stride"], size, offset)
    check_against_definition(tensors, n, dtype, window=sizes.get("window", 0), **rule, **band)


@dtypes
def test_counts_and_everything(kernels, dtype):
    """Counts per token in any order; then no rule at all."""
    tensors = make(T=40, S=70, H=6, own=False, bias="HS", dtype=dtype)
    n = torch.randint(-2, 90, (2, 40), device=DEVICE)
    check_against_definition(tensors, n.clamp(0, 70), dtype, n_visible=n)
    check_against_definition(tensors, torch.full((40,), 70), dtype)


def test_equals_masked_attention(kernels):
    """SCOUT's rule, against PyTorch's own attention over summaries and tokens with a mask."""
    B, T, H, D, stride = 1, 64, 2, 64, 10
    q, k_self, v_self = torch.randn(3, B, T, H, D, device=DEVICE)
    k, v = (x[:, stride - 1 :: stride] for x in (k_self, v_self))
    o, _ = ops.prefix_attention(q, k, v, stride=stride, k_self=k_self, v_self=v_self)
    token, key = torch.arange(T)[:, None], torch.arange(T)
    mask = ((key % stride == stride - 1) & (key < token) | (key == token)).to(DEVICE)
    heads = (x.double().transpose(1, 2) for x in (q, k_self, v_self))
    want = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    torch.testing.assert_close(o.double(), want.transpose(1, 2), rtol=1e-5, atol=1e-5)


OFFSETS = [0, 5, 5, 47, 55, 120]


def test_packed_sequences_equal_single_ones_to_the_bit(kernels):
    stride, cu = 8, torch.tensor(OFFSETS, device=DEVICE)
    cu_k = ops.summary_offsets(cu, stride).tolist()
    tensors = make(B=1, T=120, S=cu_k[-1] + 2, window=6, sink=True, bias="HS")
    options = {"stride": stride, "window": 6}
    have = results(*attend(tensors, cu_seqlens=cu, **options), tensors, torch.float32)
    d_o, d_lse = cotangents(have["o"], have["lse"], torch.float32)
    assert cu_k == [0, 0, 0, 5, 6, 14]
    for n, (begin, end) in enumerate(itertools.pairwise(OFFSETS)):
        keys = slice(cu_k[n], cu_k[n + 1])
        part = {"k": keys, "v": keys, "bias": keys}
        alone = {
            name: t.detach() if name == "sink" else t.detach()[:, part.get(name, slice(begin, end))]
            for name, t in tensors.items()
        }
        alone = {name: t.clone().requires_grad_() for name, t in alone.items()}
        o, lse = attend(alone, **options)
        assert torch.equal(o, have["o"][:, begin:end])
        assert torch.equal(lse, have["lse"][:, begin:end])
        grads = torch.autograd.grad([o, lse], [alone[m] for m in NAMES[:8]], [d_o[:, begin:end], d_lse[:, begin:end]])
        for name, grad in zip(NAMES[:8], grads, strict=True):
            assert torch.equal(grad, have[f"d{name}"][:, part.get(name, slice(begin, end))]), name
    for name in ("dk", "dv", "dbias"):
        assert not have[name][:, cu_k[-1] :].any(), name


def test_tokens_outside_every_sequence_are_zero(kernels):
    """Only a direct call gets that far; the public function refuses such offsets on the CPU."""
    tensors = make(B=1, T=90, S=8, window=4)
    args = [None if tensors[n] is None else tensors[n].detach() for n in NAMES]
    for cu, cu_k in (([10, 80], [2, 7]), ([-(2**31), 2**31 - 1], [-5, 2**31 - 1])):
        offsets = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu, cu_k)]
        rest = (8, -8, 4, 0, 0.125)
        o, lse = torch.ops.remora.prefix_attention_fwd(*args, None, *offsets, *rest)
        grads = torch.ops.remora.prefix_attention_bwd(*args, None, *offsets, o, lse, torch.ones_like(o), None, *rest)
        assert all(x.isfinite().all() for x in (o, *grads))
        if cu[0] == 10:
            for x in (o, grads[0], grads[3], grads[4], grads[5], grads[6]):
                assert not x[:, :10].any()
                assert not x[:, 80:].any()
                assert x[:, 10:80].any()
            assert torch.isneginf(lse[:, :10]).all()
            assert not grads[1][:, [0, 1, 7]].any()


def test_wild_counts_stay_within_the_tensors(kernels):
    """Only a direct call gets that far; the public function clamps them."""
    tensors = make(B=1, T=40, S=8, own=False)
    args = [None if tensors[n] is None else tensors[n].detach() for n in NAMES]
    low, high = -(2**31), 2**31 - 1
    counts = torch.randint(low, high, (1, 40), dtype=torch.int32)
    counts[0, :4] = torch.tensor([low, high, 0, 8])
    rest = (counts.to(DEVICE), None, None, 1, 0, 0, 0, 0.125)
    o, lse = torch.ops.remora.prefix_attention_fwd(*args, *rest)
    grads = torch.ops.remora.prefix_attention_bwd(*args, *rest[:3], o, lse, torch.ones_like(o), None, *rest[3:])
    want, _ = attend(tensors, n_visible=counts.to(DEVICE))
    assert torch.equal(o, want)
    assert all(x.isfinite().all() for x in (o, *grads))


def test_nothing_to_see(kernels):
    tensors = make(T=20, S=3, own=False)
    o, lse = attend(tensors, stride=8)
    assert not o[:, :7].any()
    assert torch.isneginf(lse[:, :7]).all()
    assert torch.isfinite(lse[:, 7:]).all()
    grads = torch.autograd.grad([o.sum() + lse[:, 7:].sum()], [tensors[n] for n in ("q", "k", "v")])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :7].any()


@dtypes
def test_unseen_keys_have_no_part(kernels, dtype):
    """NaN and infinity in keys and values that a token does not see leave its bits; so does -inf as a bias."""
    tensors = make(T=40, S=24, window=3, bias="S", dtype=dtype)
    changed = {n: None if t is None else t.detach().clone() for n, t in tensors.items()}
    for name, bad in (("k", torch.nan), ("v", torch.inf)):
        changed[name][:, 3] = bad  # seen from token 32 on
        changed[name][:, 20:] = bad  # never
        changed[f"{name}_win"][:, 32] = bad
        changed[f"{name}_self"][:, 36] = bad
    with torch.no_grad():
        o, lse = attend(tensors, stride=8, window=3)
        bad_o, bad_lse = attend(changed, stride=8, window=3)
        assert torch.equal(o[:, :32], bad_o[:, :32])
        assert torch.equal(lse[:, :32], bad_lse[:, :32])
        assert bad_o[:, 32:].isnan().all()
        changed = {**tensors, "bias": tensors["bias"].detach().clone()}
        changed["bias"][:2] = -torch.inf
        fewer = {**tensors, **{n: tensors[n][:, 2:] for n in ("k", "v")}, "bias": tensors["bias"][2:]}
        want, _ = attend(fewer, stride=8, offset=17, window=3)
        got, _ = attend(changed, stride=8, window=3)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-2 if dtype.itemsize == 2 else 1e-5)


def test_gradients_of_unseen_pairs_stay_finite(kernels):
    """What is not finite in a row reaches only what the row sees."""
    tensors = make(B=1, T=40, S=5, window=0)
    o, lse = attend(tensors, stride=8)
    d_o, d_lse = cotangents(o, lse, torch.float32)
    d_o[:, 20] = torch.nan  # sees summaries 0 and 1
    grads = torch.autograd.grad([o, lse], [tensors[n] for n in NAMES[:5]], [d_o, d_lse])
    rest = torch.arange(40) != 20
    for name, grad in zip(NAMES[:5], grads, strict=True):
        good = grad[:, 2:] if name in ("k", "v") else grad[:, rest.to(grad.device)]
        assert good.isfinite().all(), name
    assert grads[2][:, :2].isnan().any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_equal_keys_share_the_weight(kernels, dtype):
    tensors = make(T=40, S=5, dtype=dtype)
    with torch.no_grad():
        tensors["k"][:] = tensors["k_self"][:, :1] = 0.5
        tensors["k_self"][:] = 0.5
        o, _lse = attend(tensors, stride=8)
        count = torch.arange(40, device=DEVICE) // 8 + 1
        sums = torch.cat([torch.zeros_like(tensors["v"][:, :1]), tensors["v"]], 1).double().cumsum(1)
        want = ((sums[:, count - 1] + tensors["v_self"].double()) / count[:, None, None]).repeat_interleave(2, 2)
        torch.testing.assert_close(o.double(), want, rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("Hk", [1, 4])
def test_decoding_equals_the_whole(kernels, T, Hk):
    """A few queries over many keys, cut into splits, against the rows of one call over all of them."""
    tensors = make(B=2, T=48, H=4, Hk=Hk, D=16 if SIM else 64, S=1300, Tw=48, window=7, sink=True, bias="HS")
    options = {"stride": 2, "window": 7}
    with torch.no_grad():
        o, lse = attend(tensors, offset=1 - 2500, **options)
        last = {n: t[:, 48 - T :] if n in ("q", "k_self", "v_self") else t for n, t in tensors.items()}
        place = 48 - T
        few, few_lse = attend(last, offset=1 - 2500 - place, window_offset=-place, **options)
        torch.testing.assert_close(few, o[:, place:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(few_lse, lse[:, place:], rtol=1e-4, atol=1e-5)
        one = {n: t if n in ("bias", "sink") else t[:1] for n, t in last.items()}
        assert torch.equal(attend(one, offset=1 - 2500 - place, window_offset=-place, **options)[0], few[:1])


def test_two_sources_merge_into_one_softmax(kernels):
    tensors = make(T=40, S=12, own=False)
    leaves = [tensors[n] for n in ("q", "k", "v")]
    q, k, v = leaves
    n = torch.arange(40, device=DEVICE).expand(2, 40) // 3
    o, lse = ops.prefix_attention(q, k, v, n_visible=n)
    first = ops.prefix_attention(q, k[:, :5], v[:, :5], n_visible=n.clamp(max=5))
    second = ops.prefix_attention(q, k[:, 5:], v[:, 5:], n_visible=(n - 5).clamp(min=0))
    merged, merged_lse = ops.merge_attention([first, second])
    torch.testing.assert_close(merged, o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-5)
    d_o, d_lse = cotangents(o, lse, torch.float32)
    d_lse = torch.where(torch.isfinite(lse.detach()), d_lse, 0)
    for have, want in zip(
        torch.autograd.grad([merged, merged_lse], leaves, [d_o, d_lse]),
        torch.autograd.grad([o, lse], leaves, [d_o, d_lse]),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_earlier_blocks_and_the_own_one_merge_into_causal_attention(kernels):
    """Sources of two operators: a prefix of single tokens, and the block of the query, chosen by a list."""
    B, T, H, Hk, D, block = 2, 40, 4, 2, 32, 8
    q, k, v = leaves = [torch.randn(B, T, h, D, device=DEVICE, requires_grad=True) for h in (H, Hk, Hk)]
    own = torch.arange(T, device=DEVICE).expand(B, T) // block
    sources = [
        ops.prefix_attention(q, k, v, n_visible=own * block),
        ops.gather_attention(q, k, v, own[..., None, None].int(), block),
    ]
    o, _ = ops.merge_attention(sources)
    heads = (x.transpose(1, 2) for x in leaves)
    want = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    d_o = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(x, leaves, d_o) for x in (o, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_merge_has_exact_gradients():
    o, lse = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    lse[:, 0, 0] = -torch.inf
    lse[1, 1, 1] = -torch.inf
    finite = torch.isfinite(lse)

    def merged(o, lse):
        whole = torch.where(finite, lse, -torch.inf)
        out, total = ops.merge_attention(list(zip(o, whole, strict=True)))
        return out, torch.where(torch.isfinite(total), total, 0)

    assert torch.autograd.gradcheck(merged, (o.requires_grad_(), torch.where(finite, lse, 0.0).requires_grad_()))
    out, total = ops.merge_attention(list(zip(o, lse, strict=True)))
    assert not out[0, 0].any()
    assert torch.isneginf(total[0, 0])


def test_reproducible_and_independent_of_neighbours(kernels):
    options = {"stride": 8, "window": 5}
    runs = []
    for _ in range(2):
        tensors = make(B=3, T=75, S=9, H=6, window=5, bias="HS", sink=True)
        runs.append(results(*attend(tensors, **options), tensors, torch.float32))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
    tensors = make(B=3, T=75, S=9, H=6, window=5, bias="HS", sink=True)
    one = {n: (t if n in ("bias", "sink") else t[:1]).detach().requires_grad_() for n, t in tensors.items()}
    o, lse = attend(one, **options)
    d_o, d_lse = cotangents(runs[0]["o"], runs[0]["lse"], torch.float32)
    grads = torch.autograd.grad([o, lse], [one[n] for n in NAMES[:7]], [d_o[:1], d_lse[:1]])
    assert torch.equal(o, runs[0]["o"][:1])
    for name, grad in zip(NAMES[:7], grads, strict=True):
        assert torch.equal(grad, runs[0][f"d{name}"][:1]), name


@pytest.mark.cpu_only
def test_independent_of_the_number_of_threads():
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        tensors = make(B=1, T=300, S=37, sink=True)
        runs.append(results(*attend(tensors, stride=8), tensors, torch.float32))
    torch.set_num_threads(threads)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.cpu_only
@pytest.mark.parametrize("rule", [{"stride": 3}, {"stride": 3, "size": 5, "offset": 0}, {}], ids=["own", "rule", "all"])
def test_gradcheck(rule):
    own = "size" not in rule
    tensors = make(B=1, T=8, H=2, Hk=1, D=3, S=2, own=own, window=2, bias="HS", sink=True, dtype=torch.float64)
    names = [n for n in NAMES if tensors[n] is not None]

    def run(*values):
        return attend({**tensors, **dict(zip(names, values, strict=True))}, window=2, **rule)

    assert torch.autograd.gradcheck(run, [tensors[n] for n in names])


def test_strided_inputs_and_gradients(kernels):
    tensors = make(B=1, T=24, S=3)
    fused = torch.cat([tensors["k_self"], tensors["v_self"]], -1).detach()
    views = {**tensors, "k_self": fused[..., :64], "v_self": fused[..., 64:]}
    views["q"] = tensors["q"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    views["k"] = tensors["k"].detach().transpose(2, 3).contiguous().transpose(2, 3)
    o, lse = attend(tensors, stride=8)
    other, other_lse = attend(views, stride=8)
    assert torch.equal(o, other)
    assert torch.equal(lse, other_lse)
    d_o = torch.randn(1, 4, 24, 64, device=DEVICE).transpose(1, 2)
    want = torch.autograd.grad(o, tensors["q"], d_o.contiguous())[0]
    assert torch.equal(torch.autograd.grad(other, views["q"], d_o)[0], want)


def test_registration():
    tensors = make(B=1, T=20, S=2, window=3, bias="BHS", sink=True)
    args = [tensors[n] for n in NAMES]
    opcheck(torch.ops.remora.prefix_attention_fwd.default, (*args, None, None, None, 8, -8, 3, 0, 0.125))
    compiled = torch.compile(lambda t: attend(t, stride=8, window=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors)[0], attend(tensors, stride=8, window=3)[0])


@pytest.mark.parametrize("size", [{"T": 0, "S": 3}, {"B": 0}, {"S": 0, "own": False}])
def test_nothing_there(size):
    tensors = make(**size)
    o, lse = attend(tensors, stride=8)
    assert o.shape == tensors["q"].shape
    assert lse.shape == tensors["q"].shape[:3]
    assert not o.any()
    grads = torch.autograd.grad(o.sum(), [tensors["q"], tensors["k"]])
    assert not any(grad.any() for grad in grads)


def other(name, *shape, dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype).to(DEVICE)}


ERRORS = {
    "q has no rank 4": (other("q", 4, 5), {}, ValueError, r"q must have shape \[B, T, H, D\]"),
    "heads too large": (other("q", 2, 70, 4, 300), {}, ValueError, r"head size D of q must be in 1...256"),
    "k of another dtype": (other("k", 2, 8, 2, 64, dtype=torch.half), {}, TypeError, "k must have dtype"),
    "k of other channels": (other("k", 2, 8, 2, 32), {}, ValueError, "k must have shape"),
    "v of other rows": (other("v", 2, 9, 2, 64), {}, ValueError, "v must have the shape of k"),
    "heads that do not divide": (
        {**other("k", 2, 8, 3, 64), **other("v", 2, 8, 3, 64)}, {}, ValueError, r"multiple of those of k \(Hk = 3\)",
    ),
    "k_self alone": ({"v_self": None}, {}, ValueError, "k_self and v_self must be given together"),
    "k_self of other tokens": (other("k_self", 2, 8, 2, 64), {}, ValueError, "k_self must have shape"),
    "window without keys": ({}, {"window": 3}, ValueError, "k_win and v_win go with a window"),
    "bias of other rows": (other("bias", 7), {}, ValueError, r"bias must have shape \[S\]"),
    "sink of other heads": (other("sink", 3), {}, ValueError, r"sink must have shape \[H\]"),
    "two rules": ({}, {"n_visible": torch.ones(2, 70).int()}, ValueError, "exclude each other"),
    "size without stride": ({}, {"stride": None, "size": 3}, ValueError, "need stride"),
    "stride of zero": ({}, {"stride": 0}, ValueError, "stride must be in"),
    "packed rows in a batch": ({}, {"cu_seqlens": torch.tensor([0, 70])}, ValueError, "B = 1"),
    "offsets of keys alone": ({}, {"cu_seqlens_k": torch.tensor([0, 70])}, ValueError, "needs cu_seqlens"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(change, options, error, message):
    options = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    with pytest.raises(error, match=message):
        attend({**make(), **change}, **{"stride": 8, **options})


def test_too_few_summaries_are_named_or_clamped():
    tensors, cu_seqlens = make(B=1, S=7), torch.tensor([0, 70], device=DEVICE)
    if DEVICE == "cuda":  # offsets on the device stay there: the kernels clamp them
        o, _ = attend(tensors, stride=8, cu_seqlens=cu_seqlens)
        given, _ = attend(tensors, stride=8, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens // 10)
        assert torch.equal(o, given)
    else:
        with pytest.raises(ValueError, match=r"a row for every summary of cu_seqlens \(8\), got S = 7"):
            attend(tensors, stride=8, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ValueError, "at least one pair"),
        ([(torch.randn(2, 3), 1.0)], TypeError, "lse of source 0 must be a tensor"),
        ([(torch.randn(2, 3), torch.randn(3))], ValueError, "lse of source 0 must have shape"),
        ([(torch.randn(2, 3), torch.randn(2)), (torch.randn(2, 4), torch.randn(2))], ValueError, "o of source 1"),
    ],
)
def test_merge_names_bad_input(sources, error, message):
    with pytest.raises(error, match=message):
        ops.merge_attention(sources)
