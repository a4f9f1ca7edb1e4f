"""Linear attention with scalar decay."""

from remora.ops.recurrence.simple_gla import registration as _registration  # noqa: F401
from remora.ops.recurrence.simple_gla.functional import (
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_simple_gla,
    simple_gla_step,
)

__all__ = [
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "simple_gla_step",
]
