"""Attention to chosen blocks of keys."""

from remora.ops.segment.gather_attention import registration as _registration  # noqa: F401
from remora.ops.segment.gather_attention.functional import gather_attention

__all__ = ["gather_attention"]
