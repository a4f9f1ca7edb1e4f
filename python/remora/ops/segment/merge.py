"""One softmax out of several: how results of attention over different keys are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remora.ops import check


def merge_attention(sources: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the keys of all sources together; differentiable.

        lse = log sum_i exp(lse_i),   o = sum_i exp(lse_i - lse) o_i

    Plain PyTorch, which reads what the sources wrote once. Gradients are exact, because a source gets a gradient of its
    lse too. The sum runs in the order of the sources. Where no source saw a key (every lse is -inf), o is zero and lse
    -inf.

    Args:
        sources: pairs (o [..., D], lse [...]) as `prefix_attention` returns them, of one shape.

    Returns:
        o [..., D] in the dtype of the first source, lse [...].

    Raises:
        TypeError: a source is not a pair of tensors.
        ValueError: there is no source, or shapes or devices differ.
    """
    if len(sources) == 0:
        raise ValueError("sources must hold at least one pair (o, lse), got none")
    for i, (o, lse) in enumerate(sources):
        check.is_tensor(o, f"o of source {i}")
        check.is_tensor(lse, f"lse of source {i}")
        check.has_shape(o, f"o of source {i}", "[..., D] (as that of source 0)", sources[0][0].shape)
        check.has_shape(lse, f"lse of source {i}", "[...] (o without its last dimension)", o.shape[:-1])
        check.same_device(o, f"o of source {i}", sources[0][0], "source 0")
    first = sources[0][0]
    all_lse = torch.stack([lse for _, lse in sources])
    is_empty = torch.isneginf(all_lse).all(0)
    # exp and log of finite numbers only, or gradients of rows without keys would be NaN
    safe = torch.where(is_empty, torch.zeros_like(all_lse), all_lse)
    lse = safe.logsumexp(0)
    weights = torch.where(is_empty, torch.zeros_like(safe), (safe - lse).exp())
    total = weights[0][..., None] * sources[0][0]
    for weight, (o, _) in zip(weights[1:], sources[1:], strict=True):
        total = total + weight[..., None] * o
    return total.to(first.dtype), lse.masked_fill(is_empty, -torch.inf)
