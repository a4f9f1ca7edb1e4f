"""Selection of chunks by their summaries, and the differentiable scores of chosen chunks."""

from remora.ops.segment.topk_chunks import registration as _registration  # noqa: F401
from remora.ops.segment.topk_chunks.functional import chunk_scores, topk_chunks

__all__ = ["chunk_scores", "topk_chunks"]
