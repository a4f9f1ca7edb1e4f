"""The two recall tasks: what a model reads, and which of its predictions count."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remora.models.language_model import IGNORE_INDEX
from remora.train.data import Bytes

# Names worth recalling: identifiers long enough not to be guessed.
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{7,}")
# How many bytes of a repeated name are given; the rest must be completed.
NAME_HINT = 3


def recall_batch(
    num_pairs: int, batch_size: int, num_symbols: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw sequences of multi-query associative recall.

    A sequence is `num_pairs` different keys, each followed by its value, and then the same keys in another order, each
    again followed by its value. Keys are the tokens `0 ... num_symbols - 1`, values the next `num_symbols`.

    Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023).

    Returns:
        inputs `[batch_size, 4 * num_pairs]`, and targets of the same shape: the value at each repeated key, -100
        elsewhere.

    Raises:
        ValueError: there are fewer symbols than pairs.
    """
    if num_pairs > num_symbols:
        raise ValueError(f"num_pairs must be at most num_symbols={num_symbols}, got {num_pairs}")
    keys = torch.rand(batch_size, num_symbols, generator=generator).argsort(1)[:, :num_pairs]
    values = num_symbols + torch.randint(num_symbols, (batch_size, num_pairs), generator=generator)
    again = torch.rand(batch_size, num_pairs, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], dim=-1)
    queries = pairs.gather(1, again[..., None].expand(-1, -1, 2))
    inputs = torch.cat([pairs, queries], dim=1).flatten(1)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    targets[:, 2 * num_pairs :: 2] = queries[..., 1]
    return inputs, targets


@dataclass(frozen=True)
class NameWindows:
    """Windows of text in which a name occurs for the second time that the training text does not contain.

    Attributes:
        inputs: `[num_windows, seq_len]` int64; the last bytes are the repeated name, up to the window's end.
        targets: the bytes to complete, `[num_windows, seq_len]` int64; -100 everywhere but in the repeated name, after
            its first `NAME_HINT` bytes.
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def find(cls, validation: Bytes, train: Bytes, seq_len: int, max_windows: int) -> NameWindows:
        """Take names of the validation text that stand twice within `seq_len` bytes, spread evenly over it.

        Raises:
            ValueError: there is none.
        """
        known = set(NAME.findall(train.tobytes()))
        last_seen: dict[bytes, int] = {}
        ends: list[tuple[int, int]] = []
        for match in NAME.finditer(validation.tobytes()):
            name, start = match.group(), match.start()
            if name in known:
                continue
            before = last_seen.get(name)
            # One byte more than the name: that it ends here is part of the completion.
            if before is not None and before >= match.end() - seq_len >= 0 and match.end() < len(validation):
                ends.append((match.end(), len(name)))
            last_seen[name] = start
        if not ends:
            raise ValueError(f"no name of the validation text repeats within {seq_len} bytes")
        chosen = [ends[i] for i in np.linspace(0, len(ends) - 1, min(len(ends), max_windows)).astype(int)]
        rows = np.stack([validation[end - seq_len : end + 1] for end, _ in chosen]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        targets = tokens[:, 1:].clone()
        for row, (_, length) in enumerate(chosen):
            targets[row, : seq_len - (length - NAME_HINT) - 1] = IGNORE_INDEX
        return cls(tokens[:, :-1], targets)


def all_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Return per sequence whether every prediction that counts is the most likely one, `[B]` bool."""
    return ((logits.argmax(-1) == targets) | (targets == IGNORE_INDEX)).all(1)


def share_right(logits: Tensor, targets: Tensor) -> float:
    """Return the share of right predictions among those that count."""
    counts = targets != IGNORE_INDEX
    return float(((logits.argmax(-1) == targets) & counts).sum() / counts.sum())
