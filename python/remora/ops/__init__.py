"""Operators: public functions over `torch.ops.remora`. Shapes: docs/numerics.md."""

from remora.ops.pkm import (
    SlotPlan,
    memory_bag,
    peer_bag,
    row_norm,
    rowwise_adagrad_,
    rowwise_adam_,
    slot_plan,
    sparse_adamw_,
)
from remora.ops.recurrence import (
    causal_conv1d,
    causal_conv1d_step,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
)
from remora.ops.routed import (
    MomRoute,
    RoutePlan,
    mom_combine,
    mom_gated_delta_rule,
    mom_gated_delta_rule_step,
    mom_route,
    route_plan,
)

__all__ = [
    "MomRoute",
    "RoutePlan",
    "SlotPlan",
    "causal_conv1d",
    "causal_conv1d_step",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_rule_step",
    "memory_bag",
    "mom_combine",
    "mom_gated_delta_rule",
    "mom_gated_delta_rule_step",
    "mom_route",
    "peer_bag",
    "route_plan",
    "row_norm",
    "rowwise_adagrad_",
    "rowwise_adam_",
    "slot_plan",
    "sparse_adamw_",
]
