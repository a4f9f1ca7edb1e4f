"""Mixture-of-Memories in plain PyTorch: every memory runs densely over all tokens. The oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from remora.ops.recurrence.gated_delta_rule.naive import naive_gated_delta_rule


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


def naive_mom_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, weights: Tensor, indices: Tensor,
    num_memories: int, *, scale: float | None = None, initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, shared_memory: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and final states [N, M(+1), HV, K, V]. `keep` [B, T, J] says which choices are not dropped. The indices of
    a token must be distinct.
    """
    J = indices.shape[-1] + shared_memory

    def of_choice(x: Tensor, dims: int, j: Tensor) -> Tensor:
        if x.dim() == dims:
            return x
        return torch.gather(x, 2, j.reshape(*j.shape, *[1] * (x.dim() - 3)).expand(*j.shape, *x.shape[3:]))[:, :, 0]

    states, out = [], torch.zeros((), dtype=beta.dtype)
    for m in range(num_memories + shared_memory):
        chosen = indices == m
        if shared_memory:
            chosen = torch.cat([chosen, torch.full_like(chosen[..., :1], m == num_memories)], dim=-1)
        if keep is not None:
            chosen = chosen & keep
        on = chosen.any(-1)
        choice = chosen.int().argmax(-1, keepdim=True)
        assert chosen.shape[-1] == J
        gate = None if g is None else torch.where(on[..., None], of_choice(g, 3, choice), 0)
        write = torch.where(on[..., None], of_choice(beta, 3, choice), 0)
        o, state = naive_gated_delta_rule(
            of_choice(q, 4, choice), of_choice(k, 4, choice), of_choice(v, 4, choice), gate, write, scale,
            None if initial_state is None else initial_state[:, m], True, use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        weight = weights if not shared_memory else torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1)
        out = out + torch.where(chosen, weight, 0).sum(-1)[..., None, None] * o
        assert state is not None
        states.append(state)
    return out, torch.stack(states, dim=1)
