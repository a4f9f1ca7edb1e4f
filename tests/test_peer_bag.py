"""Bags of one-neuron experts against their definition."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.ops.pkm.memory_bag.naive import naive_peer_bag
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]


def make(T=6, P=10, N=40, dp=32, dv=40, h=1, dtype=torch.float32, slots=None):
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(N, dp + dv, generator=generator) * 0.3).to(dtype).requires_grad_()
    x = torch.randn(T, dp, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(T, P, h, generator=generator).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    slots = N if slots is None else slots
    indices = torch.randint(-max(1, slots // 8), slots + 2, (T, P), generator=generator)
    return indices, table, x, weights


def results(function, table, x, weights):
    out = function(table, x, weights)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    leaves = {"table": table, "x": x, **({} if weights is None else {"weights": weights})}
    dtype = torch.bfloat16 if table.dtype == torch.float16 else table.dtype  # what every dtype here can hold
    grads = torch.autograd.grad(out, list(leaves.values()), d_out.bfloat16().to(dtype).to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def check_against_definition(indices, table, x, weights, **options):
    have = results(lambda *a: ops.peer_bag(indices, *a, **options), table, x, weights)

    def plain(precision):
        copies = [None if t is None else t.detach().to(precision).requires_grad_() for t in (table, x, weights)]
        return results(lambda *a: naive_peer_bag(indices, *a, **options), *copies)

    dtype = table.dtype
    oracle, yardstick = plain(torch.float64), plain(dtype)
    for name, value in have.items():
        if value.numel():
            other = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
            assert_accurate(value, oracle[name], other, name, dtype=dtype, gradient=name != "out")


SIZES = [
    {},
    {"dp": 33, "dv": 17},
    {"dp": 8, "dv": 144, "h": 2, "P": 70},
    {"h": 5, "T": 3},
    {"T": 1, "P": 1},
    {"dp": 1, "dv": 1},
    {"dp": 600, "dv": 520, "T": 2},
    {"N": 3, "T": 30, "P": 40},
]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(sizes, dtype) for dtype in DTYPES for sizes in (SIZES if dtype == torch.float32 else SIZES[:3])],
    ids=lambda x: str(x) if not isinstance(x, dict) else "-".join(f"{k}{v}" for k, v in x.items()) or "base",
)
def test_matches_the_definition(kernels, sizes, dtype):
    check_against_definition(*make(**sizes, dtype=dtype))


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_activations(kernels, act):
    check_against_definition(*make(h=2), act=act)


@pytest.mark.parametrize("options", [{"layer_rows": 17, "offset": 30}, {"groups": 3, "layer_rows": 13}], ids=str)
def test_layers_share_a_table(kernels, options):
    slots = options.get("groups", 1) * options["layer_rows"]
    check_against_definition(*make(slots=slots), **options)


def test_without_weights(kernels):
    indices, table, x, _ = make()
    check_against_definition(indices, table, x, None)


def test_identity_over_constant_scores_is_the_plain_bag(kernels):
    indices, table, _, weights = make(dp=1)
    table = table.detach()
    table[:, 0] = 1
    out = ops.peer_bag(indices, table, torch.ones(6, 1), weights, act="identity")
    assert torch.equal(out, ops.memory_bag(indices, table[:, 1:].contiguous(), weights))


@pytest.mark.parametrize("masked", [False, True])
def test_ways_of_delivery_agree_to_the_bit(kernels, masked):
    indices, table, x, weights = make(T=30, P=40, N=50, h=2)
    N, d = table.shape
    row_mask = torch.rand(N) < 0.5 if masked else None
    plan = ops.slot_plan(indices, N, row_mask=row_mask)
    d_out = torch.randn(30, 40)
    out = ops.peer_bag(indices, table, x, weights, row_mask=row_mask)
    dense, *others = torch.autograd.grad(out, [table, x, weights], d_out)
    row_grad = plan.row_grad(table)
    out = ops.peer_bag(indices, table.detach(), x, weights, plan=plan, row_grad=row_grad)
    rows, *others_rows = torch.autograd.grad(out, [row_grad, x, weights], d_out)
    assert torch.equal(plan.to_sparse(rows, N).to_dense(), dense)
    assert not rows[int(plan.num_rows[0]) :].any()
    buffer = torch.randn(N, d)
    before = buffer.clone()
    out = ops.peer_bag(indices, table, x, weights, plan=plan, accumulate=buffer)
    d_table, *others_buffer = torch.autograd.grad(out, [table, x, weights], d_out, allow_unused=True)
    assert d_table is None
    touched = torch.zeros(N, dtype=torch.bool)
    touched[plan.rows[: int(plan.num_rows[0])].long()] = True
    assert torch.equal(buffer, torch.where(touched[:, None], before + dense, before))
    frozen = ops.peer_bag(indices, table.detach(), x, weights)
    others_frozen = torch.autograd.grad(frozen, [x, weights], d_out)
    for a, b, c, d in zip(others, others_rows, others_buffer, others_frozen, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)
    if masked:
        assert not dense[~row_mask].any()


@pytest.mark.parametrize("shape", [(0, 4, 5, 8, 4), (3, 0, 5, 8, 4), (3, 4, 0, 8, 4), (3, 4, 5, 0, 4), (3, 4, 5, 8, 0)])
def test_zero_sizes(kernels, shape):
    T, P, N, dp, dv = shape
    table, x = torch.randn(N, dp + dv, requires_grad=True), torch.randn(T, dp, requires_grad=True)
    weights = torch.randn(T, P, requires_grad=True)
    out = ops.peer_bag(torch.zeros(T, P, dtype=torch.long), table, x, weights)
    assert out.shape == (T, dv)
    out.sum().backward()
    assert table.grad.shape == table.shape
    assert not x.grad.any()


def test_indices_outside_touch_no_memory(kernels):
    indices = torch.tensor([[0, 2**62, -(2**62), -1, 5, 4]])
    _, table, x, _ = make(T=1, N=5)
    weights = torch.full((1, 6), float("nan"))
    weights[0, [0, 5]] = 1.0
    want = ops.peer_bag(torch.tensor([[0, 4]]), table, x)
    weights.requires_grad_()
    out = ops.peer_bag(indices, table, x, weights)
    assert torch.allclose(out, want)
    out.sum().backward()
    assert not weights.grad[0, 1:5].any()
    assert not table.grad[1:4].any()
    assert x.grad.isfinite().all()


def test_reproducible_and_apart(kernels):
    indices, table, x, weights = make(T=20, P=70, N=300, h=2, dtype=torch.bfloat16)
    runs = [results(lambda *a: ops.peer_bag(indices, *a), table, x, weights) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
    alone = ops.peer_bag(indices[7:8], table, x[7:8], weights[7:8])
    assert torch.equal(alone[0], runs[0]["out"][7])


@pytest.mark.cpu_only
@pytest.mark.parametrize("act", ["identity", "gelu", "silu"])
def test_gradcheck(act):
    indices, table, x, weights = make(4, 3, 6, 3, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.peer_bag(indices, *a, act=act), (table, x, weights))


def test_no_second_derivative(kernels):
    indices, table, x, weights = make()
    (d_x,) = torch.autograd.grad(ops.peer_bag(indices, table, x, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_x.sum().backward()


def test_opcheck():
    indices, table, x, weights = make()
    plan = ops.slot_plan(indices, 40)
    where = (1, 40, 0, 2)
    opcheck(torch.ops.remora.peer_bag_fwd.default, (indices, table, x, weights, *[None] * 7, *where))
    detached, d_out = (table.detach(), x.detach(), weights.detach()), torch.randn(6, 40)
    for dense in (False, True):
        opcheck(torch.ops.remora.peer_bag_bwd.default, (indices, *detached, d_out, *plan, *where, dense))
    opcheck(
        torch.ops.remora.peer_bag_bwd_.default, (indices, *detached, d_out, *plan, torch.zeros(40, 72), *where)
    )  # fmt: skip


def test_fullgraph():
    indices, table, x, weights = make()
    compiled = torch.compile(ops.peer_bag, fullgraph=True, backend="aot_eager")
    have, want = (
        results(lambda *a, f=f: f(indices, *a), table, x, weights) for f in (compiled, ops.peer_bag)
    )  # fmt: skip
    for name, value in have.items():
        assert torch.equal(value, want[name])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(3, 9)}, ValueError, "width dp of x"),
        ({"x": torch.zeros(3, 3).half()}, TypeError, "x must have dtype"),
        ({"act": "tanh"}, ValueError, "act must be one of identity, relu, gelu, silu, got 'tanh'"),
        ({"weights": torch.zeros(3, 4, 2)}, ValueError, "heads h of weights must divide"),
        ({"table": torch.zeros(8, 5).t()}, ValueError, "table must be contiguous"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {"indices": torch.zeros(3, 4).long(), "table": torch.zeros(5, 8), "x": torch.zeros(3, 3)}
    ops.peer_bag(**good)
    with pytest.raises(error, match=message):
        ops.peer_bag(**{**good, **changes})
