"""Pooling of segments, and back."""

from remora.ops.segment.segment_pool.functional import segment_broadcast, segment_pool

__all__ = ["segment_broadcast", "segment_pool"]
