"""An order-2 byte n-gram model: the baseline a language model has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from remora.train.data import Bytes

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ByteNgram:
    """Probability of a byte given the two before it, with interpolated Witten-Bell smoothing.

        p(c | context) = (n(context c) + t(context) p(c | shorter context)) / (n(context) + t(context))

    where `n` counts occurrences in the training text and `t` the distinct bytes seen after the context. The recursion
    ends in the uniform distribution, so every byte has a positive probability and every context's probabilities sum
    to one.

    Source: Witten, Bell, "The Zero-Frequency Problem" (IEEE Transactions on Information Theory, 1991); the
    interpolated form of Chen, Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1999).

    Args:
        text: `[num_bytes]` uint8, the training text.
    """

    def __init__(self, text: Bytes) -> None:
        tokens = text.astype(np.int64)
        unigrams = np.bincount(tokens, minlength=256)
        bigrams = np.bincount((tokens[:-1] << 8) | tokens[1:], minlength=256**2).reshape(256, 256)
        trigrams = np.bincount((tokens[:-2] << 16) | (tokens[1:-1] << 8) | tokens[2:], minlength=256**3)
        self._trigrams = trigrams.reshape(256**2, 256)
        self._trigram_total = self._trigrams.sum(axis=1)
        self._trigram_types = (self._trigrams > 0).sum(axis=1)
        unigram = _interpolate(unigrams, unigrams.sum(), (unigrams > 0).sum(), np.full(256, 1 / 256))
        totals, types = bigrams.sum(axis=1, keepdims=True), (bigrams > 0).sum(axis=1, keepdims=True)
        self._bigram = _interpolate(bigrams, totals, types, np.broadcast_to(unigram, (256, 256)))

    def probabilities(self, contexts: Integers, targets: Integers) -> Floats:
        """Return `p(target | context)` `[...]` for `targets` `[...]` and `contexts` `[..., 2]`, oldest byte first."""
        row = (contexts[..., 0] << 8) | contexts[..., 1]
        return _interpolate(
            self._trigrams[row, targets],
            self._trigram_total[row],
            self._trigram_types[row],
            self._bigram[contexts[..., 1], targets],
        )

    def bits_per_byte(self, contexts: Integers, targets: Integers) -> float:
        """Return the mean of `-log2 p(target | context)`."""
        return float(-np.log2(self.probabilities(contexts, targets)).mean())


def _interpolate(count: Integers, total: Integers, types: Integers, shorter: Floats) -> Floats:
    seen = total + types
    return np.where(seen > 0, (count + types * shorter) / np.maximum(seen, 1), shorter)
