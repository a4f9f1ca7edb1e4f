"""Mixture-of-Memories in plain PyTorch: every memory runs densely over all tokens. The oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule
from remora.ops.recurrence.simple_gla.naive import naive_simple_gla


def naive_mom_route(
    logits: Tensor, topk: int, mask: Tensor | None = None, renormalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, indices, balance loss, z loss and hits as `remora.ops.mom_route` defines them."""
    B, T, M = logits.shape
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    probabilities = wide.softmax(-1)
    indices = wide.argsort(dim=-1, descending=True, stable=True)[..., :topk]
    weights = probabilities.gather(-1, indices)
    if renormalize:
        weights = wide.gather(-1, indices).softmax(-1)
    n = max(int(real.sum()), 1)
    hits = torch.nn.functional.one_hot(indices[real], M).sum((0, 1))
    balance = M * (hits / n * probabilities[real].sum(0) / n).sum()
    z = wide[real].logsumexp(-1).square().sum() / n
    return weights * real[..., None], indices.where(real[..., None], -1).int(), balance, z, hits.int()


def _of_choice(x: Tensor, dims: int, j: Tensor) -> Tensor:
    """What choice j [B, T, 1] of every token has; x is shared by the choices, or has them after T."""
    if x.dim() == dims:
        return x
    return torch.gather(x, 2, j.reshape(*j.shape, *[1] * (x.dim() - 3)).expand(*j.shape, *x.shape[3:]))[:, :, 0]


def _over_memories(
    run: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]], weights: Tensor, indices: Tensor,
    num_memories: int, shared_memory: bool, keep: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weighted sum of the outputs of `run(m, on, choice)`, and the states. Memory m is sent the tokens `on`
    [B, T, 1] as their choice `choice` [B, T, 1].
    """
    J = indices.shape[-1] + shared_memory
    states, out = [], torch.zeros((), dtype=weights.dtype)
    for m in range(num_memories + shared_memory):
        chosen = indices == m
        if shared_memory:
            chosen = torch.cat([chosen, torch.full_like(chosen[..., :1], m == num_memories)], dim=-1)
        if keep is not None:
            chosen = chosen & keep
        assert chosen.shape[-1] == J
        o, state = run(m, chosen.any(-1, keepdim=True), chosen.int().argmax(-1, keepdim=True))
        weight = weights if not shared_memory else torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1)
        out = out + torch.where(chosen, weight, 0).sum(-1)[..., None, None] * o
        assert state is not None
        states.append(state)
    return out, torch.stack(states, dim=1)


def naive_mom_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, weights: Tensor, indices: Tensor,
    num_memories: int, *, scale: float | None = None, initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, shared_memory: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and final states [N, M(+1), HV, K, V]. `keep` [B, T, J] says which choices are not dropped. The indices of
    a token must be distinct.
    """

    def run(m: int, on: Tensor, choice: Tensor) -> tuple[Tensor, Tensor | None]:
        gate = None if g is None else torch.where(on, _of_choice(g, 3, choice), 0)
        write = torch.where(on, _of_choice(beta, 3, choice), 0)
        return naive_gated_delta_rule(
            _of_choice(q, 4, choice), _of_choice(k, 4, choice), _of_choice(v, 4, choice), gate, write, scale,
            None if initial_state is None else initial_state[:, m], True, use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    return _over_memories(run, weights, indices, num_memories, shared_memory, keep)


def naive_mom_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, weights: Tensor, indices: Tensor, num_memories: int, *,
    scale: float | None = None, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    shared_memory: bool = False, keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `naive_mom_gated_delta_rule`."""

    def run(m: int, on: Tensor, choice: Tensor) -> tuple[Tensor, Tensor | None]:
        gate = None if g is None else torch.where(on, _of_choice(g, 3, choice), 0)
        key = torch.where(on[..., None], _of_choice(k, 4, choice), 0)
        return naive_simple_gla(
            _of_choice(q, 4, choice), key, _of_choice(v, 4, choice), gate, scale=scale,
            initial_state=None if initial_state is None else initial_state[:, m], output_final_state=True,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    return _over_memories(run, weights, indices, num_memories, shared_memory, keep)
