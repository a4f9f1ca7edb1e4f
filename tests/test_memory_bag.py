"""Weighted bags and the plan of their lookups, against their definitions."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.ops.pkm.memory_bag.naive import naive_memory_bag, naive_slots
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def make_indices(T, P, slots, kind="random", seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":  # some of them outside
        indices = torch.randint(-max(1, slots // 8), slots + 2, (T, P), generator=generator)
    elif kind == "one row":
        indices = torch.full((T, P), slots // 2)
    elif kind == "distinct":
        indices = torch.randperm(slots, generator=generator)[: T * P].view(T, P)
    elif kind == "zipf":
        weights = 1 / torch.arange(1, slots + 1, dtype=torch.float64)
        indices = torch.multinomial(weights, T * P, replacement=True, generator=generator).view(T, P)
    elif kind == "padding":
        indices = torch.full((T, P), -1)
    return indices.to(dtype)


def make(T=6, P=10, N=40, d=72, h=1, dtype=torch.float32, kind="random", groups=1, layer_rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    table = torch.randn(N, d, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(T, P, h, generator=generator).to(wide(dtype)).requires_grad_()
    indices = make_indices(T, P, groups * (N if layer_rows is None else layer_rows), kind, seed)
    return indices, table, weights


def results(function, table, weights, d_out=None):
    """Output and gradients by name; the cotangent comes from the output's shape alone."""
    out = function(table, weights)
    if d_out is None:
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(table.dtype)
    leaves = {"table": table} if weights is None else {"table": table, "weights": weights}
    grads = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def check_against_definition(indices, table, weights, **options):
    dtype = table.dtype
    have = results(lambda t, w: ops.memory_bag(indices, t, w, **options), table, weights)
    d_out = torch.randn(have["out"].shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def plain(precision):
        t = table.detach().to(precision).requires_grad_()
        w = None if weights is None else weights.detach().to(precision).requires_grad_()
        return results(lambda t, w: naive_memory_bag(indices, t, w, **options), t, w, d_out)

    oracle, yardstick = plain(torch.float64), plain(dtype)
    for name, value in have.items():
        if value.numel():
            other = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
            assert_accurate(value, oracle[name], other, name, dtype=dtype, gradient=name != "out")
    return have


SIZES = [
    {},
    {"kind": "one row", "P": 60},
    {"kind": "one row", "T": 30, "P": 40},
    {"kind": "distinct", "N": 64},
    {"kind": "zipf", "T": 40, "P": 20},
    {"d": 33},
    {"d": 96, "h": 4},
    {"T": 1, "P": 1},
    {"T": 2, "P": 33},
    {"T": 3, "P": 130},
    {"N": 1},
    {"d": 1},
    {"d": 8},
    {"d": 130, "h": 2},
    {"d": 1100, "T": 3},
    {"d": 2052, "T": 2, "P": 5},
]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(sizes, dtype) for dtype in DTYPES for sizes in (SIZES if dtype == torch.float32 else SIZES[2:8])],
    ids=lambda x: str(x) if not isinstance(x, dict) else "-".join(f"{k}{v}" for k, v in x.items()) or "base",
)
def test_matches_the_definition(kernels, sizes, dtype):
    check_against_definition(*make(**sizes, dtype=dtype))


@dtypes
@pytest.mark.parametrize(
    "options",
    [
        {"layer_rows": 17},
        {"layer_rows": 17, "offset": 35},
        {"offset": 39},
        {"groups": 3, "layer_rows": 13, "offset": 30},
        {"groups": 4},
    ],
    ids=str,
)
def test_layers_share_a_table(kernels, options, dtype):
    make_options = {k: v for k, v in options.items() if k != "offset"}
    check_against_definition(*make(h=2, dtype=dtype, T=20, **make_options), **options)


@dtypes
def test_without_weights(kernels, dtype):
    indices, table, _ = make(dtype=dtype)
    check_against_definition(indices, table, None)


def test_weights_of_two_and_three_dimensions_and_any_dtype(kernels):
    indices, table, weights = make()
    want = ops.memory_bag(indices, table, weights)
    assert torch.equal(ops.memory_bag(indices.int(), table, weights[..., 0]), want)
    half = weights.detach().half().requires_grad_()
    out = ops.memory_bag(indices, table, half)
    assert torch.equal(out, ops.memory_bag(indices, table, half.detach().float()))
    out.sum().backward()
    assert half.grad.dtype == torch.float16


def test_strided_indices_and_weights(kernels):
    indices, table, weights = make(T=12)
    want = ops.memory_bag(indices[::2].contiguous(), table, weights[::2].contiguous())
    assert torch.equal(ops.memory_bag(indices[::2], table, weights[::2]), want)


def naive_plan(indices, N, row_mask=None, **options):
    row, _, found = naive_slots(indices, N, **options)
    key = torch.where(found, row, 2 * N).flatten()
    if row_mask is not None:
        key = torch.where((key < N) & ~row_mask[key.clamp(max=N - 1)], key + N, key)
    order = key.argsort(stable=True)
    rows, counts = key[key < 2 * N].unique(return_counts=True)
    return order, rows % N, counts.cumsum(0), int((rows < N).sum())


@pytest.mark.parametrize(
    ("T", "P", "N", "kind"),
    [
        (1, 1, 2, "random"),
        (6, 10, 70, "random"),
        (6, 10, 70, "one row"),
        (6, 10, 70, "padding"),
        (6, 10, 70, "distinct"),
        (40, 130, 5300, "zipf"),
        (5, 1000, 3, "random"),
        (30, 300, 9000, "random"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_plan(kernels, T, P, N, kind, masked):
    indices = make_indices(T, P, N, kind)
    row_mask = torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    plan = ops.slot_plan(indices, N, row_mask=row_mask)
    order, rows, ends, num_free = naive_plan(indices, N, row_mask)
    U, R = len(rows), min(T * P, N)
    assert plan.num_rows.tolist() == [num_free, U]
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.rows[:U].long(), rows)
    assert (plan.rows[U:] == N).all()
    assert torch.equal(plan.starts[1 : U + 1].long(), ends)
    assert plan.starts[0] == 0 or U == 0
    assert (plan.starts[U:] == (ends[-1] if U else 0)).all()
    assert plan.rows.shape == (R,)
    found = indices[(indices >= 0) & (indices < N)]
    assert torch.equal(plan.hits(N).long(), found.bincount(minlength=N))


def test_plan_of_a_shared_table(kernels):
    options = {"groups": 3, "layer_rows": 13, "offset": 30}
    indices = make_indices(20, 10, 39)
    plan = ops.slot_plan(indices, 40, **options)
    order, rows, _, _ = naive_plan(indices, 40, **options)
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.rows[: len(rows)].long(), rows)


@dtypes
@pytest.mark.parametrize(
    ("kind", "masked", "h"), [("random", False, 1), ("random", True, 3), ("one row", False, 3), ("padding", True, 1)]
)
def test_ways_of_delivery_agree_to_the_bit(kernels, kind, masked, h, dtype):
    T, P, N = 20, 30, 50
    indices, table, weights = make(T, P, N, h=h, dtype=dtype, kind=kind)
    row_mask = torch.rand(N) < 0.5 if masked else None
    plan = ops.slot_plan(indices, N, row_mask=row_mask)
    d_out = torch.randn(T, 72).to(dtype)

    out = ops.memory_bag(indices, table, weights, row_mask=row_mask)
    dense, d_weights = torch.autograd.grad(out, [table, weights], d_out)
    assert torch.equal(torch.autograd.grad(ops.memory_bag(indices, table, weights, plan=plan), table, d_out)[0], dense)

    row_grad = plan.row_grad(table)
    out_rows = ops.memory_bag(indices, table.detach(), weights, plan=plan, row_grad=row_grad)
    rows, d_weights_rows = torch.autograd.grad(out_rows, [row_grad, weights], d_out)
    U = int(plan.num_rows[0])
    scattered = torch.zeros(N, 72, dtype=wide(dtype))
    scattered[plan.rows[:U].long()] = rows[:U]
    assert torch.equal(scattered.to(dtype), dense)
    assert not rows[U:].any()
    assert torch.equal(plan.to_sparse(rows, N).to_dense(), scattered)

    buffer = torch.randn(N, 72).to(wide(dtype))
    before = buffer.clone()
    out_buffer = ops.memory_bag(indices, table, weights, plan=plan, accumulate=buffer)
    d_table, d_weights_buffer = torch.autograd.grad(out_buffer, [table, weights], d_out, allow_unused=True)
    assert d_table is None
    touched = torch.zeros(N, dtype=torch.bool)
    touched[plan.rows[:U].long()] = True
    assert torch.equal(buffer[~touched], before[~touched])
    assert torch.equal(buffer[touched], (before + scattered)[touched])

    for other in (out_rows, out_buffer):
        assert torch.equal(other, out)
    for other in (d_weights_rows, d_weights_buffer):
        assert torch.equal(other, d_weights)
    if masked:
        assert not dense[~row_mask].any()


def test_subsets_of_gradients(kernels):
    indices, table, weights = make()
    both = results(lambda t, w: ops.memory_bag(indices, t, w), table, weights)
    d_out = torch.randn(6, 72, generator=torch.Generator().manual_seed(5))
    only_table = torch.autograd.grad(ops.memory_bag(indices, table, weights.detach()), table, d_out)[0]
    only_weights = torch.autograd.grad(ops.memory_bag(indices, table.detach(), weights), weights, d_out)[0]
    assert torch.equal(only_table, both["d_table"])
    assert torch.allclose(only_weights, both["d_weights"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (3, 0, 5, 8), (3, 4, 0, 8), (3, 4, 5, 0), (0, 0, 0, 0)], ids=str)
def test_zero_sizes(kernels, shape):
    T, P, N, d = shape
    table, weights = torch.randn(N, d, requires_grad=True), torch.randn(T, P, requires_grad=True)
    out = ops.memory_bag(torch.zeros(T, P, dtype=torch.long), table, weights)
    assert out.shape == (T, d)
    out.sum().backward()
    assert table.grad.shape == (N, d)
    assert weights.grad.shape == (T, P)
    assert not table.grad.any()
    plan = ops.slot_plan(torch.zeros(T, P, dtype=torch.long), N)
    assert plan.starts.shape == (min(T * P, N) + 1,)


def test_empty_bags_are_zero_and_get_no_gradient(kernels):
    indices, table, weights = make(T=4, P=5)
    indices[1] = -1
    indices[3] = 40
    have = check_against_definition(indices, table, weights)
    assert not have["out"][[1, 3]].any()
    assert not have["d_weights"][[1, 3]].any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_indices_outside_touch_no_memory(kernels, index_dtype):
    limits = torch.iinfo(index_dtype)
    indices = torch.tensor([[0, limits.max, limits.min, -1, 5, 4, 2**31 - 1, -(2**31)]]).to(index_dtype)
    table, weights = torch.randn(5, 12, requires_grad=True), torch.full((1, 8), float("nan"))
    weights[0, [0, 5]] = torch.tensor([2.0, 3.0])
    weights.requires_grad_()
    out = ops.memory_bag(indices, table, weights)
    assert torch.allclose(out[0], 2 * table[0] + 3 * table[4])
    out.sum().backward()
    assert torch.equal(weights.grad != 0, torch.tensor([[True, *[False] * 4, True, False, False]]))
    assert table.grad[1:4].abs().sum() == 0


def test_bags_do_not_depend_on_their_neighbours(kernels):
    indices, table, weights = make(T=40, P=70, N=300, d=300, h=2)
    table, weights = table.detach(), weights.detach()
    out = ops.memory_bag(indices, table, weights)
    for t in (0, 7, 39):
        assert torch.equal(ops.memory_bag(indices[t : t + 1], table, weights[t : t + 1])[0], out[t])
    weights[:7] = float("nan")
    assert torch.equal(ops.memory_bag(indices, table, weights)[7:], out[7:])


def test_rows_do_not_depend_on_others(kernels):
    """Gradients of a row from eight hot rows among others are those of the row alone."""
    N, d = 60, 40
    indices = make_indices(50, 64, 8)
    table, weights = torch.randn(N, d, requires_grad=True), torch.randn(50, 64)
    d_out = torch.randn(50, d)
    every = torch.autograd.grad(ops.memory_bag(indices, table, weights), table, d_out)[0]
    for row in (0, 5):
        alone = torch.where(indices == row, row, -1)
        assert torch.equal(torch.autograd.grad(ops.memory_bag(alone, table, weights), table, d_out)[0][row], every[row])


def test_reproducible(kernels):
    indices, table, weights = make(T=50, P=40, N=300, kind="zipf", dtype=torch.bfloat16, h=2)
    runs = [results(lambda t, w: ops.memory_bag(indices, t, w), table, weights) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["random", "one row", "zipf"])
def test_number_of_threads_does_not_show(kind):
    indices, table, weights = make(T=300, P=200, N=2000, d=64, kind=kind)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            runs.append([*results(lambda t, w: ops.memory_bag(indices, t, w), table, weights).values(),
                         *ops.slot_plan(indices, 2000)])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.sim_only
@pytest.mark.parametrize("kind", ["zipf", "one row", "distinct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_is_that_of_the_lookups(dtype, kind):
    """Bytes that the instructions name, over those of the rows looked up; a row that is read comes in whole sectors."""
    from remora.testing import sim

    T, P, N, d = 64, 16, 1024, 512
    indices, table, weights = make(T, P, N, d, dtype=dtype, kind=kind)
    row, number = d * dtype.itemsize, 4 * T * P

    def traffic(run):
        with sim.options(memory_stats=1):
            sim.reset_stats()
            out = run()
            stats = sim.stats()
        moved = sum(c[f"global_{direction}"]["bytes"] for c in stats.values() for direction in ("load", "store"))
        return out, moved, stats

    indices, weights = indices.int(), weights.detach()[..., 0].requires_grad_()
    out, forward, stats = traffic(lambda: ops.memory_bag(indices, table, weights))
    assert forward <= 1.1 * (T * P * row + T * row + 2 * number)
    (counters,) = stats.values()
    assert counters["global_load"]["sectors"] * 32 <= 1.1 * counters["global_load"]["bytes"]
    # rows of the table, of the cotangent and of the gradient
    compulsory = (len(indices.unique()) + T * P + N) * row + 3 * number
    _, backward, _ = traffic(lambda: torch.autograd.grad(out, [table, weights], torch.ones_like(out)))
    assert backward <= 1.5 * compulsory


@pytest.mark.cpu_only
def test_table_of_more_than_two_to_the_31_elements(tmp_path):
    """Rows at the end of a sparse file: 8.6 GB of addresses, a few pages of memory."""
    N, d = 2**21 + 3, 1024
    table = torch.from_file(str(tmp_path / "table"), shared=True, size=N * d, dtype=torch.float32).view(N, d)
    rows = torch.tensor([0, 2**20 + 1, N - 2, N - 1])
    table[rows] = torch.randn(4, d)
    indices = torch.tensor([[N - 1, 0, N - 2], [2**20 + 1, N, N - 1]])
    weights = torch.randn(2, 3, requires_grad=True)
    plan = ops.slot_plan(indices, N)
    row_grad = plan.row_grad(table)
    out = ops.memory_bag(indices, table, weights, plan=plan, row_grad=row_grad)
    d_out = torch.randn(2, d)
    d_rows, d_weights = torch.autograd.grad(out, [row_grad, weights], d_out)
    small = torch.tensor([[3, 0, 2], [1, -1, 3]])
    compact, w = table[rows].requires_grad_(), weights.detach().requires_grad_()
    want = ops.memory_bag(small, compact, w)
    want_rows, want_weights = torch.autograd.grad(want, [compact, w], d_out)
    assert torch.equal(plan.rows.long(), torch.cat([rows, torch.tensor([N, N])]))
    assert torch.equal(out, want)
    assert torch.equal(d_rows[:4], want_rows)
    assert torch.equal(d_weights, want_weights)
    buffer = torch.from_file(str(tmp_path / "buffer"), shared=True, size=N * d, dtype=torch.float32).view(N, d)
    table.requires_grad_()
    ops.memory_bag(indices, table, weights, plan=plan, accumulate=buffer).backward(d_out)
    assert torch.equal(buffer[rows], want_rows)


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [{}, {"groups": 2, "layer_rows": 4, "offset": 3}], ids=str)
@pytest.mark.parametrize("h", [1, 2])
def test_gradcheck(options, h):
    indices, table, weights = make(4, 3, 6, 4, h, torch.float64, groups=options.get("groups", 1), layer_rows=4)

    def function(table, weights):
        return ops.memory_bag(indices, table, weights, **options)

    assert torch.autograd.gradcheck(function, (table, weights))
    assert torch.autograd.gradgradcheck(function, (table, weights))
    assert torch.autograd.gradgradcheck(lambda w: function(table.detach(), w), (weights,))
    assert torch.autograd.gradgradcheck(lambda t: function(t, None), (table,))


@pytest.mark.cpu_only
def test_gradgradcheck_of_rows_and_masks():
    indices, table, weights = make(4, 3, 6, 4, 2, torch.float64)
    row_mask = torch.tensor([True, False, True, True, False, True])
    plan = ops.slot_plan(indices, 6, row_mask=row_mask)
    d_out = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    row_grad = plan.row_grad(table)

    def rows(weights, d_out):
        out = ops.memory_bag(indices, table.detach(), weights, plan=plan, row_grad=row_grad)
        return torch.autograd.grad(out, [row_grad, weights], d_out, create_graph=True)

    def masked(weights, d_out):
        out = ops.memory_bag(indices, table, weights, row_mask=row_mask)
        return torch.autograd.grad(out, [table, weights], d_out, create_graph=True)

    assert torch.autograd.gradcheck(rows, (weights, d_out))
    assert torch.autograd.gradcheck(masked, (weights, d_out))


def test_accumulating_has_no_second_derivative(kernels):
    indices, table, weights = make()
    out = ops.memory_bag(indices, table, weights, accumulate=torch.zeros(40, 72))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), weights, create_graph=True)


@pytest.mark.parametrize("h", [1, 2])
def test_opcheck(h):
    indices, table, weights = make(h=h)
    plan = ops.slot_plan(indices, 40)
    d_out, where = torch.randn(6, 1, 72), (1, 40, 0)
    opcheck(torch.ops.remora.slot_plan.default, (indices, 40, *where, torch.ones(40, dtype=torch.uint8)))
    opcheck(torch.ops.remora.memory_bag_fwd.default, (indices, table, weights, *[None] * 7, *where))
    row_grad = plan.row_grad(table).detach().clone().requires_grad_()
    opcheck(
        torch.ops.remora.memory_bag_fwd.default,
        (indices, table.detach(), weights, *plan, None, row_grad, None, *where),
    )
    opcheck(torch.ops.remora.memory_bag_bwd_weights.default, (indices, table, d_out, h, *where))
    for dense in (False, True):
        opcheck(
            torch.ops.remora.memory_bag_bwd.default,
            (indices, table.detach(), weights.detach(), d_out, *plan, h, 40, *where, dense),
        )
    opcheck(
        torch.ops.remora.memory_bag_bwd_.default,
        (indices, table.detach(), weights.detach(), d_out, *plan, torch.zeros(40, 72), h, *where),
    )


def test_fullgraph():
    indices, table, weights = make()

    def loss(table, weights):
        plan = ops.slot_plan(indices, 40)
        return ops.memory_bag(indices, table, weights, plan=plan).square().sum() + plan.hits(40).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    have, want = (torch.autograd.grad(f(table, weights), [table, weights]) for f in (compiled, loss))
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": [[0]]}, TypeError, "indices must be a tensor"),
        ({"indices": torch.zeros(3, 4)}, TypeError, "indices must have dtype"),
        ({"indices": torch.zeros(3, 4, 1).long()}, ValueError, "indices must have shape"),
        ({"table": torch.zeros(5, 8).int()}, TypeError, "table must have dtype"),
        ({"table": torch.zeros(5)}, ValueError, "table must have shape"),
        ({"table": torch.zeros(8, 5).t()}, ValueError, "table must be contiguous"),
        ({"weights": torch.zeros(3, 5)}, ValueError, "weights must have shape"),
        ({"weights": torch.zeros(3, 4, 3)}, ValueError, "heads h of weights must divide the width"),
        ({"weights": torch.zeros(3, 4).long()}, TypeError, "weights must have dtype"),
        ({"groups": 0}, ValueError, "groups"),
        ({"layer_rows": 6}, ValueError, r"layer_rows \(N = 5\) must be in 0\.\.\.5, got 6"),
        ({"offset": 5}, ValueError, "offset"),
        ({"plan": (1, 2, 3, 4)}, TypeError, "plan must be a SlotPlan"),
        ({"plan": ops.slot_plan(torch.zeros(3, 5).long(), 5)}, ValueError, r"plan\.order must have shape"),
        ({"row_mask": torch.ones(4).bool()}, ValueError, "row_mask must have shape"),
        ({"row_mask": torch.ones(5)}, TypeError, "row_mask must have dtype"),
        ({"row_grad": torch.zeros(5, 8)}, ValueError, "row_grad needs plan"),
        ({"accumulate": torch.zeros(5, 8).half()}, TypeError, "accumulate must have dtype"),
        ({"accumulate": torch.zeros(4, 8)}, ValueError, "accumulate must have shape"),
        ({"accumulate": torch.zeros(5, 8), "row_grad": torch.zeros(5, 8)}, ValueError, "exclude each other"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {"indices": torch.zeros(3, 4).long(), "table": torch.zeros(5, 8), "weights": torch.zeros(3, 4)}
    ops.memory_bag(**good)
    with pytest.raises(error, match=message):
        ops.memory_bag(**{**good, **changes})
