"""Attention over a growing prefix of summaries, the token itself and a band of neighbours, in one softmax."""

from remora.ops.segment.prefix_attention import registration as _registration  # noqa: F401
from remora.ops.segment.prefix_attention.functional import prefix_attention

__all__ = ["prefix_attention"]
