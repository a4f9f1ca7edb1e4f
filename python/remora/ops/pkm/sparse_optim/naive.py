"""The definition of the optimizers, on one row at a time, in the dtype of the arguments (float64 for the tests)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def naive_sparse_adam(
    table: Tensor,
    steps: Sequence[dict[int, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    mode: str,
    rowwise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply gradients, each a dictionary of row and gradient of the row, one step after the other.

    Returns:
        table [N, d], first moments [N, d], second moments [N, d] or, row-wise, [N].
    """
    N, d = table.shape
    p, m = table.clone(), torch.zeros_like(table)
    v = table.new_zeros(N) if rowwise else torch.zeros_like(table)
    last = [0] * N
    b1, b2 = betas
    for step, gradients in enumerate(steps, 1):
        for s in range(N):
            if s not in gradients and mode != "dense":
                continue
            g = gradients.get(s, table.new_zeros(d))
            if mode == "catchup":
                missed = step - 1 - last[s]
                m[s] *= b1**missed
                v[s] *= b2**missed
                p[s] *= (1 - lr * weight_decay) ** missed
                last[s] = step
            m[s] = b1 * m[s] + (1 - b1) * g
            v[s] = b2 * v[s] + (1 - b2) * (g.square().mean() if rowwise else g.square())
            p[s] *= 1 - lr * weight_decay
            p[s] -= lr / (1 - b1**step) * m[s] / ((v[s] / (1 - b2**step)).sqrt() + eps)
    return p, m, v


def naive_rowwise_adagrad(
    table: Tensor, steps: Sequence[dict[int, Tensor]], *, lr: float, eps: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Returns table [N, d] and accumulators [N]; arguments as in `naive_sparse_adam`."""
    p, total = table.clone(), table.new_zeros(table.shape[0])
    for gradients in steps:
        for s, g in gradients.items():
            total[s] += g.square().mean()
            p[s] = (1 - lr * weight_decay) * p[s] - lr * g / (total[s].sqrt() + eps)
    return p, total


def naive_philox(counter: Sequence[int], seed: int) -> list[int]:
    """Four words of Philox4x32-10 (Salmon et al., 2011)."""
    x, key, mask = list(counter), [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ key[0], b & mask, (a >> 32) ^ x[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return x


def naive_stochastic_round(x: Tensor, seed: int, step: int, column_offset: int = 0) -> Tensor:
    """Round a float32 table [N, d] to bfloat16 with the bits of (seed, step, row, column)."""
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    for s in range(x.shape[0]):
        for c in range(x.shape[1]):
            words = naive_philox([s & 0xFFFFFFFF, s >> 32, (c + column_offset) // 4, step], seed)
            value = float(x[s, c])
            if not math.isfinite(value):
                out[s, c] = value
                continue
            bits = int(x[s, c].view(torch.int32)) & 0xFFFFFFFF
            bits = (bits + (words[(c + column_offset) % 4] & 0xFFFF)) & 0xFFFF0000
            signed = bits - 2**32 if bits >= 2**31 else bits
            out[s, c] = torch.tensor(signed, dtype=torch.int32).view(torch.float32)
    return out
