"""Chunked linear recurrences."""

from remora.ops.recurrence.causal_conv1d import causal_conv1d, causal_conv1d_step
from remora.ops.recurrence.gated_delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
)
from remora.ops.recurrence.selective_scan import selective_scan, selective_state_update
from remora.ops.recurrence.simple_gla import (
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_simple_gla,
    simple_gla_step,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_simple_gla",
    "gated_delta_rule_step",
    "selective_scan",
    "selective_state_update",
    "simple_gla_step",
]
