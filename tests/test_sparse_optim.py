"""Optimizer steps on row gradients: every mode against its recurrence, bits, rounding, errors."""

import math

import pytest
import torch

from remora import _ext
from remora.ops import row_norm, rowwise_adagrad_, rowwise_adam_, sparse_adamw_
from remora.ops.pkm.sparse_optim.naive import (
    naive_philox,
    naive_rowwise_adagrad,
    naive_sparse_adam,
    naive_stochastic_round,
)
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
pytestmark = pytest.mark.usefixtures("kernels")

ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if CUDA_PATH else [torch.float64])
WIDE = {torch.float64: torch.float64}


def gradients(N, d, steps, dtype, touched=0.3):
    """Per step: rows, values with a surplus of NaN behind them, and their number."""
    result = []
    for step in range(steps):
        rows = (torch.rand(N) < touched).nonzero()[:, 0].to(torch.int32 if step % 2 else torch.int64)
        values = torch.randn(len(rows) + 3, d).to(dtype)
        values[len(rows) :] = torch.nan
        surplus = torch.full((3,), step % N, dtype=rows.dtype)
        result.append((torch.cat([rows, surplus]), values, torch.tensor(len(rows), dtype=rows.dtype)))
    return result


def by_row(steps, dtype, scale=1.0):
    return [
        {int(row): (value.double() * scale).to(dtype) for row, value in zip(rows[: int(n)], values, strict=False)}
        for rows, values, n in steps
    ]


class State:
    """A table and the state of one optimizer, updated by the operators."""

    def __init__(self, table, rowwise, mode):
        N = table.shape[0]
        wide = WIDE.get(table.dtype, torch.float32)
        self.table, self.rowwise, self.mode = table.clone(), rowwise, mode
        self.m = torch.zeros_like(table, dtype=wide)
        self.v = torch.zeros(N, dtype=wide) if rowwise else torch.zeros_like(self.m)
        self.last = torch.zeros(N, dtype=torch.int32) if mode == "catchup" else None
        self.decay = torch.zeros(N, dtype=torch.float64) if mode == "catchup" else None
        self.log_decay, self.step = 0.0, 0

    def update(self, rows, values, n, **options):
        self.step += 1
        settings = ADAM | options
        (rowwise_adam_ if self.rowwise else sparse_adamw_)(
            self.table, self.m, self.v, rows, values, num_rows=n, step=self.step, mode=self.mode,
            last_step=self.last, row_log_decay=self.decay, log_decay=self.log_decay, **settings,
        )  # fmt: skip
        self.log_decay += math.log(1 - settings["lr"] * settings["weight_decay"])


@pytest.mark.parametrize("mode", ["lazy", "catchup", "dense"])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(("N", "d"), [(70, 12), (5, 1), (33, 131)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_is_its_recurrence(dtype, N, d, rowwise, mode):
    if dtype is not torch.float32 and (N, d) != (70, 12):
        N, d = 9, 10
    table = torch.randn(N, d).to(dtype)
    steps = gradients(N, d, 4, dtype)
    state = State(table, rowwise, mode)
    for rows, values, n in steps:
        state.update(rows, values, n)
    oracle = naive_sparse_adam(table.double(), by_row(steps, torch.float64), mode=mode, rowwise=rowwise, **ADAM)
    plain = naive_sparse_adam(table, by_row(steps, dtype), mode=mode, rowwise=rowwise, **ADAM)
    for name, have, want, yardstick in zip(
        ("p", "m", "v"), (state.table, state.m, state.v), oracle, plain, strict=True
    ):
        assert_accurate(have, want, None if dtype is torch.float64 else yardstick, name, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adagrad_is_its_recurrence(dtype):
    table = torch.randn(40, 20).to(dtype)
    steps = gradients(40, 20, 4, dtype)
    have, total = table.clone(), torch.zeros(40, dtype=WIDE.get(dtype, torch.float32))
    for step, (rows, values, n) in enumerate(steps, 1):
        rowwise_adagrad_(have, total, rows, values, num_rows=n, step=step, lr=0.1, weight_decay=0.2)
    settings = {"lr": 0.1, "eps": 1e-10, "weight_decay": 0.2}
    oracle = naive_rowwise_adagrad(table.double(), by_row(steps, torch.float64), **settings)
    plain = naive_rowwise_adagrad(table, by_row(steps, dtype), **settings)
    for name, x, y, z in zip(("p", "G"), (have, total), oracle, plain, strict=True):
        assert_accurate(x, y, None if dtype is torch.float64 else z, name, dtype=dtype)


def test_dense_mode_is_adamw():
    """To rounding that of torch; to the bit that of the same gradient with its rows of zeros written out."""
    table = torch.randn(50, 24)
    steps = gradients(50, 24, 5, torch.float32)
    sparse, full = State(table, False, "dense"), State(table, False, "dense")
    parameter = torch.nn.Parameter(table.clone())
    adamw = torch.optim.AdamW([parameter], **ADAM)
    for rows, values, n in steps:
        sparse.update(rows, values, n)
        dense = torch.zeros_like(table).index_copy_(0, rows[: int(n)].long(), values[: int(n)])
        full.update(torch.arange(50), dense, None)
        parameter.grad = dense
        adamw.step()
    for name in ("table", "m", "v"):
        assert torch.equal(getattr(sparse, name), getattr(full, name)), name
    torch.testing.assert_close(sparse.table, parameter.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rowwise", [False, True])
def test_modes_agree_to_the_bit_where_no_step_is_missed(rowwise):
    table = torch.randn(40, 24)
    steps = [(torch.arange(40), torch.randn(40, 24), None) for _ in range(4)]
    states = [State(table, rowwise, mode) for mode in ("lazy", "catchup", "dense")]
    for state in states:
        for step in steps:
            state.update(*step)
    for state in states[1:]:
        assert torch.equal(state.table, states[0].table)
        assert torch.equal(state.m, states[0].m)
        assert torch.equal(state.v, states[0].v)


def test_catch_up_is_dense_but_for_the_drift():
    """Moments agree; weights agree where the first moment was zero while the row was not read."""
    table = torch.randn(6, 8)
    late = torch.tensor([2, 5])
    dense, catch_up = State(table, False, "dense"), State(table, False, "catchup")
    for step in range(5):
        rows = late if step in (3, 4) else torch.tensor([0])
        values = torch.randn(len(rows), 8)
        lr = 0.05 / (step + 1)
        dense.update(rows, values, None, lr=lr)
        catch_up.update(rows, values, None, lr=lr)
    torch.testing.assert_close(catch_up.table[late], dense.table[late])
    torch.testing.assert_close(catch_up.m[late], dense.m[late])
    torch.testing.assert_close(catch_up.v[late], dense.v[late])


def test_the_table_counts_as_changed():
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    before = parameter._version
    state = State(parameter.detach(), False, "lazy")
    state.table = parameter.detach()
    state.update(torch.tensor([1]), torch.randn(1, 3), None)
    assert parameter._version > before


def test_scale_is_read_on_the_device():
    table, (rows, values, n) = torch.randn(30, 8), gradients(30, 8, 1, torch.float32)[0]
    scaled, plain = State(table, False, "lazy"), State(table, False, "lazy")
    scaled.update(rows, values, n, grad_scale=torch.tensor(0.25))
    plain.update(rows, values * 0.25, n)
    assert torch.equal(scaled.table, plain.table)


@pytest.mark.parametrize("mode", ["lazy", "catchup", "dense"])
def test_rows_outside_the_table_are_dropped(mode):
    table = torch.randn(8, 4)
    state, inside = State(table, False, mode), State(table, False, mode)
    values = torch.randn(5, 4)
    state.update(torch.tensor([-7, -1, 3, 8, 2**40]), values, None)
    inside.update(torch.tensor([3]), values[2:3].contiguous(), None)
    assert torch.equal(state.table, inside.table)
    for count in (-5, 99):
        state.update(torch.tensor([0, 1, 2, 3, 4]), values, torch.tensor(count))
    assert state.table.isfinite().all()


def test_rows_keep_their_bits_in_any_company():
    """A row's update depends on no other row, nor on the number of threads, nor on the run."""
    table = torch.randn(200, 40)
    rows, values, n = gradients(200, 40, 1, torch.float32, touched=0.8)[0]
    runs = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        state = State(table, True, "lazy")
        state.update(rows, values, n)
        torch.set_num_threads(before)
        runs.append(state)
    assert all(torch.equal(run.table, runs[0].table) for run in runs)
    alone = State(table, True, "lazy")
    alone.update(rows[7:8], values[7:8].contiguous(), None)
    assert torch.equal(alone.table[rows[7]], runs[0].table[rows[7]])


def test_philox_known_answers():
    """Those of the generator's authors (random123, kat_vectors)."""
    full = 2**32 - 1
    assert naive_philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert naive_philox([full] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("d", [12, 7])
def test_stochastic_rounding_draws_the_bits_of_its_counter(d):
    """Without gradient and decay a step only rounds: with known weights the random bits show."""
    table = torch.randn(5, d).bfloat16()
    rows, values = torch.arange(5), torch.randn(5, d)
    settings = {"lr": 0.01, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 1.0}
    for offset, seed, step in ((0, 3, 1), (8, 2**40 + 1, 77)):
        exact = State(table.float(), False, "lazy")
        rounded = State(table, False, "lazy")
        exact.step = rounded.step = step - 1
        exact.update(rows, values, None, **settings)
        rounded.update(rows, values, None, stochastic_rounding=True, seed=seed, column_offset=offset, **settings)
        assert torch.equal(rounded.table, naive_stochastic_round(exact.table, seed, step, offset))


@pytest.mark.cpu_only
def test_stochastic_rounding_is_right_in_the_mean():
    """Steps a tenth of the spacing of bfloat16 numbers are lost by rounding to nearest, and add up with this."""
    table = torch.full((64, 256), 1.0, dtype=torch.bfloat16)
    spacing, rows = 2.0**-7, torch.arange(64)
    settings = {"lr": spacing / 10, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 0.0}
    nearest, stochastic = State(table, False, "lazy"), State(table, False, "lazy")
    for _ in range(20):
        nearest.update(rows, -torch.ones(64, 256), None, **settings)
        stochastic.update(rows, -torch.ones(64, 256), None, stochastic_rounding=True, seed=5, **settings)
    assert torch.equal(nearest.table, table)
    mean = float(stochastic.table.double().mean())
    # One step has variance spacing^2 * 0.09; the mean is over 20 steps of 64 * 256 weights.
    deviation = spacing * math.sqrt(20 * 0.09 / table.numel())
    assert abs(mean - (1 + 20 * spacing / 10)) < 5 * deviation
    weird = torch.tensor([[math.inf, -math.inf, math.nan, 3.3895e38]]).bfloat16()
    state = State(weird, False, "lazy")
    state.update(torch.tensor([0]), torch.zeros(1, 4), None, stochastic_rounding=True, **(settings | {"eps": 1.0}))
    torch.testing.assert_close(state.table, weird, rtol=0, atol=0, equal_nan=True)


def test_shards_of_columns_round_like_the_whole():
    table = torch.randn(9, 24).bfloat16()
    rows, values = torch.arange(9), torch.randn(9, 24)
    whole = State(table, False, "lazy")
    whole.update(rows, values, None, stochastic_rounding=True, seed=11)
    for begin in (0, 8, 16):
        shard = State(table[:, begin : begin + 8].contiguous(), False, "lazy")
        part = values[:, begin : begin + 8].contiguous()
        shard.update(rows, part, None, stochastic_rounding=True, seed=11, column_offset=begin)
        assert torch.equal(shard.table, whole.table[:, begin : begin + 8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "d"), [(1, 1), (130, 33), (65, 8)])
def test_row_norm(dtype, C, d):
    values = torch.randn(C, d).to(dtype)
    for n in (None, 0, C // 2):
        want = values[:n].double().norm()
        count = None if n is None else torch.tensor(n)
        have = row_norm(values, count)
        torch.testing.assert_close(have.double(), want, rtol=1e-6, atol=0)
        assert torch.equal(have, row_norm(values, count))


def test_empty():
    state = State(torch.randn(4, 3), False, "lazy")
    before = state.table.clone()
    state.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 3), None)
    assert torch.equal(state.table, before)
    assert float(row_norm(torch.empty(0, 3))) == 0


def test_registration():
    table, rows, values = torch.randn(6, 4), torch.tensor([1, 3]), torch.randn(2, 4)
    m, v = torch.zeros(6, 4), torch.zeros(6, 4)
    last, decay = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.float64)
    options = (0.1, 0.9, 0.99, 1e-8, 0.01, 0.0, 1, False, 0, 0)
    tests = ("test_schema", "test_faketensor")
    update = torch.ops.remora.sparse_update_.default
    torch.library.opcheck(
        update, (table, m, v, last, decay, rows, values, None, None, False, *options), test_utils=tests
    )
    torch.library.opcheck(update, (table, None, v[:, 0].clone(), None, None, rows, values, torch.tensor(1),
                                   torch.tensor(0.5), False, *options), test_utils=tests)  # fmt: skip
    torch.library.opcheck(torch.ops.remora.row_norm.default, (values, torch.tensor(1)), test_utils=tests)

    compiled = torch.compile(lambda t, a, b: sparse_adamw_(t, a, b, rows, values, lr=0.1, step=1), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    want = sparse_adamw_(table.clone(), m.clone(), v.clone(), rows, values, lr=0.1, step=1)
    assert torch.equal(compiled(table.clone(), m.clone(), v.clone()), want)


@pytest.mark.sim_only
def test_traffic_is_that_of_the_rows():
    from remora.testing import sim

    N, d, U = 512, 64, 5
    table = torch.randn(N, d)
    state = State(table, False, "lazy")
    rows = torch.arange(0, N, 16, dtype=torch.int32)
    with sim.options(memory_stats=1):
        sim.reset_stats()
        state.update(rows, torch.randn(len(rows), d), torch.tensor(U, dtype=torch.int32))
        (counters,) = [c for name, c in sim.stats().items() if "sparse_update" in name]
    loaded, stored = (counters[f"global_{kind}"]["bytes"] for kind in ("load", "store"))
    assert stored == 3 * U * d * 4
    assert 4 * U * d * 4 <= loaded < 4 * U * d * 4 + 4096


def wrong(error, match, **change):
    arguments = {
        "table": torch.randn(4, 3), "exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3),
        "rows": torch.tensor([1]), "grad_rows": torch.randn(1, 3), "lr": 0.1, "step": 1,
    }  # fmt: skip
    return pytest.param(arguments | change, error, match, id=match)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        wrong(TypeError, "table must be a tensor", table=None),
        wrong(ValueError, "table must be contiguous", table=torch.randn(3, 4).t()),
        wrong(TypeError, "exp_avg must have dtype", exp_avg=torch.zeros(4, 3).bfloat16()),
        wrong(ValueError, "exp_avg_sq must have shape", exp_avg_sq=torch.zeros(4)),
        wrong(TypeError, "rows must have dtype", rows=torch.tensor([1.0])),
        wrong(ValueError, "rows must have shape", rows=torch.tensor([1, 2])),
        wrong(ValueError, "grad_rows must have shape", grad_rows=torch.randn(1, 4)),
        wrong(TypeError, "grad_rows must have dtype", grad_rows=torch.randn(1, 3).bfloat16()),
        wrong(ValueError, "num_rows must be one number", num_rows=torch.tensor([1, 2])),
        wrong(TypeError, "grad_scale must have dtype", grad_scale=torch.tensor(1)),
        wrong(ValueError, "mode must be one of", mode="eager"),
        wrong(ValueError, "last_step and row_log_decay", mode="catchup"),
        wrong(ValueError, "step must be in", step=0),
        wrong(ValueError, "seed must be in", seed=-1),
        wrong(ValueError, "lr must not be negative", lr=-1.0),
        wrong(ValueError, "betas must be in", betas=(0.9, 1.0)),
        wrong(ValueError, "eps must not be negative", eps=-1.0),
        wrong(ValueError, "lr \\* weight_decay", weight_decay=10.0),
        wrong(ValueError, "stochastic_rounding must be False", stochastic_rounding=True),
        wrong(ValueError, "column_offset must be a multiple of 4", column_offset=2),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        sparse_adamw_(**arguments)
