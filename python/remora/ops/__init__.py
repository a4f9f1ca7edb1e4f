"""Operators: public functions over `torch.ops.remora`. Shapes: docs/numerics.md."""

from remora.ops.recurrence import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
)

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
]
