"""Chunked linear recurrences."""

from remora.ops.recurrence.causal_conv1d import causal_conv1d, causal_conv1d_step
from remora.ops.recurrence.gated_delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
]
