"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row of logits.

    Args:
        logits: `[B, vocab]`.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the `top_k` most likely tokens.
        top_p: of those, keep the smallest set of most likely tokens whose probability reaches `top_p`.
        generator: source of randomness, on the device of the logits; None is torch's default one.

    Returns:
        `[B]` int64.

    Raises:
        ValueError: an option is out of its range.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(dim=-1)

    num_kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    scores, tokens = (logits.float() / temperature).topk(num_kept, dim=-1)
    probabilities = scores.softmax(dim=-1)
    if top_p is not None:
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)
