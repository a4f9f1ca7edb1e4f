"""The definitions of the vector quantization operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances of x [B, H, T, D] to the codes [H, S, D]: [B, H, T, S]."""
    return (x[:, :, :, None] - codebook[None, :, None]).square().sum(-1)


def naive_vq_ema(csum: Tensor, ccount: Tensor, x: Tensor, idx: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The new csum [H, S, D] and ccount [H, S] of x [B, H, T, D] and its codes [B, H, T]; -1 has none."""
    one_hot = F.one_hot(idx.long() + 1, ccount.shape[1] + 1)[..., 1:].to(csum.dtype)
    sums = torch.einsum("bhts,bhtd->hsd", one_hot, x.to(csum.dtype))
    return decay * csum + (1 - decay) * sums, decay * ccount + (1 - decay) * one_hot.sum((0, 2))


def naive_code_prefix_state(
    idx: Tensor, v: Tensor, n_code: int, chunk: int, count: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and means of the values v [B, H, T, D] of every code before each chunk, after count [B, H, S] and mean
    [B, H, S, D]: log_count [B, H, N, S], mean [B, H, N, S, D], and count and mean of all tokens.
    """
    counts, means = [], []
    for first in range(0, idx.shape[2] + chunk, chunk):
        before = min(first, idx.shape[2])
        one_hot = F.one_hot(idx[:, :, :before].long() + 1, n_code + 1)[..., 1:].to(v.dtype)
        total = count + one_hot.sum(2)
        sums = mean * count[..., None] + torch.einsum("bhts,bhtd->bhsd", one_hot, v[:, :, :before])
        counts.append(total)
        means.append(torch.where(total[..., None] > 0, sums / total.clamp(min=1e-30)[..., None], 0))
        if before == idx.shape[2]:
            break
    # Without tokens there are no borders, and otherwise the last entry is that of all tokens.
    borders = slice(0, len(counts) - 1)
    log_count = torch.stack([c.log() for c in counts[borders]], 2) if len(counts) > 1 else count[:, :, None][:, :, :0]
    stacked = torch.stack(means[borders], 2) if len(counts) > 1 else mean[:, :, None][:, :, :0]
    return log_count, stacked, counts[-1], means[-1]
