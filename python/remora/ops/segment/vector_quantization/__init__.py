"""Vector quantization: nearest codes, their moving averages, and running means of values per code."""

from remora.ops.segment.vector_quantization.functional import code_prefix_state, vq_assign, vq_ema_

__all__ = ["code_prefix_state", "vq_assign", "vq_ema_"]
