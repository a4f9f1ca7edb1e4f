"""The selective scan against its definition, and what it promises."""

import pytest
import torch
from torch.library import opcheck

from remora import _ext, ops
from remora.ops.recurrence.selective_scan.naive import naive_selective_scan
from remora.testing.numeric import assert_accurate

CUDA_PATH = _ext.HOST_BACKEND != "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if CUDA_PATH else [torch.float64])]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make(
    B=2, D=40, T=70, N=16, G=1, dtype=torch.float32, z=True, D_skip=True, bias=True, state=True, num_seqs=None,
    token_major=False, rate=4.0, seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens():
        return normal(B, T, D).transpose(1, 2) if token_major else normal(B, D, T)

    tensors = {
        "u": tokens(),
        "delta": tokens(),
        "A": -rate * torch.rand(D, N, generator=generator).to(wide),
        "B": normal(B, G, N, T),
        "C": normal(B, G, N, T),
        "D": normal(D, dtype=wide) if D_skip else None,
        "z": tokens() if z else None,
        "delta_bias": normal(D, dtype=wide) if bias else None,
        "initial_state": normal(num_seqs or B, D, N, dtype=wide) if state else None,
    }
    return {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}


def scan(tensors, softplus=True, **options):
    leaves = [tensors[name] for name in NAMES[:8]]
    return ops.selective_scan(*leaves, softplus, True, initial_state=tensors["initial_state"], **options)


def cotangents(out, state, dtype, seed=1):
    """Values that `dtype` can hold, so that the definition in another dtype gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(dtype).to(t.dtype) for t in (out, state)]


def results(out, state, tensors, dtype):
    leaves = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad([out, state], list(leaves.values()), cotangents(out, state, dtype))
    return {"out": out.detach(), "state": state.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def definition(tensors, softplus, dtype, given, reverse=False):
    copies = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    flipped = {
        n: t.flip(-1) if reverse and n in ("u", "delta", "B", "C", "z") and t is not None else t
        for n, t in copies.items()
    }
    out, state = naive_selective_scan(*(flipped[n] for n in NAMES[:8]), softplus, flipped["initial_state"])
    return results(out.flip(-1) if reverse else out, state, copies, given)


def check_against_definition(tensors, softplus, dtype, **options):
    out, state = scan(tensors, softplus, **options)
    have = results(out, state, tensors, dtype)
    oracle = definition(tensors, softplus, torch.float64, dtype, **options)
    yardstick = definition(tensors, softplus, dtype, dtype, **options)
    for name, value in have.items():
        if value.numel():
            plain = None if dtype == torch.float64 else yardstick[name].to(value.dtype)
            assert_accurate(value, oracle[name], plain, name, dtype=dtype, gradient=name.startswith("d"))


@dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"T": 1},
        {"T": 2, "D": 1},
        {"T": 64},
        {"T": 65, "D": 32},
        {"T": 150, "D": 33, "B": 1},
        {"N": 1},
        {"N": 5, "D": 7},
        {"N": 64, "D": 12, "T": 20},
        {"N": 100, "D": 6, "T": 20},
        {"G": 2},
        {"G": 5, "T": 20},
        {"z": False},
        {"D_skip": False, "bias": False, "state": False},
        {"token_major": True, "T": 81},
        {"rate": 100.0},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()) or "base",
)
def test_matches_the_definition(kernels, sizes, dtype):
    check_against_definition(make(**sizes, dtype=dtype), True, dtype)


@dtypes
@pytest.mark.parametrize("sizes", [{}, {"N": 40, "D": 20, "G": 2}, {"N": 100, "D": 9, "z": False}], ids=str)
def test_aligned_tokens_equal_others_to_the_bit(kernels, sizes, dtype):
    """Kernels read aligned tokens by vectors: all the same ones."""
    tensors = make(T=144, dtype=dtype, **sizes)
    check_against_definition(tensors, True, dtype)
    moved = dict(tensors)
    for name in ("u", "delta", "B", "C", "z"):
        if (t := tensors[name]) is not None:
            wider = torch.zeros(*t.shape[:-1], 145, dtype=dtype)
            moved[name] = wider[..., 1:].copy_(t.detach()).requires_grad_()
    have, want = (results(*scan(x), x, dtype) for x in (moved, tensors))
    assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.parametrize("token_major", [False, True], ids=["mamba layout", "token major"])
def test_reverse(kernels, token_major):
    check_against_definition(make(T=70, token_major=token_major), True, torch.float32, reverse=True)


def test_steps_without_softplus(kernels):
    tensors = make(T=30, bias=False)
    tensors["delta"] = tensors["delta"].detach().abs().requires_grad_()
    check_against_definition(tensors, False, torch.float32)


def test_growing_states(kernels):
    """A positive rate is allowed; the state grows."""
    tensors = make(T=20, B=1, D=8, rate=0.3)
    tensors["A"] = tensors["A"].detach().neg().requires_grad_()
    check_against_definition(tensors, True, torch.float32)


def test_large_logits_pass_through_softplus(kernels):
    tensors = make(T=20, B=1, D=8)
    tensors["delta"] = (tensors["delta"].detach() * 30).requires_grad_()
    check_against_definition(tensors, True, torch.float32)


def test_outputs_have_the_layout_of_u():
    assert scan(make(token_major=True))[0].stride(1) == 1
    assert scan(make())[0].is_contiguous()


def test_maps_of_other_shapes():
    tensors = make(B=1, D=6, T=20)
    plain = {**tensors, "B": tensors["B"][:, 0], "C": tensors["C"][:, 0]}
    assert torch.equal(scan(plain)[0], scan(tensors)[0])
    constant = {**tensors, "B": torch.randn(6, 16).requires_grad_()}
    spread = {**constant, "B": constant["B"][None, :, :, None].expand(1, 6, 16, 20)}
    out, _state = scan(constant)
    want, _ = naive_selective_scan(
        *(spread[n] for n in ("u", "delta", "A", "B")), tensors["C"].repeat_interleave(6, 1),
        *(spread[n] for n in ("D", "z", "delta_bias")), True, spread["initial_state"],
    )  # fmt: skip
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(out.sum(), constant["B"])
    assert grad.shape == (6, 16)


OFFSETS = torch.tensor([0, 5, 5, 75, 140, 150, 150])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("token_major", [False, True], ids=["mamba layout", "token major"])
def test_packed_sequences_equal_single_ones_to_the_bit(kernels, reverse, token_major):
    tensors = make(B=1, T=150, num_seqs=6, token_major=token_major)
    out, state = scan(tensors, cu_seqlens=OFFSETS, reverse=reverse)
    d_out, d_state = cotangents(out, state, torch.float32)
    grads = torch.autograd.grad([out, state], [tensors[n] for n in ("u", "z", "B", "initial_state")], [d_out, d_state])
    for n, (begin, end) in enumerate(zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)):
        alone = {
            k: t if t is None or t.dim() < 3 else t[n : n + 1] if k == "initial_state" else t[..., begin:end]
            for k, t in tensors.items()
        }
        alone = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in alone.items()}
        one, last = scan(alone, reverse=reverse)
        assert torch.equal(out[..., begin:end], one)
        assert torch.equal(state[n : n + 1], last)
        want = torch.autograd.grad(
            [one, last], [alone[k] for k in ("u", "z", "B", "initial_state")],
            [d_out[..., begin:end], d_state[n : n + 1]],
        )  # fmt: skip
        for have, (grad, k) in zip(grads, zip(want, ("u", "z", "B", "state"), strict=True), strict=True):
            assert torch.equal(have[n : n + 1] if k == "state" else have[..., begin:end], grad), k


def test_tokens_outside_every_sequence_are_zero(kernels):
    """Only a direct call gets that far; the public function refuses such offsets on the CPU."""
    tensors = make(B=1, T=90, num_seqs=1)
    args = [tensors[n].detach() for n in NAMES]
    offsets = torch.tensor([10, 80], dtype=torch.int32)
    out, state, saved = torch.ops.remora.selective_scan_fwd(*args, offsets, True, False, True, True)
    assert torch.equal(out[..., :10], torch.zeros(1, 40, 10))
    assert torch.equal(out[..., 80:], torch.zeros(1, 40, 10))
    assert out[..., 10:80].isfinite().all()
    assert state.isfinite().all()
    grads = torch.ops.remora.selective_scan_bwd(
        *args[:8], offsets, saved, torch.ones_like(out), None, True, True, False
    )
    for name, grad in zip(("u", "delta", "A", "B", "C", "D", "z"), grads, strict=False):
        assert grad.isfinite().all(), name
        if name in ("u", "delta", "B", "C", "z"):
            assert not grad[..., :10].any(), name
            assert not grad[..., 80:].any(), name


def test_wild_offsets_stay_within_the_tensors(kernels):
    tensors = make(B=1, T=90, num_seqs=2)
    args = [tensors[n].detach() for n in NAMES]
    offsets = torch.tensor([-(2**31), 2**31 - 1, 2**31 - 1], dtype=torch.int32)
    out, _, _ = torch.ops.remora.selective_scan_fwd(*args, offsets, True, False, True, True)
    assert out.isfinite().all()


@dtypes
def test_causal_to_the_bit(kernels, dtype):
    tensors = make(T=90, dtype=dtype)
    changed = {n: None if t is None else t.detach().clone() for n, t in tensors.items()}
    for name in ("u", "delta", "B", "C", "z"):
        changed[name][..., 70] = float("nan")
        changed[name][..., 75] = float("inf")
    with torch.no_grad():
        assert torch.equal(scan(tensors)[0][..., :70], scan(changed)[0][..., :70])


def test_reproducible_and_independent_of_neighbours(kernels):
    runs = []
    for _ in range(3):
        tensors = make(T=130)
        runs.append(results(*scan(tensors), tensors, torch.float32))
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name
    first = {n: None if t is None else t[:1] if t.dim() >= 3 else t for n, t in make(T=130).items()}
    assert torch.equal(scan(first)[0], runs[0]["out"][:1])


@pytest.mark.sim_only
def test_work_of_the_kernels():
    """Instructions of 32 updates of a state: nearly all are of the kernels that visit every token."""
    from remora.testing import sim

    B, D, T, N = 1, 128, 256, 16
    tensors = make(B=B, D=D, T=T, N=N, dtype=torch.bfloat16, bias=False, state=False)
    updates = B * D * T * N / 32

    def work(run):
        sim.reset_stats()
        out = run()
        return out, sum(counters["warp_instructions"] for counters in sim.stats().values()) / updates

    out, forward = work(lambda: scan(tensors)[0])
    leaves = [t for t in tensors.values() if t is not None]
    _, backward = work(lambda: torch.autograd.grad(out.sum(), leaves))
    assert forward <= 20
    assert backward <= 64


@pytest.mark.cpu_only
def test_independent_of_the_number_of_threads():
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        tensors = make(D=200, T=130)
        runs.append(results(*scan(tensors), tensors, torch.float32))
    torch.set_num_threads(threads)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_state_handed_over_continues_the_sequence(kernels):
    tensors = make(T=128, state=False)
    with torch.no_grad():
        out, state = scan(tensors)
        part = {n: t[..., :64] if t is not None and t.dim() >= 3 else t for n, t in tensors.items()}
        rest = {n: t[..., 64:] if t is not None and t.dim() >= 3 else t for n, t in tensors.items()}
        left, handed = scan(part)
        right, last = scan({**rest, "initial_state": handed})
    assert torch.equal(torch.cat([left, right], -1), out)
    assert torch.equal(last, state)


@dtypes
@pytest.mark.parametrize("N", [16, 20])
def test_steps_equal_the_scan(kernels, dtype, N):
    tensors = make(T=5, N=N, G=2, dtype=dtype)
    with torch.no_grad():
        out, state = scan(tensors)
        pool = torch.zeros(5, 40, N, dtype=state.dtype)
        slots = torch.tensor([3, 1])
        pool[slots] = tensors["initial_state"]
        for t in range(5):
            args = [None if tensors[n] is None else tensors[n] for n in NAMES[:8]]
            u, delta, A, B, C, D, z, bias = args
            y = ops.selective_state_update(
                pool, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True, slots
            )
            torch.testing.assert_close(y, out[..., t], rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2)
    torch.testing.assert_close(pool[slots], state, rtol=1e-4, atol=1e-4)
    assert not pool[[0, 2, 4]].any()


def test_a_step_skips_what_is_outside_the_pool(kernels):
    x, state = torch.randn(3, 8), torch.randn(2, 8, 16)
    before = state.clone()
    out = ops.selective_state_update(
        state, x, torch.rand(3, 8), -torch.rand(8, 16), torch.randn(3, 16), torch.randn(3, 16),
        state_batch_indices=torch.tensor([-1, 1, 2**40]),
    )  # fmt: skip
    assert not out[[0, 2]].any()
    assert out[1].any()
    assert torch.equal(state[0], before[0])
    assert not torch.equal(state[1], before[1])


@pytest.mark.cpu_only
def test_gradcheck():
    tensors = make(B=1, D=3, T=6, N=4, dtype=torch.float64)
    names = [n for n in NAMES if tensors[n] is not None]
    assert torch.autograd.gradcheck(
        lambda *args: scan(dict(zip(names, args, strict=True))), [tensors[n] for n in names]
    )


@pytest.mark.parametrize("token_major", [False, True], ids=["mamba layout", "token major"])
def test_registration(token_major):
    tensors = make(T=20, token_major=token_major)
    opcheck(torch.ops.remora.selective_scan_fwd.default, (*(tensors[n] for n in NAMES), None, True, False, True, True))
    compiled = torch.compile(lambda t: scan(t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors)[0], scan(tensors)[0])


@pytest.mark.parametrize("size", [{"T": 0}, {"B": 0}])
def test_no_tokens(size):
    tensors = make(**size)
    out, state = scan(tensors)
    assert out.shape == tensors["u"].shape
    assert torch.equal(state, tensors["initial_state"])
    grads = torch.autograd.grad(state.sum() + out.sum(), [tensors["initial_state"], tensors["A"]])
    assert torch.equal(grads[0], torch.ones_like(grads[0]))
    assert not grads[1].any()


ERRORS = {
    "u has no rank 3": ({"u": torch.randn(4, 5)}, ValueError, r"u must have shape \[B, D, T\]"),
    "delta of another dtype": ({"delta": torch.randn(2, 40, 70).half()}, TypeError, "delta must have dtype"),
    "A is complex": ({"A": torch.randn(40, 16, dtype=torch.complex64)}, TypeError, "A must have dtype"),
    "A of other channels": ({"A": torch.randn(41, 16)}, ValueError, "A must have shape"),
    "too many states": ({"A": torch.randn(40, 300)}, ValueError, "number of states N"),
    "B of other states": ({"B": torch.randn(2, 1, 8, 70)}, ValueError, "B must have shape"),
    "groups that do not divide": ({"B": torch.randn(2, 3, 16, 70)}, ValueError, "divides D = 40"),
    "C of another dtype": ({"C": torch.randn(2, 1, 16, 70).double()}, TypeError, "C must have the dtype of u"),
    "D of other channels": ({"D": torch.randn(3)}, ValueError, r"D must have shape \[D\]"),
    "state of another dtype": ({"initial_state": torch.randn(2, 40, 16).half()}, TypeError, "initial_state must have"),
    "state of other shape": ({"initial_state": torch.randn(3, 40, 16)}, ValueError, "initial_state must have shape"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        scan({**make(), **change})


def test_bad_offsets_are_named():
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        scan(make(B=1, num_seqs=2), cu_seqlens=torch.tensor([0, 71, 70]))
    with pytest.raises(ValueError, match="B = 1"):
        scan(make(), cu_seqlens=torch.tensor([0, 70]))


def test_a_step_refuses_gradients():
    with pytest.raises(ValueError, match="no gradient"):
        ops.selective_state_update(
            torch.zeros(1, 2, 3), torch.randn(1, 2, requires_grad=True), torch.rand(1, 2), -torch.rand(2, 3),
            torch.randn(1, 3), torch.randn(1, 3),
        )  # fmt: skip
