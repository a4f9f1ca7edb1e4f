"""Segment compression: summaries of segments, and what reads them."""

from remora.ops.segment.gather_attention import gather_attention
from remora.ops.segment.merge import merge_attention
from remora.ops.segment.offsets import summary_offsets
from remora.ops.segment.prefix_attention import prefix_attention
from remora.ops.segment.segment_pool import segment_broadcast, segment_pool
from remora.ops.segment.topk_chunks import chunk_scores, topk_chunks
from remora.ops.segment.vector_quantization import code_prefix_state, vq_assign, vq_ema_

__all__ = [
    "chunk_scores",
    "code_prefix_state",
    "gather_attention",
    "merge_attention",
    "prefix_attention",
    "segment_broadcast",
    "segment_pool",
    "summary_offsets",
    "topk_chunks",
    "vq_assign",
    "vq_ema_",
]
