"""Segment compression: summaries of segments, and what reads them."""

from remora.ops.segment.offsets import summary_offsets
from remora.ops.segment.segment_pool import segment_broadcast, segment_pool

__all__ = ["segment_broadcast", "segment_pool", "summary_offsets"]
