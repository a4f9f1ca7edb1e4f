"""Segment compression: summaries of segments, and what reads them."""

from remora.ops.segment.offsets import summary_offsets
from remora.ops.segment.segment_pool import segment_broadcast, segment_pool
from remora.ops.segment.vector_quantization import code_prefix_state, vq_assign, vq_ema_

__all__ = ["code_prefix_state", "segment_broadcast", "segment_pool", "summary_offsets", "vq_assign", "vq_ema_"]
