"""Nearest codes, their moving averages and running means against their definitions, and what they promise."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.ops.segment.vector_quantization.naive import naive_code_prefix_state, naive_distances, naive_vq_ema
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GAP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of scores, relative


def make(B=2, H=2, T=37, D=24, S=10, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(B, H, T, D), normal(H, S, D)


def check_assignment(x, codebook, idx, err2):
    """The code is a nearest one, up to the rounding of scores."""
    distances = naive_distances(x.double(), codebook.double())
    chosen = distances.gather(-1, idx.long()[..., None])[..., 0]
    scale = x.double().square().sum(-1) + codebook.double().square().sum(-1).max()
    assert (chosen <= distances.amin(-1) + GAP[x.dtype] * scale).all()
    heads = torch.arange(x.shape[1])[:, None]
    plain = (x - codebook[heads, idx.long()]).square().sum(-1)
    assert_accurate(err2, chosen, None if x.dtype == torch.float64 else plain.to(err2.dtype), "err2", dtype=x.dtype)


@dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"T": 1, "B": 1, "D": 1},
        {"S": 1},
        {"T": 130, "D": 64, "S": 70, "B": 1},
        {"D": 33, "S": 65, "H": 1},
        {"D": 100, "T": 20},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()) or "base",
)
def test_assigns_the_nearest_code(kernels, sizes, dtype):
    x, codebook = make(**sizes, dtype=dtype)
    check_assignment(x, codebook, *ops.vq_assign(x, codebook))


def test_the_first_of_equal_codes(kernels):
    x, codebook = make(S=70)
    codebook[:, 35:] = codebook[:, :35]
    idx, _ = ops.vq_assign(x, codebook)
    assert idx.max() < 35
    codebook[:] = codebook[:, :1]
    assert not ops.vq_assign(x, codebook)[0].any()


def test_strides_masks_and_anomalies(kernels):
    x, codebook = make()
    idx, err2 = ops.vq_assign(x, codebook)
    token_major = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.vq_assign(token_major, codebook)[0], idx)
    mask = torch.rand(2, 37) < 0.5
    masked, distances = ops.vq_assign(x, codebook, mask)
    assert torch.equal(masked, torch.where(mask[:, None], idx, -1))
    assert torch.equal(distances, torch.where(mask[:, None], err2, 0))
    poisoned = x.clone()
    poisoned[0, 0, 3] = float("nan")
    changed, distances = ops.vq_assign(poisoned, codebook)
    assert changed[0, 0, 3] == 0
    assert distances[0, 0, 3].isnan()
    changed[0, 0, 3] = idx[0, 0, 3]
    assert torch.equal(changed, idx)


def test_assignments_are_reproducible_and_apart(kernels):
    x, codebook = make(T=140)
    runs = [ops.vq_assign(x, codebook) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    one, err2 = ops.vq_assign(x[1:, :, 100:], codebook)
    assert torch.equal(one, runs[0][0][1:, :, 100:])
    assert torch.equal(err2, runs[0][1][1:, :, 100:])


def test_distances_have_a_gradient(kernels):
    x, codebook = make(dtype=torch.float32)
    x.requires_grad_()
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, 5] = False
    idx, err2 = ops.vq_assign(x, codebook, mask)
    weight = torch.randn(err2.shape)
    (dx,) = torch.autograd.grad(err2, x, weight)
    want = 2 * weight[..., None] * (x - codebook[torch.arange(2)[:, None], idx.clamp(min=0).long()])
    want[1, :, 5] = 0
    torch.testing.assert_close(dx, want.detach())


@dtypes
def test_moving_averages(kernels, dtype):
    x, codebook = make(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    csum, ccount = codebook.to(wide), torch.rand(2, 10).to(wide)
    idx, _ = ops.vq_assign(x, codebook)
    idx[0, 0, :3] = torch.tensor([-1, 10, -(2**31)])
    mask = torch.rand(2, 37) < 0.7
    counted = torch.where(mask[:, None] & (idx >= 0) & (idx < 10), idx, -1)
    wanted = naive_vq_ema(csum.double(), ccount.double(), x.double(), counted, 0.9)
    plain = naive_vq_ema(csum, ccount, x, counted, 0.9)
    again = csum.clone(), ccount.clone()
    ops.vq_ema_(csum, ccount, x, idx, 0.9, mask)
    ops.vq_ema_(*again, x, idx, 0.9, mask)
    for have, repeated, oracle, near in zip((csum, ccount), again, wanted, plain, strict=True):
        assert torch.equal(have, repeated)
        assert_accurate(have, oracle, None if wide == torch.float64 else near, "average", dtype=wide)


def prefix_inputs(B=2, H=2, T=37, D=20, S=7, dtype=torch.float32, state=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    idx = torch.randint(-1, S - 1, (B, H, T), generator=generator, dtype=torch.int32)  # the last code has no tokens
    v = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    if not state:
        return idx, v, None
    count = torch.randint(0, 3, (B, H, S), generator=generator).to(wide)
    mean = torch.randn(B, H, S, D, generator=generator, dtype=torch.float64).to(wide)
    return idx, v, (count, (mean * (count > 0)[..., None]).requires_grad_())


def prefix_results(log_count, mean, state, leaves, dtype):
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(dtype).to(t.dtype) for t in (mean, state[1])]
    grads = torch.autograd.grad([mean, state[1]], leaves, cotangents)
    results = {"log_count": log_count, "mean": mean, "count": state[0], "final": state[1]}
    return {n: t.detach() for n, t in results.items()} | {f"d{i}": g for i, g in enumerate(grads)}


def check_prefix(idx, v, state, n_code, chunk):
    dtype = v.dtype
    leaves = [v] if state is None else [v, state[1]]
    have = prefix_results(*ops.code_prefix_state(idx, v, n_code, chunk, state), leaves, dtype)
    known = torch.where((idx >= 0) & (idx < n_code), idx, -1)

    def definition(as_type):
        value = v.detach().to(as_type).requires_grad_()
        B, H, _, D = v.shape
        count = torch.zeros(B, H, n_code, dtype=as_type) if state is None else state[0].to(as_type)
        mean = torch.zeros(B, H, n_code, D, dtype=as_type) if state is None else state[1].detach().to(as_type)
        mean.requires_grad_(state is not None)
        log_count, means, total, final = naive_code_prefix_state(known, value, n_code, chunk, count, mean)
        return prefix_results(log_count, means, (total, final), [value] if state is None else [value, mean], dtype)

    oracle, plain = definition(torch.float64), definition(dtype)
    for name, value in have.items():
        near = None if dtype == torch.float64 else plain[name].to(value.dtype)
        assert_accurate(value, oracle[name], near, name, dtype=dtype, gradient=name.startswith("d"))


@dtypes
@pytest.mark.parametrize("state", [False, True], ids=["from nothing", "from a state"])
def test_running_means(kernels, state, dtype):
    check_prefix(*prefix_inputs(state=state, dtype=dtype), 7, 8)


@pytest.mark.parametrize(
    ("sizes", "n_code", "chunk"),
    [({"T": 32}, 7, 8), ({"T": 5}, 7, 8), ({"D": 70}, 7, 16), ({"D": 1, "B": 1}, 7, 1), ({"S": 3, "T": 300}, 3, 256)],
    ids=str,
)
def test_running_means_of_other_sizes(kernels, sizes, n_code, chunk):
    check_prefix(*prefix_inputs(**sizes), n_code, chunk)


def test_many_codes(kernels):
    """Beyond 767 codes CUDA takes fewer channels at a time."""
    check_prefix(*prefix_inputs(S=900, T=40, D=12, B=1, H=1), 900, 32)


def test_codes_out_of_range_count_nowhere(kernels):
    idx, v, _ = prefix_inputs(state=False)
    idx[0, 0, :4] = torch.tensor([-1, 7, 2**31 - 1, -(2**31)])
    check_prefix(idx, v, None, 7, 8)


def test_a_state_handed_over_continues(kernels):
    idx, v, _ = prefix_inputs(T=48, state=False)
    with torch.no_grad():
        whole = ops.code_prefix_state(idx, v, 7, 8)
        left = ops.code_prefix_state(idx[:, :, :24], v[:, :, :24], 7, 8)
        right = ops.code_prefix_state(idx[:, :, 24:], v[:, :, 24:], 7, 8, left[2])
    assert torch.equal(torch.cat([left[0], right[0]], 2), whole[0])
    torch.testing.assert_close(torch.cat([left[1], right[1]], 2), whole[1])
    torch.testing.assert_close(right[2], whole[2])


def test_causal_and_reproducible_to_the_bit(kernels):
    idx, v, state = prefix_inputs()
    log_count, mean, _ = ops.code_prefix_state(idx, v, 7, 8, state)
    changed = v.detach().clone()
    changed[:, :, 20] = float("nan")
    later = ops.code_prefix_state(idx, changed, 7, 8, state)
    assert torch.equal(later[1][:, :, :3], mean[:, :, :3])
    assert torch.equal(later[0], log_count)
    alone = ops.code_prefix_state(idx[1:, :1], v[1:, :1], 7, 8, (state[0][1:, :1], state[1][1:, :1]))
    assert torch.equal(alone[1], mean[1:, :1])


def test_attention_over_quantised_keys_collapses(kernels):
    """Attention over keys that are codes is attention over the codes, with the counts' logarithms and the means."""
    k, codebook = make(B=1, D=16)
    _, v, _ = prefix_inputs(B=1, state=False)
    q = torch.randn(1, 2, 16)
    idx, _ = ops.vq_assign(k, codebook)
    quantised = codebook[torch.arange(2)[:, None], idx.long()]
    log_count, mean, (count, last) = ops.code_prefix_state(idx, v, 10, 8)
    for border in range(5):
        weights = torch.einsum("bhd,bhtd->bht", q, quantised[:, :, : 8 * border]).softmax(-1)
        full = torch.einsum("bht,bhtd->bhd", weights, v[:, :, : 8 * border])
        scores = torch.einsum("bhd,hsd->bhs", q, codebook) + log_count[:, :, border]
        far = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), mean[:, :, border])
        if border > 0:
            torch.testing.assert_close(far, full, rtol=1e-5, atol=1e-5)
    assert count.sum() == 2 * 37
    assert last.isfinite().all()


def test_a_chunk_and_codes_are_attention_to_quantised_keys(kernels):
    """A token reads its own chunk as it is and all before it by their codes, in one softmax; chunks are the batch."""
    chunk = 8
    k, codebook = make(B=1, T=32, D=16)
    codebook.requires_grad_()
    q, v = (torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(2))
    idx, _ = ops.vq_assign(k, codebook)
    quantised = codebook[torch.arange(2)[:, None], idx.long()]
    log_count, mean, _ = ops.code_prefix_state(idx, v, 10, chunk)
    assert torch.isneginf(log_count).any()  # codes without tokens stand in the softmax, too

    def chunks(x):
        return x[0].unflatten(1, (-1, chunk)).permute(1, 2, 0, 3)

    o, _ = ops.prefix_attention(
        chunks(q), codebook.transpose(0, 1).expand(4, -1, -1, -1), mean[0].permute(1, 2, 0, 3),
        k_win=chunks(quantised), v_win=chunks(v), window=chunk, bias=log_count[0].transpose(0, 1),
    )  # fmt: skip
    want = torch.nn.functional.scaled_dot_product_attention(q, quantised, v, is_causal=True)
    torch.testing.assert_close(o, chunks(want), rtol=1e-4, atol=1e-5)
    d_o = torch.randn_like(want)
    ours = torch.autograd.grad(o, [q, v, codebook], chunks(d_o), retain_graph=True)
    theirs = torch.autograd.grad(want, [q, v, codebook], d_o)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu_only
def test_gradcheck():
    idx, v, state = prefix_inputs(B=1, H=1, T=11, D=3, S=4, dtype=torch.float64)

    def means(v, mean):
        _, means, (_, last) = ops.code_prefix_state(idx, v, 4, 4, (state[0], mean))
        return means, last

    assert torch.autograd.gradcheck(means, (v, state[1]))


@pytest.mark.cpu_only
def test_independent_of_the_number_of_threads():
    runs, threads = [], torch.get_num_threads()
    x, codebook = make(T=300, D=64, S=100)
    for count in (1, 2):
        torch.set_num_threads(count)
        idx, err2 = ops.vq_assign(x, codebook)
        _, mean, _ = ops.code_prefix_state(idx, x, 100, 64)
        csum, ccount = torch.zeros(2, 100, 64), torch.zeros(2, 100)
        ops.vq_ema_(csum, ccount, x, idx, 0.5)
        runs.append((idx, err2, mean, csum, ccount))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registration():
    x, codebook = make(B=1, T=9)
    opcheck(torch.ops.remora.vq_assign.default, (x.requires_grad_(), codebook, None))
    idx, v, (count, mean) = prefix_inputs(B=1, T=9)
    opcheck(torch.ops.remora.code_prefix_fwd.default, (idx, v, count + 1, mean, 7, 4))

    def quantise(x, v):
        idx, err2 = ops.vq_assign(x, codebook)
        return err2, *ops.code_prefix_state(idx, v, 10, 4)[:2]

    compiled = torch.compile(quantise, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(x, v), quantise(x, v), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("size", [{"T": 0}, {"B": 0}], ids=str)
def test_no_tokens(size):
    x, codebook = make(**size)
    idx, err2 = ops.vq_assign(x, codebook)
    assert idx.shape == err2.shape == x.shape[:3]
    csum, ccount = codebook.clone(), torch.ones(2, 10)
    ops.vq_ema_(csum, ccount, x, idx, 0.5)
    assert torch.equal(csum, codebook / 2)
    _, v, state = prefix_inputs(**size)
    _, mean, last = ops.code_prefix_state(idx, v, 7, 8, state)
    assert mean.numel() == 0
    assert torch.equal(last[0], state[0])
    torch.testing.assert_close(last[1], state[1])


X, CODES = make()
ERRORS = {
    "x of rank 3": (lambda: ops.vq_assign(X[0], CODES), ValueError, "x must have shape"),
    "codes of another dtype": (lambda: ops.vq_assign(X, CODES.half()), TypeError, "codebook must have dtype"),
    "codes of other heads": (lambda: ops.vq_assign(X, CODES[:1]), ValueError, "codebook must have shape"),
    "no codes": (lambda: ops.vq_assign(X, CODES[:, :0]), ValueError, "the number of codes S must be in"),
    "mask": (lambda: ops.vq_assign(X, CODES, torch.ones(2, 37)), TypeError, "mask must have dtype"),
    "decay": (
        lambda: ops.vq_ema_(CODES.clone(), torch.ones(2, 10), X, X[..., 0].int(), 1.5), ValueError, "decay must be in",
    ),
    "counts": (
        lambda: ops.vq_ema_(CODES.clone(), torch.ones(2, 9), X, X[..., 0].int(), 0.5), ValueError, "ccount must have",
    ),
    "codes of floats": (lambda: ops.code_prefix_state(X[..., 0], X, 7, 8), TypeError, "idx must have dtype"),
    "chunk": (lambda: ops.code_prefix_state(X[..., 0].int(), X, 7, 0), ValueError, "chunk must be in"),
    "state": (
        lambda: ops.code_prefix_state(X[..., 0].int(), X, 7, 8, (torch.ones(2, 2, 7), X)), ValueError,
        "the mean of state must have shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
