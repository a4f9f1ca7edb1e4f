"""The causal convolution against its definition, on sequences and on routed rows."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.modules import ShortConvolution
from remora.ops.recurrence.causal_conv1d.naive import naive_causal_conv1d
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(B=2, T=13, D=24, W=4, dtype=torch.float32, bias=True, state=True, num_seqs=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    weight_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(B, T, D),
        "weight": normal(D, W, dtype=weight_dtype),
        "bias": normal(D, dtype=weight_dtype) if bias else None,
        "initial_state": normal(num_seqs or B, W - 1, D) if state else None,
    }


def cotangents(y, final_state, dtype=None, seed=1):
    """Values that `dtype` can hold, so that the definition in another dtype gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(dtype or t.dtype).to(t.dtype) for t in (y, final_state)]


def results(y, final_state, tensors, dtype=None):
    """Outputs and gradients of every tensor given, by name."""
    leaves = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(
        [y, final_state],
        list(leaves.values()),
        cotangents(y, final_state, dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return {
        "y": y.detach(),
        "final_state": final_state.detach(),
        **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)},
    }


def definition(tensors, activation, dtype, given):
    copies = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    y, final_state = naive_causal_conv1d(
        copies["x"], copies["weight"], copies["bias"], activation, copies["initial_state"]
    )
    return results(y, final_state, copies, given)


@dtypes
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"W": 1},
        {"W": 2, "bias": False},
        {"W": 3, "state": False},
        {"W": 8, "T": 5},
        {"T": 1},
        {"T": 2, "W": 4},
        {"T": 150, "D": 7, "W": 4},
        {"T": 300, "B": 1, "D": 70, "W": 5},
        {"D": 520, "T": 9},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()) or "base",
)
def test_matches_the_definition(kernels, sizes, activation, dtype):
    tensors = make(**sizes, dtype=dtype)
    y, final_state = ops.causal_conv1d(**tensors, activation=activation, output_final_state=True)
    have = results(y, final_state, tensors)
    oracle = definition(tensors, activation, torch.float64, dtype)
    yardstick = definition(tensors, activation, dtype, dtype)
    assert torch.equal(final_state.double(), oracle["final_state"])
    for name, value in have.items():
        if value.numel():
            plain = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
            assert_accurate(value, oracle[name], plain, name, dtype=dtype)


def routed(J=3, T=40, num_segments=6, dropped=7, seed=3):
    """A permutation of J * T rows and offsets of uneven segments, one of them empty, that leave `dropped` rows over."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(J * T, generator=generator).to(torch.int32)
    cuts = torch.randint(0, J * T - dropped + 1, (num_segments - 1,), generator=generator).sort().values
    cuts[1] = cuts[0]
    return rows, torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([J * T - dropped])])


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["per choice", "shared"])
@pytest.mark.parametrize("W", [2, 4, 8])
def test_routed_rows_are_sequences_of_gathered_rows(kernels, W, shared, dtype):
    """Bitwise: the same as gathering the rows of each segment, convolving it alone and scattering the result."""
    J, T, D = 3, 40, 24
    rows, offsets = routed(J, T)
    tensors = make(1 if shared else J, T, D, W, dtype, num_seqs=len(offsets) - 1)
    x = tensors["x"].expand(J, T, D)
    y, final_state = ops.causal_conv1d(
        **{**tensors, "x": x}, activation="silu", output_final_state=True, cu_seqlens=offsets, rows=rows
    )
    d_y, d_final = cotangents(y, final_state)
    grads = torch.autograd.grad([y, final_state], [x, tensors["initial_state"]], [d_y, d_final])

    flat, want_y, want_dx = x.reshape(J * T, D), torch.zeros(J * T, D, dtype=dtype), torch.zeros(J * T, D, dtype=dtype)
    for n in range(len(offsets) - 1):
        segment = rows[offsets[n] : offsets[n + 1]].long()
        part = flat[segment][None].detach().requires_grad_()
        state = tensors["initial_state"][n : n + 1].detach().requires_grad_()
        part_y, part_final = ops.causal_conv1d(
            part, tensors["weight"], tensors["bias"], "silu", initial_state=state, output_final_state=True
        )
        dx, d_state = torch.autograd.grad(
            [part_y, part_final], [part, state], [d_y.reshape(J * T, D)[segment][None], d_final[n : n + 1]]
        )
        want_y[segment], want_dx[segment] = part_y[0].detach(), dx[0]
        assert torch.equal(part_final[0], final_state[n])
        assert torch.equal(d_state[0], grads[1][n])
    assert torch.equal(y.reshape(J * T, D), want_y)
    assert torch.equal(grads[0].reshape(J * T, D), want_dx)


def unaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach())


@dtypes
@pytest.mark.parametrize("moved", ["x", "initial_state", "d_y", "d_final_state"])
def test_unaligned_tensors_equal_aligned_ones_to_the_bit(kernels, moved, dtype):
    tensors = make(dtype=dtype)
    given = {**tensors, **({moved: unaligned(tensors[moved]).requires_grad_()} if moved in tensors else {})}
    have, want = (ops.causal_conv1d(**x, output_final_state=True) for x in (given, tensors))
    d = dict(zip(("d_y", "d_final_state"), cotangents(*want), strict=True))
    d_moved = {name: unaligned(t) if name == moved else t for name, t in d.items()}
    assert all(torch.equal(x, y) for x, y in zip(have, want, strict=True))
    grads = [
        torch.autograd.grad(outputs, list(leaves.values()), list(cotangent.values()))
        for outputs, leaves, cotangent in ((have, given, d_moved), (want, tensors, d))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_a_step_on_an_unaligned_pool(kernels):
    tensors = {name: t.detach() for name, t in make(T=1).items()}
    states = [tensors["initial_state"].clone(), unaligned(tensors["initial_state"])]
    have, want = (ops.causal_conv1d_step(tensors["x"], tensors["weight"], tensors["bias"], s) for s in states)
    assert torch.equal(have, want)
    assert torch.equal(*states)


def test_packed_sequences_do_not_see_each_other(kernels):
    tensors = make(1, 150, 24, 4, num_seqs=5)
    offsets = torch.tensor([0, 3, 3, 70, 71, 150])
    y, final_state = ops.causal_conv1d(**tensors, output_final_state=True, cu_seqlens=offsets)
    for n in range(5):
        part = {
            **tensors,
            "x": tensors["x"][:, offsets[n] : offsets[n + 1]],
            "initial_state": tensors["initial_state"][n : n + 1],
        }
        alone, last = ops.causal_conv1d(**part, output_final_state=True)
        assert torch.equal(alone, y[:, offsets[n] : offsets[n + 1]])
        assert torch.equal(last[0], final_state[n])


def test_causal_to_the_bit(kernels):
    tensors = make(1, 140, 24, 4)
    y, _ = ops.causal_conv1d(**tensors, activation="silu")
    later = tensors["x"].detach().clone()
    later[:, 70:] = float("nan")
    changed, _ = ops.causal_conv1d(**{**tensors, "x": later}, activation="silu")
    assert torch.equal(changed[:, :70], y[:, :70])
    assert changed[:, 70:].isnan().all()


def test_reproducible(kernels):
    tensors = make(3, 300, 70, 4, torch.bfloat16)
    runs = []
    for _ in range(3):
        runs.append(results(*ops.causal_conv1d(**tensors, activation="silu", output_final_state=True), tensors))
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@dtypes
@pytest.mark.parametrize("W", [1, 4, 6])
def test_steps_continue_a_sequence(kernels, W, dtype):
    tensors = {n: None if t is None else t.detach() for n, t in make(2, 9, 24, W, dtype).items()}
    y, final_state = ops.causal_conv1d(**tensors, activation="silu", output_final_state=True)
    head = {**tensors, "x": tensors["x"][:, :4]}
    _, state = ops.causal_conv1d(**head, activation="silu", output_final_state=True)
    for t in range(4, 9):
        step = ops.causal_conv1d_step(
            tensors["x"][:, t : t + 1], tensors["weight"], tensors["bias"], state, activation="silu"
        )
        assert torch.equal(step[:, 0], y[:, t])
    assert torch.equal(state, final_state)


def test_step_on_a_pool_of_memories(kernels):
    """Two choices of three sequences out of four memories each; indices outside their range skip."""
    generator = torch.Generator().manual_seed(0)
    M, D, W = 4, 24, 4
    x = torch.randn(2, 3, D, generator=generator)
    weight, state = torch.randn(D, W, generator=generator), torch.randn(5 * M, W - 1, D, generator=generator)
    slots, memories = torch.tensor([4, -1, 2]), torch.tensor([[0, 1, 3], [2, 3, 4]])
    before = state.clone()
    y = ops.causal_conv1d_step(x, weight, None, state, None, slots, memories, M)
    touched = set()
    for j in range(2):
        for n in range(3):
            if slots[n] < 0 or memories[j, n] >= M:
                assert torch.equal(y[j, n], torch.zeros(D))
                continue
            row = int(slots[n] * M + memories[j, n])
            touched.add(row)
            alone = before[row : row + 1].clone()
            want = ops.causal_conv1d_step(x[j, n][None, None], weight, None, alone)
            assert torch.equal(want[0, 0], y[j, n])
            assert torch.equal(alone[0], state[row])
    untouched = [i for i in range(5 * M) if i not in touched]
    assert torch.equal(state[untouched], before[untouched])


def test_rows_out_of_range_are_clamped(kernels):
    tensors = make(2, 20, 8, 4, num_seqs=2)
    rows = torch.arange(40, dtype=torch.int32)
    rows[::3] = 2**31 - 1
    rows[1::3] = -(2**31)
    y, _ = ops.causal_conv1d(**tensors, cu_seqlens=torch.tensor([-5, 30, 2**31 - 1]), rows=rows)
    y.sum().backward()


@pytest.mark.parametrize("is_routed", [False, True], ids=["packed", "routed"])
@pytest.mark.parametrize(
    "offsets", [[5, 2**31 - 1, -7, 3], [30, 20, 10, 0], [0, 25, 10, 28], [-9, -5, -1, -3]], ids=str
)
def test_falling_offsets_are_raised_to_the_largest_before_them(kernels, offsets, is_routed):
    """The operators below the checks: sequences neither overlap nor leave the tensor, whatever the offsets say."""
    tensors = make(1, 40, 8, 4, num_seqs=3)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int() if is_routed else None
    d_y, d_final = torch.randn(1, 40, 8), torch.randn(3, 3, 8)
    arguments = [None if t is None else t.detach() for t in tensors.values()]

    def run(bounds):
        where = (torch.tensor(bounds, dtype=torch.int32), rows)
        forward = torch.ops.remora.causal_conv1d_fwd(*arguments, *where, True, True)
        return [*forward, *torch.ops.remora.causal_conv1d_bwd(*arguments, *where, d_y, d_final, True)]

    raised = torch.tensor(offsets).cummax(0).values.clamp(0, 40).tolist()
    for have, want in zip(run(offsets), run(raised), strict=True):
        assert torch.equal(have, want)


def test_the_module_is_the_operator(kernels):
    module = ShortConvolution(24, 4, bias=True)
    x = torch.randn(2, 9, 24)
    y, state = module(x, output_final_state=True)
    want, last = ops.causal_conv1d(
        x, module.weight[:, 0], module.bias, "silu", x.new_zeros(2, 3, 24), output_final_state=True
    )
    assert torch.equal(y, want)
    assert torch.equal(state, last)


@pytest.mark.cpu_only
def test_gradcheck():
    tensors = make(2, 6, 3, 4, torch.float64)
    arguments = [tensors["x"], tensors["weight"], tensors["bias"], tensors["initial_state"]]

    def function(x, weight, bias, state):
        return ops.causal_conv1d(x, weight, bias, "silu", state, True)

    assert torch.autograd.gradcheck(function, arguments)
    rows, offsets = torch.randperm(12).to(torch.int32), torch.tensor([0, 5, 10])
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, state: ops.causal_conv1d(x, weight, bias, "silu", state, True, offsets, rows), arguments
    )


@pytest.mark.parametrize("is_routed", [False, True])
def test_opcheck(is_routed):
    tensors = make(2, 10, 8, 4)
    rows, offsets = (torch.randperm(20).to(torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32))
    where = (offsets, rows) if is_routed else (None, None)
    x = tuple(tensors.values())
    opcheck(torch.ops.remora.causal_conv1d_fwd.default, (*x, *where, True, True))
    detached = [t.detach() for t in x]
    d_y, d_final = torch.randn(2, 10, 8), torch.randn(2, 3, 8)
    opcheck(torch.ops.remora.causal_conv1d_bwd.default, (*detached, *where, d_y, d_final, True))
    opcheck(
        torch.ops.remora.causal_conv1d_step_.default,
        (torch.randn(2, 1, 8), *detached[1:3], torch.randn(2, 3, 8), None, None, 1, True),
    )


def test_fullgraph():
    tensors = make(2, 10, 8, 4)
    compiled = torch.compile(ops.causal_conv1d, fullgraph=True, backend="aot_eager")
    have, want = (f(**tensors, activation="silu", output_final_state=True) for f in (compiled, ops.causal_conv1d))
    assert torch.equal(have[0], want[0])
    assert torch.equal(have[1], want[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(2, 5, 8).int()}, TypeError, "x must have dtype"),
        ({"weight": torch.zeros(8, 9)}, ValueError, r"the width W of weight must be in 1\.\.\.8, got 9"),
        ({"weight": torch.zeros(7, 4)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(7)}, ValueError, "bias must have shape"),
        ({"activation": "relu"}, ValueError, "activation must be one of"),
        ({"initial_state": torch.zeros(2, 4, 8)}, ValueError, "initial_state must have shape"),
        ({"initial_state": torch.zeros(2, 3, 8).half()}, TypeError, "initial_state must have dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens needs inputs with B = 1"),
        ({"rows": torch.arange(10, dtype=torch.int32)}, ValueError, "rows needs cu_seqlens"),
        ({"rows": torch.arange(9, dtype=torch.int32)}, ValueError, "rows must have shape"),
        ({"rows": torch.arange(10)}, TypeError, "rows must have dtype"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(8, 4)}
    ops.causal_conv1d(**good)
    with pytest.raises(error, match=message):
        ops.causal_conv1d(**{**good, **changes})
