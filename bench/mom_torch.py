"""Mixture-of-Memories as a competent user would compose it from torch operators: sort the choices by memory, gather,
project memory by memory, pad the segments to the longest, run any batched recurrence, weigh, scatter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # of q, k, v, g, beta [S, L, H, D]


class Segments:
    """The choices of [B, T, k] memories as segments (memory, sequence), padded to the longest."""

    def __init__(self, indices: Tensor, num_memories: int) -> None:
        B, k = indices.shape[0], indices.shape[2]
        segment = (indices.long() * B + torch.arange(B).view(B, 1, 1)).flatten()
        self.order = segment.argsort(stable=True)
        self.tokens = self.order // k
        counts = torch.bincount(segment, minlength=num_memories * B)
        self.lengths = counts.tolist()
        self.shape = (num_memories * B, max(1, int(counts.max())))
        sorted_segment = segment[self.order]
        rank = torch.arange(len(segment)) - (counts.cumsum(0) - counts)[sorted_segment]
        self.place = sorted_segment * self.shape[1] + rank

    def pad(self, x: Tensor) -> Tensor:
        """[choices, ...] in order to [S, L, ...]; the rest is zero."""
        size = self.shape[0] * self.shape[1]
        return x.new_zeros(size, *x.shape[1:]).index_copy(0, self.place, x).view(*self.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.place]

    def combine(self, o: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the sorted choices of every token."""
        weighed = o * weights.flatten()[self.order].view(-1, *[1] * (o.dim() - 1))
        return o.new_zeros(weights.shape[0] * weights.shape[1], *o.shape[1:]).index_add(0, self.tokens, weighed)


def routed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, weights: Tensor, indices: Tensor, num_memories: int,
    recurrence: Recurrence,
) -> Tensor:  # fmt: skip
    """What `remora.ops.mom_gated_delta_rule` returns, of inputs shared by the choices of a token."""
    segments = Segments(indices, num_memories)
    o = recurrence(*(segments.pad(x.flatten(0, 1)[segments.tokens]) for x in (q, k, v, g, beta)))
    return segments.combine(segments.unpad(o), weights).view(*weights.shape[:2], *o.shape[2:])


def convolve(x: Tensor, convolution: Any) -> Tensor:
    """[S, L, C] along L."""
    weight = convolution.weight
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[2] - 1, 0)), weight, groups=weight.shape[0])).mT


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recur(layer: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, recurrence: Recurrence) -> Tensor:
    """Convolutions and recurrence of [S, L, ...] segments; padding has g = 0 and beta = 0."""
    heads = [
        convolve(x, c).unflatten(-1, (layer.num_heads, -1))
        for x, c in zip((q, k, v), (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d), strict=True)
    ]
    return recurrence(unit(heads[0]), unit(heads[1]), heads[2], g, beta)


def layer(layer: Any, x: Tensor, recurrence: Recurrence) -> Tensor:
    """What the `remora.modules.MixtureOfMemories` `layer`, with a shared memory, returns for x [B, T, D]."""
    p = layer.router(x).float().softmax(-1)
    weights, indices = p.topk(layer.topk, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    segments = Segments(indices, layer.num_memories)
    B = x.shape[0]

    def gates(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return -layer.A_log.exp() * F.softplus(a + layer.dt_bias), b.sigmoid()

    flat = x.flatten(0, 1)
    q = layer.q_proj(flat)
    maps = layer.memory_proj.weight
    if layer.single_kv_proj:
        shared = F.linear(flat, maps[0])
        rows = shared[segments.tokens]
    else:
        shared = F.linear(flat, maps[-1])
        sizes = [sum(segments.lengths[m * B : (m + 1) * B]) for m in range(layer.num_memories)]
        rows = torch.cat([F.linear(y, w) for y, w in zip(flat[segments.tokens].split(sizes), maps, strict=False)])
    k, v, a, b = rows.split(layer.projected_sizes, dim=-1)
    padded = [segments.pad(y) for y in (q[segments.tokens], k, v, *gates(a, b))]
    o = segments.combine(segments.unpad(recur(layer, *padded, recurrence)), weights)
    k, v, a, b = shared.split(layer.projected_sizes, dim=-1)
    whole = [y.unflatten(0, x.shape[:2]) for y in (q, k, v, *gates(a, b))]
    o = o.view(*x.shape[:2], *o.shape[1:]) + recur(layer, *whole, recurrence)
    o = layer.o_norm(o, layer.g_proj(x).unflatten(-1, (layer.num_heads, layer.head_v_dim)))
    y: Tensor = layer.o_proj(o.flatten(-2))
    return y
