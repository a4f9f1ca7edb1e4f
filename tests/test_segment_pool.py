"""Segment pooling and its broadcast against their definitions, and what they promise."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.ops.segment.segment_pool.naive import naive_dual_segment_pool, naive_segment_pool
from remora.ops.segment.segment_pool.registration import MODES
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize("mode", MODES)
LOGITS = ("softmax", "weighted")


def make(B=2, T=37, D=24, size=4, H=None, mode="softmax", dtype=torch.float32, gate=True, bias=True, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    channels = (D,) if H is None else (H, D)
    with_logits = mode in LOGITS
    return {
        "x": normal(B, T, *channels),
        "gate": normal(B, T, *channels) if gate and with_logits else None,
        "slot_bias": normal(size, *channels, dtype=torch.promote_types(dtype, torch.float32))
        if bias and with_logits
        else None,
    }


def windows_of(T, size, stride):
    return [(first, first + size) for first in range(0, T - size + 1, stride)]


def definition(tensors, windows, mode, dual=False):
    """`windows`: of every row of the batch."""
    rule = naive_dual_segment_pool if dual else naive_segment_pool
    gates = [None] * len(windows) if tensors["gate"] is None else tensors["gate"]
    rows = [
        rule(x, of_row, mode, gate, tensors["slot_bias"])
        for x, gate, of_row in zip(tensors["x"], gates, windows, strict=True)
    ]
    return torch.stack(rows)


def results(y, tensors, seed=1, dtype=None):
    leaves = {name: t for name, t in tensors.items() if t is not None}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype or y.dtype).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def converted(tensors, dtype):
    return {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}


def check(tensors, windows, mode, dtype, dual=False, **options):
    y = ops.segment_pool(mode=mode, dual=dual, **tensors, **options)
    have = results(y, tensors)
    wide, plain = converted(tensors, torch.float64), converted(tensors, dtype)
    oracle = results(definition(wide, windows, mode, dual), wide, dtype=dtype)
    yardstick = results(definition(plain, windows, mode, dual), plain)
    for name, value in have.items():
        near = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
        assert_accurate(value, oracle[name], near, name, dtype=dtype, gradient=name.startswith("d"))


@dtypes
@modes
def test_matches_the_definition(kernels, mode, dtype):
    check(make(mode=mode, dtype=dtype), [windows_of(37, 4, 4)] * 2, mode, dtype, size=4)


@modes
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 40, "size": 4},
        {"T": 3, "size": 4, "B": 1},
        {"T": 4, "size": 4, "D": 1},
        {"T": 30, "size": 1, "D": 5},
        {"T": 70, "size": 10, "stride": 3, "D": 16},
        {"T": 50, "size": 3, "stride": 7},
        {"T": 150, "size": 70, "stride": 70, "D": 8},
        {"T": 140, "size": 65, "stride": 20, "D": 7, "B": 1},
        {"T": 30, "H": 3, "D": 8},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_sizes(kernels, sizes, mode):
    sizes = dict(sizes)
    size, stride = sizes.pop("size", 4), sizes.pop("stride", None)
    tensors = make(**sizes, size=size, mode=mode)
    windows = windows_of(tensors["x"].shape[1], size, stride or size)
    if not windows:
        assert ops.segment_pool(mode=mode, size=size, **tensors).shape == (1, 0, 24)
        return
    check(tensors, [windows] * tensors["x"].shape[0], mode, torch.float32, size=size, stride=stride)


@pytest.mark.parametrize("given", [{"gate": False}, {"bias": False}], ids=["slot_bias alone", "gate alone"])
@pytest.mark.parametrize("mode", LOGITS)
def test_one_kind_of_logits(kernels, mode, given):
    check(make(mode=mode, **given), [windows_of(37, 4, 4)] * 2, mode, torch.float32, size=4)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "last"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(({"D": 32}, dtype) for dtype in DTYPES), ({"D": 16, "H": 2}, torch.float32), ({"D": 6}, torch.float32)],
    ids=str,
)
def test_dual(kernels, shape, mode, dtype):
    tensors = make(T=22, mode=mode, dtype=dtype, **shape)
    check(tensors, [windows_of(22, 4, 4)] * 2, mode, dtype, dual=True, size=4)


IDS = torch.tensor(
    [[0] * 10 + [1] + [3] * 20 + [4] * 6, [-1] * 3 + [0, 0, 2, 2] + [5] * 25 + [9] * 5], dtype=torch.int64
)


def ragged_windows(ids, num_segments):
    return [
        [
            (int((row < s).sum()), int((row <= s).sum())) if (row == s).any() else (0, 0)
            for s in range(num_segments)
        ]
        for row in ids
    ]  # fmt: skip


@dtypes
@modes
def test_ragged_segments(kernels, mode, dtype):
    tensors = make(mode=mode, dtype=dtype, bias=False)
    check(tensors, ragged_windows(IDS, 7), mode, dtype, segment_ids=IDS, num_segments=7)


def test_a_segment_of_many_tokens(kernels):
    ids = torch.zeros(1, 300, dtype=torch.int32)
    for mode in MODES:
        tensors = make(B=1, T=300, D=8, mode=mode, bias=False)
        check(tensors, [[(0, 300)]], mode, torch.float32, segment_ids=ids, num_segments=1)


@dtypes
def test_broadcast(kernels, dtype):
    y = torch.randn(2, 7, 3, 8, dtype=torch.float64).to(dtype).requires_grad_()
    x = ops.segment_broadcast(y, IDS)
    dx = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    (dy,) = torch.autograd.grad(x, y, dx)
    inside = (IDS >= 0) & (IDS < 7)
    index = IDS.clamp(0, 6)[..., None, None].expand(-1, -1, 3, 8)
    assert torch.equal(x, torch.where(inside[..., None, None], y.gather(1, index), 0))
    masked = torch.where(inside[..., None, None], dx, 0)
    oracle, plain = (torch.zeros(y.shape, dtype=d).scatter_add_(1, index, masked.to(d)) for d in (torch.float64, dtype))
    assert_accurate(dy, oracle, None if dtype == torch.float64 else plain, "dy", dtype=dtype, gradient=True)


def test_equal_entries_give_their_gradient_to_the_first(kernels):
    x = torch.tensor([[1.0, 3, 3, 2], [2, 2, 2, 2], [float("nan"), 5, float("nan"), 7]]).reshape(1, 12, 1)
    x = x.expand(1, 12, 8).contiguous().requires_grad_()
    y, arg = ops.segment_pool(x, 4, mode="max", return_arg=True)
    assert torch.equal(arg[0, :, 0], torch.tensor([1, 4, 8], dtype=torch.int32))
    assert y[0, :2, 0].tolist() == [3, 2]
    assert y[0, 2].isnan().all()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[0, :, 0].nonzero()[:, 0].tolist() == [1, 4, 8]
    # long windows are shared by several threads on CUDA
    long = torch.zeros(1, 100, 4).requires_grad_()
    y, arg = ops.segment_pool(long, 100, mode="max", return_arg=True)
    assert not arg.any()
    half = torch.cat([torch.full((1, 50, 4), -1.0), torch.zeros(1, 50, 4)], 1)
    assert (ops.segment_pool(half, 100, mode="max", return_arg=True)[1] == 50).all()


def test_logits_of_minus_infinity_hide_entries(kernels):
    tensors = make(T=16, mode="softmax", bias=False)
    gate = tensors["gate"].detach().clone()
    gate[:, 0:2] = gate[:, 6:8] = gate[:, 13] = -torch.inf
    tensors["gate"] = gate.requires_grad_()
    check(tensors, [windows_of(16, 4, 4)] * 2, "softmax", torch.float32, size=4)
    check(tensors, [windows_of(16, 16, 16)] * 2, "softmax", torch.float32, size=16)


def test_large_logits(kernels):
    """Weights follow from logits less their log-sum-exp, whose rounding they see: 2^-24 of its size."""
    tensors = make(scale=10.0, mode="softmax")
    check(tensors, [windows_of(37, 4, 4)] * 2, "softmax", torch.float32, size=4)


OFFSETS = torch.tensor([0, 5, 5, 8, 30, 62, 63, 90])


@pytest.mark.parametrize(("mode", "size", "stride", "dual"), [
    *((mode, 4, 4, False) for mode in MODES), ("softmax", 4, 4, True), ("max", 4, 4, True), ("softmax", 10, 4, False),
])  # fmt: skip
def test_packed_sequences_equal_single_ones_to_the_bit(kernels, mode, size, stride, dual):
    tensors = make(B=1, T=90, D=16, size=size, mode=mode)
    y = ops.segment_pool(size=size, stride=stride, mode=mode, dual=dual, cu_seqlens=OFFSETS, **tensors)
    assert y.shape[1] == 90 // stride
    dy = torch.randn(y.shape)
    leaves = [n for n in ("x", "gate") if tensors[n] is not None]
    grads = torch.autograd.grad(y, [tensors[n] for n in leaves], dy)
    bounds = ops.summary_offsets(OFFSETS, stride, size)
    counts = [max(0, (n - size) // stride + 1) for n in OFFSETS.diff().tolist()]
    assert bounds.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
    assert not y[:, bounds[-1] :].any()
    for n, (begin, end) in enumerate(zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)):
        alone = {k: None if t is None else t if k == "slot_bias" else t[:, begin:end] for k, t in tensors.items()}
        one = ops.segment_pool(size=size, stride=stride, mode=mode, dual=dual, **alone)
        rows = slice(int(bounds[n]), int(bounds[n + 1]))
        assert torch.equal(y[:, rows], one)
        want = torch.autograd.grad(one, [alone[k] for k in leaves], dy[:, rows])
        for name, have, grad in zip(leaves, grads, want, strict=True):
            assert torch.equal(have[:, begin:end], grad), name


def raw(tensors, mode, starts=None, ids=None, seq=None, window=None, size=4, num_windows=9):
    args = [tensors["x"][:, :, None], *(None if t is None else t[:, None] if n == "slot_bias" else t[:, :, None]
            for n, t in tensors.items() if n != "x")]  # fmt: skip
    return torch.ops.remora.segment_pool_fwd(
        *args, ids, starts, seq, window, size, size, num_windows, MODES.index(mode), False, True
    )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@modes
def test_tokens_outside_every_sequence_get_no_gradient(kernels, mode):
    """Only a direct call gets that far; the public function refuses such offsets on the CPU."""
    tensors = make(B=1, mode=mode)
    y, _, _ = raw(tensors, mode, seq=int32(10, 19, 30), window=int32(0, 2, 4))
    assert not y[:, 4:].any()
    grads = results(y, tensors)
    assert not grads["dx"][:, :10].any()
    assert not grads["dx"][:, 30:].any()
    assert grads["dx"][:, 10:18].any()
    assert all(g.isfinite().all() for g in grads.values())


def test_wild_offsets_stay_within_the_tensors(kernels):
    low, high = -(2**31), 2**31 - 1
    for mode in ("softmax", "max", "mean"):
        tensors = make(B=1, mode=mode)
        for seq, window in ((int32(low, high, low), int32(0, 5, 9)), (int32(0, 20, 37), int32(low, high, 3))):
            y, _, _ = raw(tensors, mode, seq=seq, window=window)
            assert y.isfinite().all()
            results(y, tensors)
    tensors = make(B=1, mode="max")
    starts = torch.full((1, 10), high, dtype=torch.int32)
    starts[0, 3] = low
    ids = torch.full((1, 37), low, dtype=torch.int32)
    ids[0, 5:] = 8
    y, _, _ = raw(tensors, "max", starts=starts, ids=ids, size=1)
    results(y, tensors)


@modes
def test_causal_to_the_bit(kernels, mode):
    tensors = make(mode=mode, T=40)
    changed = {n: None if t is None else t.detach().clone() for n, t in tensors.items()}
    for name in ("x", "gate"):
        if changed[name] is not None:
            changed[name][:, 21], changed[name][:, 30] = float("nan"), float("inf")
    with torch.no_grad():
        have, want = (ops.segment_pool(size=4, mode=mode, **t) for t in (changed, tensors))
    assert torch.equal(have[:, :5], want[:, :5])
    assert torch.equal(have[:, 8:], want[:, 8:])


@pytest.mark.parametrize("mode", ["mean", "softmax"])
def test_reproducible_and_independent_of_neighbours(kernels, mode):
    runs = []
    for _ in range(2):
        tensors = make(T=130, size=64, mode=mode)
        runs.append(results(ops.segment_pool(size=64, stride=16, mode=mode, **tensors), tensors))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    first = {n: None if t is None else t if n == "slot_bias" else t[:1] for n, t in tensors.items()}
    assert torch.equal(ops.segment_pool(size=64, stride=16, mode=mode, **first), runs[0]["y"][:1])


@pytest.mark.cpu_only
def test_independent_of_the_number_of_threads():
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        tensors = make(T=200, D=1100)
        runs.append(results(ops.segment_pool(size=4, mode="softmax", **tensors), tensors))
    torch.set_num_threads(threads)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@modes
def test_strides(kernels, mode):
    tensors = make(H=2, D=16, mode=mode)
    strided = {n: None if t is None else t if n == "slot_bias" else torch.cat([t, t], -1)[:, :, :, 16:]
               for n, t in tensors.items()}  # fmt: skip
    heads_first = {n: None if t is None else t if n == "slot_bias" else t.transpose(1, 2).contiguous().transpose(1, 2)
                   for n, t in tensors.items()}  # fmt: skip
    want = results(ops.segment_pool(size=4, mode=mode, **tensors), tensors)
    for views in (strided, heads_first):
        have = results(ops.segment_pool(size=4, mode=mode, **views), tensors)
        assert all(torch.equal(have[name], value) for name, value in want.items())


@pytest.mark.cpu_only
@modes
def test_gradcheck(mode):
    tensors = make(B=1, T=11, D=4, dtype=torch.float64, mode=mode)
    names = [n for n, t in tensors.items() if t is not None]

    def pool(*leaves, **options):
        return ops.segment_pool(size=4, mode=mode, **dict(zip(names, leaves, strict=True)), **options)

    leaves = [tensors[n] for n in names]
    assert torch.autograd.gradcheck(lambda *t: pool(*t, stride=3), leaves)
    if mode != "last":
        assert torch.autograd.gradcheck(lambda *t: pool(*t, dual=True), leaves)
    if mode not in ("max", *LOGITS):
        assert torch.autograd.gradgradcheck(lambda *t: pool(*t, stride=3), leaves)
        ids = torch.tensor([[0, 0, 0, 1, 3, 3, 3, 3, 4, 9, 9]])
        assert torch.autograd.gradgradcheck(
            lambda x: ops.segment_pool(x, mode=mode, segment_ids=ids, num_segments=5), leaves
        )


def test_registration():
    tensors = make(B=1)
    softmax, maximum = MODES.index("softmax"), MODES.index("max")
    x, gate, bias = tensors["x"][:, :, None], tensors["gate"][:, :, None], tensors["slot_bias"][:, None]
    opcheck(torch.ops.remora.segment_pool_fwd.default,
            (x, gate, bias, None, None, None, None, 4, 4, 9, softmax, False, True))  # fmt: skip
    ids = IDS[:1].int()
    starts = torch.searchsorted(ids, torch.arange(8, dtype=torch.int32)[None], out_int32=True)
    opcheck(torch.ops.remora.segment_pool_fwd.default,
            (x, None, None, ids, starts, None, None, 1, 1, 7, maximum, False, True))  # fmt: skip

    def pooled(t):
        y = ops.segment_pool(size=4, mode="softmax", **t)
        packed = ops.segment_pool(t["x"], 4, cu_seqlens=torch.tensor([0, 20, 37]))
        return y, packed, ops.segment_broadcast(y, IDS[:1])

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(tensors), pooled(tensors), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("mode", ["softmax", "max"])
@pytest.mark.parametrize("size", [{"T": 0}, {"B": 0}, {"D": 0}], ids=str)
def test_no_elements(mode, size):
    tensors = make(**size, mode=mode)
    y = ops.segment_pool(size=4, mode=mode, **tensors)
    assert y.numel() == 0
    grads = results(y, tensors)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    if "T" in size:
        ids = torch.zeros(2, 0, dtype=torch.int32)
        y = ops.segment_pool(tensors["x"], mode="max", segment_ids=ids, num_segments=3)
        assert torch.equal(y, torch.zeros(2, 3, 24))


ERRORS = {
    "x of rank 2": ({"x": torch.randn(4, 5)}, ValueError, "x must have shape"),
    "x of integers": ({"x": torch.zeros(2, 37, 24, dtype=torch.int32)}, TypeError, "x must have dtype"),
    "mode": ({"mode": "median"}, ValueError, "mode must be one of"),
    "no logits": ({"gate": None, "slot_bias": None}, ValueError, "gate or slot_bias must be given"),
    "logits of mean": ({"mode": "mean"}, ValueError, "gate or slot_bias must be given"),
    "gate of another dtype": ({"gate": torch.zeros(2, 37, 24).half()}, TypeError, "gate must have dtype"),
    "gate of another shape": ({"gate": torch.zeros(2, 36, 24)}, ValueError, "gate must have shape"),
    "slot_bias of another size": ({"slot_bias": torch.zeros(5, 24)}, ValueError, "slot_bias must have shape"),
    "size": ({"size": 0}, ValueError, "size must be in"),
    "no size": ({"size": None}, ValueError, "size must be given"),
    "stride": ({"stride": -1}, ValueError, "stride must be in"),
    "dual and a stride": ({"dual": True, "stride": 2}, ValueError, "dual needs stride == size"),
    "arg of softmax": ({"return_arg": True}, ValueError, "return_arg needs mode 'max'"),
    "segments and size": ({"segment_ids": IDS, "num_segments": 3}, ValueError, "segment_ids excludes"),
    "packed with B = 2": ({"cu_seqlens": torch.tensor([0, 37])}, ValueError, "B = 1"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.segment_pool(**{**make(), "size": 4, "mode": "softmax", **change})


def test_bad_segments_are_named():
    x = torch.randn(2, 37, 24)
    with pytest.raises(ValueError, match="segment_ids must be sorted"):
        ops.segment_pool(x, segment_ids=IDS.flip(1), num_segments=7)
    with pytest.raises(ValueError, match="num_segments must be given"):
        ops.segment_pool(x, segment_ids=IDS)
    with pytest.raises(ValueError, match="size >= stride"):
        ops.segment_pool(x[:1], 2, 4, cu_seqlens=torch.tensor([0, 37]))
