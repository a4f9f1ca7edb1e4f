"""Tensors that are not aligned to vectors, one argument of an operator at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from remora import ops


class Moved(TorchDispatchMode):
    """Moves floating-point tensor number `index` among the arguments of every operator one element off."""

    def __init__(self, index: int | None) -> None:
        super().__init__()
        self.index = index
        self.num_tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "remora":
            return func(*args, **(kwargs or {}))
        seen = 0
        written: list[tuple[Tensor, Tensor]] = []

        def move(x: Any) -> Any:
            nonlocal seen
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
                return x
            seen += 1
            if seen - 1 != self.index:
                return x
            size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            flat, moved = x.as_strided((size,), (1,)), x.new_empty(size + 1)[1:]
            moved.copy_(flat)
            if func._schema.is_mutable:
                written.append((flat, moved))
            return moved.as_strided(x.shape, x.stride())

        out = func(*tree_map(move, args), **tree_map(move, kwargs or {}))
        for flat, moved in written:
            flat.copy_(moved)
        self.num_tensors = max(self.num_tensors, seen)
        return out


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def tokens(heads: int = 2, width: int = 64) -> list[Tensor]:
    return [normal(1, 72, heads, width) for _ in range(3)]


def gates() -> tuple[Tensor, Tensor]:
    return (-torch.rand(1, 72, 2)).requires_grad_(), torch.rand(1, 72, 2).requires_grad_()


def gated_delta_rule() -> Any:
    leaves = [*tokens(), *gates(), normal(1, 2, 64, 64, dtype=torch.float32)]
    options = {"initial_state": leaves[5], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return ops.chunk_gated_delta_rule(*leaves[:5], **options), leaves


def simple_gla() -> Any:
    leaves = [*tokens(), gates()[0], normal(1, 2, 64, 64, dtype=torch.float32)]
    return ops.chunk_simple_gla(*leaves[:4], initial_state=leaves[4], output_final_state=True), leaves


def steps() -> Any:
    q, k, v, g, beta = (x[:, :1].detach() for x in (*tokens(), *gates()))
    state = torch.randn(1, 2, 64, 64)
    o = ops.gated_delta_rule_step(q, k, v, g, beta, state)
    return (o, ops.simple_gla_step(q, k, v, g, state), state), []


def mixture_of_memories() -> Any:
    logits = normal(1, 72, 4)
    route = ops.mom_route(logits, 2)
    leaves = [*tokens(), *gates()]
    routed = {"num_memories": 4, "output_final_state": False}
    o, _ = ops.mom_gated_delta_rule(*leaves, route.weights, route.indices, use_qk_l2norm_in_kernel=True, **routed)
    linear, _ = ops.mom_simple_gla(*leaves[:4], route.weights, route.indices, **routed)
    return (o, linear, route.balance_loss), [logits, *leaves]


def causal_conv1d() -> Any:
    leaves = [normal(1, 72, 16), normal(16, 4, dtype=torch.float32), normal(16, dtype=torch.float32), normal(1, 3, 16)]
    return ops.causal_conv1d(*leaves[:3], initial_state=leaves[3], output_final_state=True), leaves


def selective_scan() -> Any:
    u, delta, z = (normal(1, 8, 72) for _ in range(3))
    a, state = (-torch.rand(8, 16)).requires_grad_(), normal(1, 8, 16, dtype=torch.float32)
    b, c = normal(1, 16, 72), normal(1, 16, 72)
    options = {"delta_softplus": True, "initial_state": state, "return_last_state": True}
    return ops.selective_scan(u, delta, a, b, c, z=z, **options), [u, delta, a, b, c, z, state]


def memory_bag() -> Any:
    table, weights = normal(64, 32), normal(6, 8, dtype=torch.float32)
    return ops.memory_bag(torch.randint(64, (6, 8)), table, weights), [table, weights]


def peer_bag() -> Any:
    leaves = [normal(64, 32), normal(6, 16), normal(6, 8, dtype=torch.float32)]
    return ops.peer_bag(torch.randint(64, (6, 8)), *leaves), leaves


def pk_topk() -> Any:
    leaves = [normal(6, 2, 2, 32), normal(2, 2, 40, 32)]
    return ops.pk_topk(*leaves, 8), leaves


def prefix_attention() -> Any:
    leaves = [*tokens(), normal(1, 9, 2, 64), normal(1, 9, 2, 64)]
    q, k, v, k_sum, v_sum = leaves
    options = {"k_self": k, "v_self": v, "window": 4, "k_win": k, "v_win": v}
    return ops.prefix_attention(q, k_sum, v_sum, stride=8, size=8, **options), leaves


def gather_attention() -> Any:
    leaves = tokens()
    chunks = torch.arange(2).expand(1, 72, 2, 2).contiguous()
    return ops.gather_attention(*leaves, chunks, 8, causal=False), leaves


def topk_chunks() -> Any:
    return ops.topk_chunks(normal(1, 72, 2, 64), normal(1, 9, 2, 64), 2, stride=8, size=8), []


def segment_pool() -> Any:
    x, gate = normal(1, 72, 32), normal(1, 72, 32)
    pooled = (ops.segment_pool(x, 8, 8, "softmax", gate=gate), ops.segment_pool(x, 8, 8, "max"))
    return pooled, [x, gate]


def code_prefix_state() -> Any:
    v = normal(1, 72, 2, 64)
    counts, sums, _ = ops.code_prefix_state(torch.randint(16, (1, 72, 2)), v, 16, 8)
    return (counts, sums), [v]


OPERATORS: list[Callable[[], Any]] = [
    gated_delta_rule, simple_gla, steps, mixture_of_memories, causal_conv1d, selective_scan, memory_bag, peer_bag,
    pk_topk, prefix_attention, gather_attention, topk_chunks, segment_pool, code_prefix_state,
]  # fmt: skip


def results(operator: Callable[[], Any], index: int | None) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    with Moved(index) as moved:
        out, leaves = operator()
        outputs = list(out) if isinstance(out, tuple) else [out]
        found = [x.detach() for x in outputs if x is not None]
        smooth = [x for x in outputs if x is not None and x.requires_grad]
        if leaves:
            found += torch.autograd.grad(smooth, leaves, [torch.randn_like(x) for x in smooth])
    return found, moved.num_tensors


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_any_argument_may_be_unaligned(operator):
    want, num_tensors = results(operator, None)
    assert num_tensors > 0
    for index in range(num_tensors):
        have, _ = results(operator, index)
        # Not to the bit: a sum over lanes has another order where they hold other elements.
        torch.testing.assert_close(have, want, rtol=2e-2, atol=1e-4, msg=lambda text, index=index: f"{index}: {text}")
