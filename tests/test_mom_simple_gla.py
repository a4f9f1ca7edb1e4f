"""Linear attention with scalar decay over routed tokens, against every memory run densely."""

import pytest
import torch
import torch.nn.functional as F
from gated_delta_rule_cases import CUDA_PATH
from simple_gla_cases import chunked_in_plain_torch

from remora import ops
from remora.ops.routed.naive import naive_mom_simple_gla
from remora.testing.numeric import assert_accurate

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.bfloat16] + ([] if CUDA_PATH else [torch.float64])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(B=2, T=40, H=1, HV=2, K=16, V=24, M=3, k=2, dtype=torch.float64, per_choice=False, shared=False, N=None):
    per = (k + shared,) if per_choice else ()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {
        "q": F.normalize(torch.randn(B, T, *per, H, K), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(B, T, *per, H, K), dim=-1).to(dtype),
        "v": torch.randn(B, T, *per, HV, V).to(dtype),
        "g": F.logsigmoid(torch.randn(B, T, *per, HV) + 2).to(wide),
        "weights": torch.rand(B, T, k).to(wide),
        "initial_state": torch.randn(N or B, M + shared, HV, K, V).to(wide),
    }
    return {name: y.requires_grad_() for name, y in x.items()}, torch.rand(B, T, M).argsort(-1)[..., :k]


def run(function, x, indices, M, d=None, **options):
    """Output, states and gradients by name."""
    o, state = function(**x, indices=indices, num_memories=M, **options)
    d = [torch.randn_like(y, dtype=torch.float64) for y in (o, state)] if d is None else d
    grads = torch.autograd.grad(
        [o, state], list(x.values()), [y.to(z.dtype) for y, z in zip(d, (o, state), strict=True)]
    )
    return {"o": o.detach(), "state": state.detach()} | {f"d{n}": y for n, y in zip(x, grads, strict=True)}, d


def gather_and_scatter(q, k, v, g, weights, indices, num_memories, initial_state, cu_seqlens=None, shared_memory=False):
    """Gather, the chunked form, and the weighted sum in plain PyTorch, in the dtype of q."""
    B, T, topk = indices.shape
    J, R, HV, V = topk + shared_memory, B * T, *v.shape[-2:]
    plan = ops.route_plan(indices, num_memories, cu_seqlens=cu_seqlens, shared_memory=shared_memory)
    rows = plan.rows.long()

    def gathered(x, dims):
        x = x.unsqueeze(2).expand(-1, -1, J, *x.shape[2:]) if x.dim() == dims else x
        return x.movedim(2, 0).reshape(J * R, *x.shape[3:])[rows][None]

    o, state = chunked_in_plain_torch(
        gathered(q, 4), gathered(k, 4), gathered(v, 4), gathered(g, 3), None, initial_state.flatten(0, 1), None, True,
        plan.cu_seqlens, False,
    )  # fmt: skip
    if shared_memory:
        weights = torch.cat([weights, torch.ones_like(weights[..., :1])], -1)
    weights = weights.movedim(2, 0).reshape(-1)[rows].to(q.dtype)
    out = torch.zeros(R, HV, V, dtype=q.dtype).index_add(0, rows % R, weights[:, None, None] * o[0])
    return out.view(B, T, HV, V), state.view_as(initial_state)


def check(x, indices, M, dtype, **options):
    double = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    want, d = run(naive_mom_simple_gla, double, indices, M, **options)
    rule = dict.fromkeys(want)
    if dtype != torch.float64:
        rule, _ = run(gather_and_scatter, x, indices, M, d, **options)
    have, _ = run(ops.mom_simple_gla, x, indices, M, d, output_final_state=True, **options)
    for name, y in have.items():
        assert_accurate(y, want[name], rule[name], name, dtype=dtype, gradient=name.startswith("d"))


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("per_choice", [False, True], ids=["", "per choice"])
@pytest.mark.parametrize(("M", "k"), [(3, 2)] if CUDA_PATH else [(3, 2), (2, 1), (3, 3), (6, 1)])
def test_routed_is_masked_dense(dtype, shared, per_choice, M, k):
    x, indices = inputs(M=M, k=k, dtype=dtype, per_choice=per_choice, shared=shared)
    check(x, indices, M, dtype, shared_memory=shared)


@dtypes
def test_packed_with_an_empty_sequence(dtype):
    x, indices = inputs(B=1, T=60, N=3, dtype=dtype)
    check(x, indices, 3, dtype, cu_seqlens=torch.tensor([0, 25, 25, 60]))


@dtypes
def test_collapse_to_one_memory(dtype):
    x, indices = inputs(B=1, T=150, HV=1, K=64, V=64, M=3, k=1, dtype=dtype)
    check(x, torch.ones_like(indices), 3, dtype)
    _, state = ops.mom_simple_gla(**x, indices=torch.ones_like(indices), num_memories=3, output_final_state=True)
    assert torch.equal(state[:, [0, 2]], x["initial_state"][:, [0, 2]])


@pytest.mark.cpu_only
@dtypes
def test_the_number_of_threads_does_not_matter(dtype):
    """A collapsed router: one head of one sequence has all tokens and is cut by columns."""
    x, indices = inputs(B=1, T=600, HV=1, K=64, V=64, M=2, k=1, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, d = run(ops.mom_simple_gla, x, torch.zeros_like(indices), 2, output_final_state=True)
        torch.set_num_threads(2)
        for name, y in run(ops.mom_simple_gla, x, torch.zeros_like(indices), 2, d, output_final_state=True)[0].items():
            assert torch.equal(y, first[name]), name
    finally:
        torch.set_num_threads(threads)


def test_capacity_drops():
    x, indices = inputs(B=1, T=12, M=2, k=1)
    if CUDA_PATH:
        x = {name: y.detach().float().requires_grad_() for name, y in x.items()}
    indices = torch.zeros_like(indices)
    keep = torch.arange(12)[None, :, None] < 5
    have, d = run(ops.mom_simple_gla, x, indices, 2, output_final_state=True, capacity=5, drop="newest")
    want, _ = run(naive_mom_simple_gla, x, indices, 2, d, keep=keep)
    for name, y in have.items():
        torch.testing.assert_close(y, want[name].to(y.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.cpu_only
def test_gradcheck():
    x, indices = inputs(T=5, K=2, V=2)

    def call(*tensors):
        return ops.mom_simple_gla(
            **dict(zip(x, tensors, strict=True)), indices=indices, num_memories=3, output_final_state=True
        )

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_decode_is_prefill(shared):
    x, indices = inputs(T=8, shared=shared, dtype=torch.float32)
    whole, final = ops.mom_simple_gla(
        **x, indices=indices, num_memories=3, shared_memory=shared, output_final_state=True
    )
    state = x.pop("initial_state").clone()
    for t in range(8):
        token = {name: y[:, t : t + 1] for name, y in x.items()}
        o = ops.mom_simple_gla_step(**token, indices=indices[:, t : t + 1], state=state, shared_memory=shared)
        torch.testing.assert_close(o[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_constant_decay():
    x, indices = inputs(T=20, dtype=torch.float32)
    gamma = torch.tensor([-0.5, -0.1])
    added = {**x, "g": x["g"] + gamma}
    for have, want in zip(ops.mom_simple_gla(**x, g_gamma=gamma, indices=indices, num_memories=3)[:1],
                          ops.mom_simple_gla(**added, indices=indices, num_memories=3)[:1], strict=True):  # fmt: skip
        assert torch.equal(have, want)


def test_errors():
    x, indices = inputs(B=1, T=4, dtype=torch.float32)
    x = {name: y.detach() for name, y in x.items()}
    with pytest.raises(ValueError, match=r"initial_state must have shape \[N, memories, HV, K, V\] with N = 1"):
        ops.mom_simple_gla(**{**x, "initial_state": x["initial_state"][:, :2]}, indices=indices, num_memories=3)
    with pytest.raises(ValueError, match=r"g_gamma must have shape \[HV\] = \[2\], got \[3\]"):
        ops.mom_simple_gla(**x, indices=indices, num_memories=3, g_gamma=torch.zeros(3))
    with pytest.raises(ValueError, match="indices must have T = 1 in a step, got T = 4"):
        ops.mom_simple_gla_step(
            **{n: y for n, y in x.items() if n != "initial_state"}, indices=indices, state=x["initial_state"]
        )
